"""A reward of the user's own: ``module:name`` in an experiment.

B: images in the batch. H, W: image rows and columns.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from rltune.errors import RunError, UserError, is_out_of_memory
from rltune.rewards.base import Reward, check_batch, sees_group
from rltune.rewards.imports import load_object
from rltune.rewards.wrappers import features_of


class OwnReward:
    """A function ``(images_B3HW, prompts) -> (B,)`` of RGB in [0, 1] as a reward.

    It counts as differentiable unless it says otherwise with an attribute ``is_differentiable = False``, and then is
    called without gradient.

    Args:
        name: What messages call it.
        function: The function; ``options`` are given to it by keyword.
        options: Of this experiment.
    """

    value_range = (-math.inf, math.inf)
    metric_unit = ""

    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._name, self._function = name, partial(function, **options)
        self.is_differentiable = has_own_gradient(function)
        self.sees_group = sees_group(function)

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32.

        Raises:
            RunError: As ``scored``.
        """
        return scored(self._name, self._function, images_B3HW, prompts, is_differentiable=self.is_differentiable)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score itself."""
        return self(images_B3HW, prompts)

    def to(self, device: torch.device) -> "OwnReward":
        """Return self; the function finds the images on the device that they are on."""
        return self


class ObjectReward:
    """An instance of a user's class, which is a reward but for its faults: those are told as a function's are.

    Args:
        name: What messages call it.
        reward: The instance.
    """

    def __init__(self, name: str, reward: Reward) -> None:
        self._name, self._reward = name, reward
        self.is_differentiable = has_own_gradient(reward)
        self.sees_group = sees_group(reward)
        self.value_range = reward.value_range
        self.metric_unit = reward.metric_unit

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32.

        Raises:
            RunError: As ``scored``.
        """
        return scored(self._name, self._reward, images_B3HW, prompts, is_differentiable=self.is_differentiable)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return what the instance reports; nothing learns from it.

        Raises:
            RunError: As ``scored``.
        """
        return scored(self._name, self._reward.metric, images_B3HW, prompts, is_differentiable=False)

    def features(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the instance's features, if it has any."""
        return features_of(self._reward, images_B3HW, prompts)

    def to(self, device: torch.device) -> "ObjectReward":
        """Move the instance to ``device`` and return the wrapper."""
        self._reward = self._reward.to(device) or self._reward  # a method that moves in place returns nothing
        return self


def scored(
    name: str,
    read: Callable[[Tensor, Sequence[str]], Any],
    images_B3HW: Tensor,
    prompts: Sequence[str],
    *,
    is_differentiable: bool,
) -> Tensor:
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


def has_own_gradient(found: Any) -> bool:
    """Return whether a user's function or class counts as differentiable: unless it says otherwise."""
    return bool(getattr(found, "is_differentiable", True))


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
        return OwnReward(name, found, options)
    try:
        built = found(**options)
    except Exception as error:
        what = f"{path} cannot be built: {type(error).__name__}: {error}"
        raise UserError(f"reward {name!r}: {what}; its options are {dict(options)}") from error
    missing = [part for part in REQUIRED if not hasattr(built, part)]
    if missing:
        raise UserError(f"reward {name!r}: {path} lacks {', '.join(missing)}; see rltune.rewards.base.Reward")
    return ObjectReward(name, cast(Reward, built))


REQUIRED = ("__call__", "metric", "to", "is_differentiable", "value_range", "metric_unit")
