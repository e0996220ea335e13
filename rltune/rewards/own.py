"""A reward of the user's own: ``module:name`` in an experiment.

B: images in the batch. H, W: image rows and columns.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rltune.errors import RunError, UserError
from rltune.rewards.base import Reward, check_batch, sees_group
from rltune.rewards.loading import load_object


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
        self._name, self._function, self._options = name, function, dict(options)
        self.is_differentiable = has_own_gradient(function)
        self.sees_group = sees_group(function)

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32.

        Raises:
            RunError: The function fails, or returns something else, or a number without gradient where it should have
                one.
        """
        check_batch(images_B3HW, prompts)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_differentiable):
                score_B = self._function(images_B3HW, list(prompts), **self._options)
        except Exception as error:
            raise RunError(f"reward {self._name!r}: it failed with {type(error).__name__}: {error}") from error
        if not isinstance(score_B, Tensor) or score_B.shape != (len(prompts),):
            got = tuple(score_B.shape) if isinstance(score_B, Tensor) else type(score_B).__name__
            raise RunError(f"reward {self._name!r}: must return a tensor of shape ({len(prompts)},), got {got}")
        is_wanted = torch.is_grad_enabled() and images_B3HW.requires_grad and self.is_differentiable
        if is_wanted and not score_B.requires_grad and len(prompts):
            raise RunError(
                f"reward {self._name!r}: its scores have no gradient; write it with torch operations on the images, or "
                "set the function's is_differentiable = False and take an estimator that needs none"
            )
        return score_B.to(images_B3HW.device).float()

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score itself."""
        return self(images_B3HW, prompts)

    def to(self, device: torch.device) -> "OwnReward":
        """Return self; the function finds the images on the device that they are on."""
        return self


def has_own_gradient(found: Any) -> bool:
    """Return whether a user's function or class counts as differentiable: unless it says otherwise."""
    return bool(getattr(found, "is_differentiable", True))


def load_own(name: str, path: str) -> Any:
    """Return the function or class that ``path``, ``module:name``, stands for.

    Raises:
        UserError: It cannot be imported, or is neither.
    """
    return load_object(name, path, option="reward")


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
    except (TypeError, ValueError) as error:
        raise UserError(f"reward {name!r}: {path}: {error}; its options are {dict(options)}") from error
    missing = [part for part in REQUIRED if not hasattr(built, part)]
    if missing:
        raise UserError(f"reward {name!r}: {path} lacks {', '.join(missing)}; see rltune.rewards.base.Reward")
    return cast(Reward, built)


REQUIRED = ("__call__", "metric", "to", "is_differentiable", "value_range", "metric_unit")
