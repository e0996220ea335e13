"""How far a reward can be trusted on an image: by the distance of its features from those it was trained on.

N: reference images. B: images in the batch. D: width of the features.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rltune.errors import UserError

FEATURES = "features"
"""Name of the tensor in a file of reference features."""
RIDGE = 0.01
"""Of the mean variance of the features, added to each direction: few references leave some unseen."""


@dataclass(frozen=True)
class Trust:
    """The weight of a sample in the loss: larger where the reward knows what it sees.

    PrefPaint (arXiv:2410.21966, section 3.3) weighs with ``clamp(exp(-0.05 * ||z||_V^-1 + 0.7), 1, 2.21)``, the width
    of a linear bandit's confidence set. We divide the distance by the root mean square of the references' own, so that
    1 is an image like those, whatever the reward and the number of references; hence a slope of our own.

    Args:
        inverse_DD: Inverse of the references' second moment, plus ridge.
        unit: Root mean square distance of the references.
        slope: How fast trust falls off with the distance.
        offset: Logarithm of the weight at distance 0.
        ceiling: Greatest weight; the least is 1.
    """

    inverse_DD: Tensor
    unit: float
    slope: float = 0.7
    offset: float = 1.4
    ceiling: float = 2.21

    def distance(self, features_BD: Tensor) -> Tensor:
        """Return the distance of each image from the references, ``(B,)`` float32; 1 is an image like those."""
        inverse_DD = self.inverse_DD.to(features_BD)
        squared_B = ((features_BD @ inverse_DD) * features_BD).sum(dim=1)
        return squared_B.clamp(min=0).sqrt() / self.unit

    def __call__(self, features_BD: Tensor) -> Tensor:
        """Return the weight of each image, ``(B,)`` float32 in [1, ceiling]; a constant, it passes no gradient."""
        exponent_B = self.offset - self.slope * self.distance(features_BD.detach())
        return exponent_B.exp().clamp(1.0, self.ceiling)


def fit_trust(features_ND: Tensor, *, slope: float = 0.7, offset: float = 1.4, ceiling: float = 2.21) -> Trust:
    """Return the trust in a reward that was trained on images with these features.

    Raises:
        ValueError: There are no features, or they are not finite, or all zero.
    """
    z_ND = features_ND.double()
    if z_ND.ndim != 2 or z_ND.shape[0] == 0 or not bool(z_ND.isfinite().all()) or not bool(z_ND.any()):
        raise ValueError(f"features must be (N, D), N >= 1, finite and not all zero, got {tuple(features_ND.shape)}")
    moment_DD = z_ND.T @ z_ND / z_ND.shape[0]
    width = moment_DD.shape[0]
    moment_DD = moment_DD + RIDGE * moment_DD.trace() / width * torch.eye(width, dtype=moment_DD.dtype)
    inverse_DD = torch.linalg.inv(moment_DD)
    unit = float(((z_ND @ inverse_DD) * z_ND).sum(dim=1).mean().sqrt())
    return Trust(inverse_DD.float(), unit, slope=slope, offset=offset, ceiling=ceiling)


def read_features(path: Path) -> Tensor:
    """Return reference features ``(N, D)`` float32 from a safetensors file with a tensor ``features``.

    Raises:
        UserError: There is no such file, or it is another kind of file.
    """
    try:
        features_ND: Tensor = load_file(path)[FEATURES]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"trust: {path} is not a safetensors file with a tensor {FEATURES!r} (N, D) in it ({error}); "
            "write one with safetensors.torch.save_file, or give a folder of images"
        ) from error
    if features_ND.ndim != 2 or features_ND.shape[0] == 0:
        raise UserError(f"trust: {path}: {FEATURES!r} must be (N, D), got {tuple(features_ND.shape)}")
    return features_ND.float()
