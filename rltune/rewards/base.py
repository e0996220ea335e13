"""What a reward is: images and prompts to scores. Rewards know no sampler.

B: images in the batch. H, W: image rows and columns.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import torch
from torch import Tensor

from rltune.errors import UserError
from rltune.registry import Registry


class Reward(Protocol):
    """A score of images, in its own raw scale, larger is better.

    A caller's batch that is not ``(B, 3, H, W)`` floating point, or that has not one prompt an image, is a
    ``ValueError`` (``check_batch``). An empty batch gives an empty score.
    """

    @property
    def is_differentiable(self) -> bool:
        """Whether the score has a useful gradient with respect to the images."""
        ...

    @property
    def value_range(self) -> tuple[float, float]:
        """Least and greatest raw score it can give (``inf`` where unbounded)."""
        ...

    @property
    def metric_unit(self) -> str:
        """Unit of ``metric`` for tables, ``""`` for a bare number."""
        ...

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, differentiable in the images; row i depends on image i alone."""
        ...

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """The number to report and to search over -> ``(B,)`` float32, larger is better.

        The same as calling the reward, unless the trained signal is a differentiable stand-in for it.
        """
        ...

    def to(self, device: torch.device) -> "Reward":
        """Move frozen weights to ``device`` and return the reward."""
        ...


REWARDS: Registry[Reward] = Registry("reward", "rltune.rewards")
"""Built from keyword options, each with a default; a builder raises ``UserError`` for a wrong value.

It is the reward's class, or a function annotated to return it: what the class says is known before weights are loaded.
"""


def has_gradient(name: str) -> bool:
    """Return whether a reward is differentiable; builds and loads nothing.

    Raises:
        UnknownNameError: Nothing is registered under ``name``.
    """
    builder = REWARDS.get(name)
    kind: Any = builder if isinstance(builder, type) else get_type_hints(builder)["return"]
    return bool(kind.is_differentiable)


def check_batch(images_B3HW: Tensor, prompts: Sequence[str]) -> None:
    """Check what every reward is called with; the values are not looked at, since that would wait for the device.

    Raises:
        ValueError: The images are not ``(B, 3, H, W)`` floating point, or there is not one prompt an image.
    """
    if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3 or not images_B3HW.is_floating_point():
        shape = tuple(images_B3HW.shape)
        raise ValueError(f"images must be (B, 3, H, W) floating point in [0, 1], got {shape} {images_B3HW.dtype}")
    if isinstance(prompts, str) or len(prompts) != images_B3HW.shape[0]:
        got = repr(prompts) if isinstance(prompts, str) else len(prompts)
        raise ValueError(f"prompts must be one an image ({images_B3HW.shape[0]}), got {got}")


def weights_file(reward: str, weights: str | None, shipped: Path) -> Path:
    """Return the file that the option ``weights`` names, or the one that ships.

    Raises:
        UserError: ``weights`` is not a path.
    """
    if weights is not None and not isinstance(weights, str):
        raise UserError(f"reward {reward!r}: weights must be the path of a file, got {weights!r}")
    return Path(weights).expanduser() if weights else shipped
