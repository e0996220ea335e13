"""A reward of the user's own: ``module:name`` in an experiment.

B: images in the batch. H, W: image rows and columns.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rltune.errors import RunError, UserError, is_out_of_memory
from rltune.rewards.base import Card, Ready, Reward, Score, ScoreOf, check_batch, stated
from rltune.rewards.imports import load_object


class OwnReward:
    """A reward of the user's own, whose faults are told with its name.

    Args:
        name: What messages call it.
        reward: Made of the user's function, or of an instance of the user's class.
    """

    def __init__(self, name: str, reward: Reward) -> None:
        self._name, self._reward = name, reward
        self.is_differentiable, self.sees_group = reward.is_differentiable, reward.sees_group
        self.value_range, self.metric_unit = reward.value_range, reward.metric_unit

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32.

        Raises:
            RunError: As ``scored``.
        """
        return scored(self._name, self._reward, images_B3HW, prompts, is_differentiable=self.is_differentiable)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return what is reported; nothing learns from it.

        Raises:
            RunError: As ``scored``.
        """
        return scored(self._name, self._reward.metric, images_B3HW, prompts, is_differentiable=False)

    @property
    def features(self) -> Score | None:
        """The user's own."""
        return self._reward.features

    @property
    def score_of(self) -> ScoreOf | None:
        """The user's own."""
        return self._reward.score_of

    def to(self, device: torch.device) -> "OwnReward":
        """Move what the user's class moves to ``device`` and return the reward."""
        self._reward = self._reward.to(device)
        return self


def scored(name: str, read: Score, images_B3HW: Tensor, prompts: Sequence[str], *, is_differentiable: bool) -> Tensor:
    """Return what a user's code says of images, ``(B,)`` float32 on their device.

    Raises:
        RunError: It fails, or returns something else, or a number without gradient where it should have one.
    """
    check_batch(images_B3HW, prompts)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_differentiable):
            score_B = read(images_B3HW, list(prompts))
    except Exception as error:
        if is_out_of_memory(error):  # whoever called tries again with fewer images
            raise
        raise RunError(f"reward {name!r}: it failed with {type(error).__name__}: {error}") from error
    if not isinstance(score_B, Tensor) or score_B.shape != (len(prompts),):
        got = f"one of {tuple(score_B.shape)}" if isinstance(score_B, Tensor) else f"a {type(score_B).__name__}"
        raise RunError(f"reward {name!r}: must return a tensor of shape ({len(prompts)},), got {got}")
    is_wanted = torch.is_grad_enabled() and images_B3HW.requires_grad and is_differentiable
    if is_wanted and not score_B.requires_grad and len(prompts):
        raise RunError(
            f"reward {name!r}: its scores have no gradient; write it with torch operations on the images, or "
            "set the function's is_differentiable = False and take an estimator that needs none"
        )
    return score_B.to(images_B3HW.device).float()


def own_card(name: str, path: str) -> Card:
    """Return what a user's function or class states of itself; calls and builds nothing.

    Raises:
        UserError: It cannot be imported.
    """
    return stated(load_own(name, path), Card())


def load_own(name: str, path: str) -> Any:
    """Return the function or class that ``path``, ``module:name``, stands for.

    Raises:
        UserError: It cannot be imported, or is neither.
    """
    return load_object(name, path, option="reward")


def check_own(name: str, path: str, options: Mapping[str, Any]) -> None:
    """Check that a user's function or class can be called with ``options``; calls nothing.

    Raises:
        UserError: It cannot be imported, or does not take the options.
    """
    found = load_own(name, path)
    batch = () if isinstance(found, type) else (None, None)
    try:
        takes = inspect.signature(found)
    except ValueError:  # a few functions that are not written in Python have none
        return
    try:
        takes.bind(*batch, **options)
    except TypeError as error:
        what = f"{path}{takes} cannot be called with the options {dict(options)}: {error}"
        raise UserError(f"reward {name!r}: {what}") from error


def build_own(name: str, path: str, options: Mapping[str, Any]) -> Reward:
    """Return a user's reward: a class is built with ``options``, a function is given them at every call.

    Raises:
        UserError: It cannot be imported or built.
    """
    found = load_own(name, path)
    if not isinstance(found, type):
        return OwnReward(name, Ready(partial(found, **options), stated(found, Card())))
    try:
        built = found(**options)
    except Exception as error:
        what = f"{path} cannot be built: {type(error).__name__}: {error}"
        raise UserError(f"reward {name!r}: {what}; its options are {dict(options)}") from error
    if not callable(built):
        what = f"{path} must be called as a function of images and prompts is, and has no __call__"
        raise UserError(f"reward {name!r}: {what}")
    return OwnReward(name, Ready(built, Card()))
