"""Rewards of the pixels alone: no weights, no prompt, at once. For tests and smoke runs.

B: images in the batch. H, W: image rows and columns.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rltune.rewards.base import REWARDS, Card

EPS = 1e-12
"""Added under a square root, whose gradient at 0 is infinite: a deviation of 0 scores 1e-6 and has gradient 0."""


@REWARDS.register("smoothness", Card(scale="-2 to 0", value_range=(-2.0, 0.0)))
def smoothness(x_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """Minus total variation, in [-2, 0]; 0 is a flat image. Needs no weights.

    The mean step between neighbours, across plus down.
    """
    return -(x_B3HW.diff(dim=-1).abs().mean(dim=(1, 2, 3)) + x_B3HW.diff(dim=-2).abs().mean(dim=(1, 2, 3)))


@REWARDS.register("brightness", Card(scale="0 to 1", value_range=(0.0, 1.0)))
def brightness(x_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of all channels, in [0, 1]; 1 is a white image. Its gradient is the same for every image."""
    return x_B3HW.mean(dim=(1, 2, 3))


@REWARDS.register("contrast", Card(scale="0 to 0.5", value_range=(0.0, 0.5)))
def contrast(x_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """Deviation of luma within the image, in [0, 0.5]; 0.5 is half black, half white.

    The RMS contrast, ``sqrt(var(luma) + EPS)``: a flat image scores 1e-6 with gradient 0. Luma is that of ITU-R Rec.
    601, the variance that of the population of pixels. What lies in [0, 1] deviates by 0.5 at most (Popoviciu).
    """
    r_BHW, g_BHW, b_BHW = x_B3HW.unbind(dim=1)
    luma_BHW = 0.299 * r_BHW + 0.587 * g_BHW + 0.114 * b_BHW
    return (_variance(luma_BHW) + EPS).sqrt()


@REWARDS.register("colourfulness", Card(scale="0 to 1.17", value_range=(0.0, math.sqrt(1.25 * (1 + 0.3**2)))))
def colourfulness(x_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """How colourful, by Hasler and Suesstrunk, in [0, 1.17]; 0 is a gray image.

    ``sqrt(var_rg + var_yb + EPS) + 0.3 sqrt(mean_rg^2 + mean_yb^2 + EPS)``, from "Measuring colourfulness in natural
    images" (2003): opponent channels rg = R - G and yb = (R + G) / 2 - B, variances of the population of pixels. Theirs
    is of levels up to 255, ours of [0, 1], so that 255 times ours is theirs. The EPS keeps the gradient finite on one
    flat colour and on gray, which scores 1.3e-6.

    The range: rg^2 + yb^2 is convex, so greatest in a corner of the cube, 1.25 at red, green, cyan and magenta. Hence
    variances and squared means sum to 1.25 at most, and by Cauchy-Schwarz the score is at most sqrt(1.25 (1 + 0.3^2)),
    which a mix of red and cyan reaches.
    """
    r_BHW, g_BHW, b_BHW = x_B3HW.unbind(dim=1)
    opponents_B2HW = torch.stack([r_BHW - g_BHW, (r_BHW + g_BHW) / 2 - b_BHW], dim=1)
    deviation_B = (_variance(opponents_B2HW).sum(dim=1) + EPS).sqrt()
    return deviation_B + 0.3 * (opponents_B2HW.mean(dim=(2, 3)).square().sum(dim=1) + EPS).sqrt()


def _variance(x_HW: Tensor) -> Tensor:
    """Return the variance over the last two dimensions, of the population; ``Tensor.var`` warns at an empty batch."""
    return (x_HW - x_HW.mean(dim=(-2, -1), keepdim=True)).square().mean(dim=(-2, -1))
