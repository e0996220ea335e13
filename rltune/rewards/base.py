"""What a reward is: images and prompts to scores. Rewards know no sampler.

Whoever writes one writes a function of images and prompts, or a small class that is called so, and a card that says
what is known of it. Everybody else sees a ``Reward``, which the registry makes of the two.

B: images in the batch. D: features. H, W: image rows and columns.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from rltune.errors import UserError
from rltune.registry import Option, Registry
from rltune.rewards.weights import WeightsFile

Builder = TypeVar("Builder", bound=Callable[..., Any])
Score = Callable[[Tensor, Sequence[str]], Tensor]
"""What the author of a reward writes: RGB in [0, 1], ``(B, 3, H, W)`` float32 with B >= 1, and a prompt each ->
``(B,)`` float32, larger is better; row i depends on image i alone, unless the card says ``sees_group``."""


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
    value_range: tuple[float, float] = (-math.inf, math.inf)
    """Least and greatest raw score it can give."""
    metric_unit: str = ""
    """Unit of what is reported, for tables; empty for a bare number."""
    is_differentiable: bool = True
    """Whether the score has a useful gradient with respect to the images."""
    needs_canvas: bool = False
    """Whether it looks at the picture that a prompt comes with (``rltune.canvas``): for ``task: inpaint`` alone."""
    sees_group: bool = False
    """Whether an image's score depends on the others of its prompt in the batch, all of which it is called with."""

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


STATED = ("is_differentiable", "sees_group", "value_range", "metric_unit")
"""What a function, a class or an instance may state itself, by an attribute; it goes before the card."""


def stated(found: Any, card: Card) -> Card:
    """Return the card with what a function, a class or an instance states itself."""
    said = {name: getattr(found, name) for name in STATED if hasattr(found, name)}
    # what a class works out for each instance, by a property, is not known of the class
    return replace(card, **{name: value for name, value in said.items() if not hasattr(value, "__get__")})


class Reward(Protocol):
    """A score of images, in its own raw scale, larger is better; everything that others ask of it.

    A caller's batch that is not ``(B, 3, H, W)`` floating point, or that has not one prompt an image, is a
    ``ValueError`` (``check_batch``). An empty batch gives an empty score.
    """

    @property
    def is_differentiable(self) -> bool:
        """As ``Card`` has it, and so the next three."""
        ...

    @property
    def sees_group(self) -> bool:
        """Whether the images of a prompt are compared."""
        ...

    @property
    def value_range(self) -> tuple[float, float]:
        """Least and greatest raw score."""
        ...

    @property
    def metric_unit(self) -> str:
        """Unit of ``metric``."""
        ...

    @property
    def features(self) -> Score | None:
        """What it sees in images, ``(B, D)`` float32 from which the score is read; None if it does not say."""
        ...

    @property
    def score_of(self) -> "ScoreOf | None":
        """From what is reported to the score; None if the two are in one unit."""
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


class ScoreOf(Protocol):
    """From the unit that a reward is reported in to that of its score."""

    def __call__(self, metric: float, *, num_pixels: int) -> float:
        """Return the score of images of ``num_pixels`` that are reported with ``metric``; rises with it.

        Raises:
            UserError: No image has it, or the score does not say what the metric is.
        """
        ...


class Ready:
    """A ``Reward`` made of what its author wrote; what was left out is filled in here, and nowhere else.

    Args:
        score: A function of images and prompts, or an object that is called so. The object may have ``metric``,
            ``features`` and ``score_of`` as ``Reward`` has them; one that holds weights has ``to(device)``, which moves
            them and may return the object, or another in its place.
        card: What is known of it; what ``score`` states itself goes before.
    """

    def __init__(self, score: Score, card: Card) -> None:
        self._score = score
        known = stated(score, card)
        self.is_differentiable, self.sees_group = bool(known.is_differentiable), bool(known.sees_group)
        self.value_range, self.metric_unit = known.value_range, known.metric_unit

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32."""
        return _scores(self._score, images_B3HW, prompts)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the author's metric, or the score itself."""
        return _scores(self._part("metric") or self._score, images_B3HW, prompts)

    @property
    def features(self) -> Score | None:
        """The author's features, if any."""
        read: Score | None = self._part("features")
        return None if read is None else partial(_features, read)

    @property
    def score_of(self) -> ScoreOf | None:
        """The author's way from metric to score, if any."""
        convert: ScoreOf | None = self._part("score_of")
        return convert

    def to(self, device: torch.device) -> "Ready":
        """Move what is to be moved to ``device`` and return the reward."""
        move = self._part("to")
        moved = None if move is None else move(device)
        self._score = self._score if moved is None else moved
        return self

    def _part(self, name: str) -> Any:
        return getattr(self._score, name, None)


def _scores(read: Score, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    check_batch(images_B3HW, prompts)
    if not prompts:
        return images_B3HW.new_zeros(0, dtype=torch.float32)
    return read(images_B3HW.float(), prompts)


def _features(read: Score, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    check_batch(images_B3HW, prompts)
    return read(images_B3HW.float(), prompts)


class RewardRegistry(Registry[Any]):
    """Rewards by name, with a card each.

    What is registered is the reward itself, a function ``(images, prompts, *, options)``; or, where something is loaded
    or checked first, a class, or a function of options alone that returns the reward. Every option has a default; a
    wrong value is a ``UserError``.
    """

    def __init__(self) -> None:
        super().__init__("reward", "rltune.rewards")
        self._cards: dict[str, Card] = {}

    def register(self, name: str, card: Card | None = None) -> Callable[[Builder], Builder]:
        """Return a decorator that files a reward and its card under ``name``.

        Raises:
            ValueError: The name is taken, or something else is taken than images and prompts, or neither, and options.
        """
        decorate = super().register(name)

        def decorate_with_card(builder: Builder) -> Builder:
            if any(_required(builder)[2 if _is_score(builder) else 0 :]):
                raise ValueError(
                    f"reward {name!r}: must take images and prompts, or neither, and options with a default each"
                )
            decorate(builder)
            self._cards[name] = card or Card()
            return builder

        return decorate_with_card

    def card(self, name: str) -> Card:
        """Return the card of ``name``, with what a registered function or class states itself.

        Raises:
            UnknownNameError: Nothing is registered under it; the message lists what is.
        """
        return stated(self.get(name), self._cards.get(name, Card()))

    def options(self, name: str) -> tuple[Option, ...]:
        """Return what ``name`` takes by keyword: of a function that scores, all but images and prompts."""
        return super().options(name)[2 if _is_score(self.get(name)) else 0 :]

    def build(self, name: str, options: Mapping[str, Any]) -> Reward:
        """Return the reward that ``name`` stands for, with ``options``.

        Raises:
            UserError: The name or an option is unknown, or a value is refused.
            ValueError: What was built says otherwise of itself than what was known before.
        """
        self.check(name, options)
        builder, card = self.get(name), self.card(name)
        reward = Ready(partial(builder, **options) if _is_score(builder) else builder(**options), card)
        for fact in ("is_differentiable", "sees_group"):
            if getattr(reward, fact) != bool(getattr(card, fact)):
                raise ValueError(
                    f"reward {name!r}: it has {fact} = {getattr(reward, fact)}, and its card says otherwise"
                )
        return reward


def _is_score(builder: Callable[..., Any]) -> bool:
    """Whether this is the reward itself, and not what builds it."""
    return not isinstance(builder, type) and _required(builder)[:2] == [True, True]


def _required(builder: Callable[..., Any]) -> list[bool]:
    """Whether each thing that it takes must be given."""
    return [option.default is option.empty for option in inspect.signature(builder).parameters.values()]


REWARDS = RewardRegistry()


def has_gradient(name: str) -> bool:
    """Return whether a reward is differentiable; builds and loads nothing.

    Raises:
        UnknownNameError: Nothing is registered under ``name``.
    """
    return bool(REWARDS.card(name).is_differentiable)


def compares_group(name: str) -> bool:
    """Return whether a reward compares the images of a prompt with one another; builds and loads nothing.

    Raises:
        UnknownNameError: Nothing is registered under ``name``.
    """
    return bool(REWARDS.card(name).sees_group)


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
