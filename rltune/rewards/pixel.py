"""Rewards of the pixels alone: no weights, no prompt, at once. For tests and smoke runs.

B: images in the batch. H, W: image rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rltune.rewards.base import REWARDS, check_batch


@REWARDS.register("smoothness")
@dataclass(frozen=True)
class Smoothness:
    """Minus total variation, in [-2, 0]; 0 is a flat image. Needs no weights."""

    is_differentiable: ClassVar[bool] = True
    value_range: ClassVar[tuple[float, float]] = (-2.0, 0.0)
    metric_unit: ClassVar[str] = ""

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, differentiable almost everywhere. Ignores what the prompts say."""
        check_batch(images_B3HW, prompts)
        x_B3HW = images_B3HW.float()
        return -(x_B3HW.diff(dim=-1).abs().mean(dim=(1, 2, 3)) + x_B3HW.diff(dim=-2).abs().mean(dim=(1, 2, 3)))

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score itself."""
        return self(images_B3HW, prompts)

    def to(self, device: torch.device) -> "Smoothness":
        """Return self; there is nothing to move."""
        return self


@REWARDS.register("brightness")
@dataclass(frozen=True)
class Brightness:
    """Mean of all channels, in [0, 1]; 1 is a white image. Its gradient is the same for every image."""

    is_differentiable: ClassVar[bool] = True
    value_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    metric_unit: ClassVar[str] = ""

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, linear in the images. Ignores what the prompts say."""
        check_batch(images_B3HW, prompts)
        return images_B3HW.float().mean(dim=(1, 2, 3))

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score itself."""
        return self(images_B3HW, prompts)

    def to(self, device: torch.device) -> "Brightness":
        """Return self; there is nothing to move."""
        return self
