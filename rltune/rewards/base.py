"""What a reward is: images and prompts to scores. Rewards know no sampler.

B: images in the batch. H, W: image rows and columns.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rltune.registry import Registry


class Reward(Protocol):
    """A score of images, in its own raw scale, larger is better.

    Attributes:
        is_differentiable: Whether the score has a useful gradient with respect to the images.
        value_range: Least and greatest raw score it can give (``inf`` where unbounded).
        metric_unit: Unit of ``metric`` for tables, ``""`` for a bare number.
    """

    is_differentiable: bool
    value_range: tuple[float, float]
    metric_unit: str

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


class RewardBuilder(Protocol):
    """Builds a reward from the ``options`` of an experiment; raises ``UserError`` for a wrong or missing one."""

    def __call__(self, **options: Any) -> Reward: ...


REWARDS: Registry[RewardBuilder] = Registry("reward", "rltune.rewards")
