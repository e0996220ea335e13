"""Rewards made of rewards: turned round, relative to words, scored in smaller batches or on another device.

B: images in the batch. D: features. H, W: image rows and columns.
"""

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from rltune.errors import UserError
from rltune.rewards.base import Reward, Score, ScoreOf, check_batch
from rltune.rewards.clip import embeddings_kept
from rltune.rewards.scale import score_of

logger = logging.getLogger(__name__)


class Negate:
    """Minus a reward: what raised it now lowers it. Its metric is turned round too."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.is_differentiable, self.sees_group = reward.is_differentiable, reward.sees_group
        self.metric_unit = reward.metric_unit
        low, high = reward.value_range
        self.value_range = (-high, -low)

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, differentiable where the reward is."""
        return -self._reward(images_B3HW, prompts)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return minus the reward's metric."""
        return -self._reward.metric(images_B3HW, prompts)

    @property
    def features(self) -> Score | None:
        """The reward's own."""
        return self._reward.features

    @property
    def score_of(self) -> ScoreOf | None:
        """Minus the score of minus the metric."""
        return None if self._reward.score_of is None else self._score_of

    def _score_of(self, metric: float, *, num_pixels: int) -> float:
        return -score_of(self._reward, -metric, num_pixels=num_pixels)

    def to(self, device: torch.device) -> "Negate":
        """Move the reward to ``device`` and return the wrapper."""
        self._reward = self._reward.to(device)
        return self


class Relative:
    """``(1 + k) * r(image, positive + prompt) - r(image, negative + prompt)``: better than what it should not be.

    The semantic relative preference of SRPO (arXiv:2509.06942, section 3.2): what the reward likes about every image,
    such as saturated colours, is in both terms and cancels. Of a reward that does not read the prompt nothing is left
    at k = 0.

    Args:
        reward: Scores an image for a prompt.
        positive: Control words put before the prompt, as in ``Realistic photo``.
        negative: Control words of what to move away from.
        k: Extra weight of the positive term.
    """

    def __init__(self, reward: Reward, *, positive: str, negative: str, k: float = 0.0) -> None:
        self._reward, self._positive, self._negative, self._k = reward, positive, negative, k
        self.is_differentiable, self.sees_group = reward.is_differentiable, reward.sees_group
        self.metric_unit = reward.metric_unit
        low, high = reward.value_range
        self.value_range = ((1 + k) * low - high, (1 + k) * high - low)

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, differentiable where the reward is."""
        return self._difference(self._reward, images_B3HW, prompts)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the same difference of the reward's metric."""
        return self._difference(self._reward.metric, images_B3HW, prompts)

    @property
    def features(self) -> Score | None:
        """The reward's own."""
        return self._reward.features

    @property
    def score_of(self) -> ScoreOf | None:
        """Refuses where the reward is reported in another unit, in which a difference says nothing of the score's."""
        return None if self._reward.score_of is None else self._score_of

    def _score_of(self, metric: float, *, num_pixels: int) -> float:
        raise UserError("a relative reward that is reported in another unit than it is scored in takes no target")

    def to(self, device: torch.device) -> "Relative":
        """Move the reward to ``device`` and return the wrapper."""
        self._reward = self._reward.to(device)
        return self

    def _difference(self, read: Score, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        check_batch(images_B3HW, prompts)
        positive_B = read(images_B3HW, [f"{self._positive}. {prompt}" for prompt in prompts])
        negative_B = read(images_B3HW, [f"{self._negative}. {prompt}" for prompt in prompts])
        return (1 + self._k) * positive_B - negative_B


class Frugal:
    """A reward scored a few images at a time, in as many as the memory holds.

    Where the images carry gradient, each part is computed again in the backward pass, so that one part's activations
    are in memory at a time. Without ``micro_batch`` all images are scored at once until the device is out of memory;
    then the part is halved, once and for all.

    Args:
        reward: Whose row i depends on image i alone.
        name: What messages call it.
        micro_batch: Images at a time.
    """

    def __init__(self, reward: Reward, *, name: str, micro_batch: int | None = None) -> None:
        self._reward, self._name, self._size = reward, name, micro_batch
        self.is_differentiable, self.sees_group = reward.is_differentiable, reward.sees_group
        self.value_range, self.metric_unit = reward.value_range, reward.metric_unit

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, differentiable where the reward is."""
        return self._in_parts(self._reward, images_B3HW, prompts)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the reward's metric."""
        return self._in_parts(self._reward.metric, images_B3HW, prompts)

    @property
    def features(self) -> Score | None:
        """The reward's own, in parts."""
        return None if self._reward.features is None else partial(self._in_parts, self._reward.features)

    @property
    def score_of(self) -> ScoreOf | None:
        """The reward's own."""
        return self._reward.score_of

    def to(self, device: torch.device) -> "Frugal":
        """Move the reward to ``device`` and return the wrapper."""
        self._reward = self._reward.to(device)
        return self

    def _in_parts(self, read: Score, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        while True:
            size = min(self._size or len(prompts), len(prompts))
            try:
                return _parts(read, images_B3HW, prompts, size)
            except torch.OutOfMemoryError:
                if size <= 1:  # one image does not fit
                    raise
            self._size = size // 2  # out of the handler, whose traceback holds what filled the memory
            logger.warning(
                "reward %r: out of memory with %d images, going on with %d at a time", self._name, size, self._size
            )


class Elsewhere:
    """A reward that runs on a device of its own; images come to it, and scores and gradients go back to theirs.

    Args:
        reward: Moved to ``device``, where it stays.
        device: Another than the images'.
    """

    def __init__(self, reward: Reward, device: torch.device) -> None:
        self._reward, self._device = reward.to(device), device
        self.is_differentiable, self.sees_group = reward.is_differentiable, reward.sees_group
        self.value_range, self.metric_unit = reward.value_range, reward.metric_unit

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32 where the images are, differentiable where the reward is."""
        return self._there(self._reward, images_B3HW, prompts)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the reward's metric."""
        return self._there(self._reward.metric, images_B3HW, prompts)

    @property
    def features(self) -> Score | None:
        """The reward's own."""
        return None if self._reward.features is None else partial(self._there, self._reward.features)

    @property
    def score_of(self) -> ScoreOf | None:
        """The reward's own."""
        return self._reward.score_of

    def to(self, device: torch.device) -> "Elsewhere":
        """Stay."""
        return self

    def _there(self, read: Score, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return read(images_B3HW.to(self._device), prompts).to(images_B3HW.device)


def _parts(read: Score, images_B3HW: Tensor, prompts: Sequence[str], size: int) -> Tensor:
    check_batch(images_B3HW, prompts)
    if len(prompts) <= size:
        return read(images_B3HW, prompts)

    def read_part(part_B3HW: Tensor, part: Sequence[str]) -> Tensor:
        with embeddings_kept():  # of this part alone: computed again, it must find and keep what it did at first
            return read(part_B3HW, part)

    parts: list[Tensor] = []
    for start in range(0, len(prompts), size):
        part_B3HW, part = images_B3HW[start : start + size], prompts[start : start + size]
        if part_B3HW.requires_grad and torch.is_grad_enabled():
            # PyTorch stops a second pass early by an exception, which a user's reward may catch
            with set_checkpoint_early_stop(False):
                parts.append(checkpoint(read_part, part_B3HW, part, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(read_part(part_B3HW, part))
    return torch.cat(parts)


def features_of(reward: Reward, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return what a reward sees in images, ``(B, D)`` float32.

    Raises:
        UserError: It does not say.
    """
    if reward.features is None:
        raise UserError("the reward has no features to measure trust by; leave `trust` out")
    return reward.features(images_B3HW, prompts)
