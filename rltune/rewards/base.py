"""What a reward is: images and prompts to scores. Rewards know no sampler.

B: images in the batch. H, W: image rows and columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_type_hints, runtime_checkable

import torch
from torch import Tensor

from rltune.errors import UserError
from rltune.registry import Registry
from rltune.rewards.weights import WeightsFile

Builder = TypeVar("Builder", bound=Callable[..., Any])


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


@runtime_checkable
class HasFeatures(Protocol):
    """A reward that can say what it sees in an image, so that one can tell how far from its training data that is."""

    def features(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the last features ``(B, D)`` float32 that the score is read from."""
        ...


@dataclass(frozen=True)
class Card:
    """What is known of a reward without loading anything."""

    scale: str = ""
    """What its raw scores are like: ``about 1 to 10``."""
    licence: str = "Apache-2.0"
    """Of the weights."""
    weights: tuple[WeightsFile, ...] = ()
    """Published files that it needs; none if it needs no weights, or they ship with rltune."""
    is_shipped: bool = False
    """Whether it has weights that ship with rltune."""

    @property
    def has_licence(self) -> bool:
        """Whether there are weights that a licence is of."""
        return self.is_shipped or bool(self.weights)

    @property
    def size_mb(self) -> float:
        """All files together, 10^6 bytes."""
        return sum(file.size_mb for file in self.weights)

    @property
    def missing(self) -> tuple[WeightsFile, ...]:
        """Files that are not on this machine."""
        return tuple(file for file in self.weights if file.find() is None)


class RewardRegistry(Registry[Reward]):
    """Builders of rewards by name, with a card each.

    A builder takes keyword options, each with a default, and raises ``UserError`` for a wrong value. It is the reward's
    class, or a function annotated to return it: what the class says is known before weights are loaded.
    """

    def __init__(self) -> None:
        super().__init__("reward", "rltune.rewards")
        self._cards: dict[str, Card] = {}

    def register(self, name: str, card: Card | None = None) -> Callable[[Builder], Builder]:
        """Return a decorator that files a builder and its card under ``name``.

        Raises:
            ValueError: The name is taken by another builder, or a function does not say what it returns.
        """
        decorate = super().register(name)

        def decorate_with_card(builder: Builder) -> Builder:
            if not isinstance(builder, type) and "return" not in getattr(builder, "__annotations__", {}):
                raise ValueError(f"reward {name!r}: its builder must be annotated with the class that it returns")
            decorate(builder)
            self._cards[name] = card or Card()
            return builder

        return decorate_with_card

    def card(self, name: str) -> Card:
        """Return the card of ``name``.

        Raises:
            UnknownNameError: Nothing is registered under it; the message lists what is.
        """
        self.get(name)
        return self._cards[name]


REWARDS = RewardRegistry()


def has_gradient(name: str) -> bool:
    """Return whether a reward is differentiable; builds and loads nothing.

    Raises:
        UnknownNameError: Nothing is registered under ``name``.
    """
    return bool(_class_of(name).is_differentiable)


def compares_group(name: str) -> bool:
    """Return whether a reward compares the images of a prompt with one another; builds and loads nothing.

    Raises:
        UnknownNameError: Nothing is registered under ``name``.
    """
    return sees_group(_class_of(name))


def _class_of(name: str) -> Any:
    builder = REWARDS.get(name)
    return builder if isinstance(builder, type) else get_type_hints(builder)["return"]


def sees_group(reward: Any) -> bool:
    """Return whether an image's score depends on the other images of its prompt in the batch; most do not.

    Such a reward, or its class, says ``sees_group = True``. It is called with whole groups of a prompt.
    """
    return bool(getattr(reward, "sees_group", False))


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


def weights_file(reward: str, weights: str | None, shipped: Path, *, option: str = "weights") -> Path:
    """Return the file that an option names, or the one that ships.

    Raises:
        UserError: ``weights`` is not a path.
    """
    if weights is not None and not isinstance(weights, str):
        raise UserError(f"reward {reward!r}: {option} must be the path of a file, got {weights!r}")
    return Path(weights).expanduser() if weights else shipped
