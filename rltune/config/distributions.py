"""What may stand in place of a value, written as a mapping of one kind: ``{int: [1, 20]}``, perhaps with a ``when``."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rltune.registry import suggest

Scalar = str | int | float | bool | None
Candidate = tuple[str, Scalar]
"""Where in the distribution, ``int[1]``, and the value there."""
When = tuple[tuple[tuple[str, ...], tuple[Scalar, ...]], ...]
"""Paths of choices and the options one of which each must have taken; empty if a distribution stands always."""

KINDS = ("choice", "int", "float", "log_float", "simplex")
BESIDE = frozenset({"step", "when"})
"""Keys that may stand beside a kind."""
OTHER_NAMES = {
    "categorical": "choice",
    "choices": "choice",
    "grid": "choice",
    "values": "choice",
    "randint": "int",
    "integer": "int",
    "range": "int",
    "uniform": "float",
    "log_uniform": "log_float",
    "loguniform": "log_float",
    "log": "log_float",
    "dirichlet": "simplex",
}
"""What other tools call a kind."""
MAX_LISTED = 64
"""An integer range up to this size is validated value by value, of a longer one the ends and so many. That decides:
bounds hold in between if they hold at the ends, and no number that fits a sweep has 64 divisors at even distances."""


class DistributionError(ValueError):
    """A mapping that is no distribution: the key or item at fault, what is wrong with it and what would be right."""

    def __init__(self, key: tuple[str, ...], what: str, remedy: str) -> None:
        super().__init__(f"{what}; {remedy}")
        self.key, self.what, self.remedy = key, what, remedy


@dataclass(frozen=True)
class Choice:
    """One of ``options``."""

    options: tuple[Scalar, ...]
    when: When = field(default=(), kw_only=True)

    @property
    def first(self) -> Scalar:
        """The value the others are tried against."""
        return self.options[0]

    def corners(self) -> Iterator[Candidate]:
        """Yield every option."""
        for i, option in enumerate(self.options):
            yield f"choice[{i}]", option

    def inner(self) -> Iterator[Candidate]:
        """Yield nothing: every option is a corner."""
        yield from ()


@dataclass(frozen=True)
class IntRange:
    """A whole number in ``low, low + step, .., high``."""

    low: int
    high: int
    step: int = 1
    when: When = field(default=(), kw_only=True)

    @property
    def first(self) -> int:
        """The value the others are tried against."""
        return self.low

    def corners(self) -> Iterator[Candidate]:
        """Yield both ends."""
        yield "int[0]", self.low
        yield "int[1]", self.high

    def inner(self) -> Iterator[Candidate]:
        """Yield what lies between; of a long range the first values: they show whether all are multiples."""
        for value in range(self.low + self.step, self.high, self.step)[:MAX_LISTED]:
            yield "int", value


@dataclass(frozen=True)
class FloatRange:
    """A number in ``[low, high]``."""

    low: float
    high: float
    when: When = field(default=(), kw_only=True)

    @property
    def first(self) -> float:
        """The value the others are tried against: the middle, as an end (weight 0) is met with probability 0."""
        return (self.low + self.high) / 2

    def corners(self) -> Iterator[Candidate]:
        """Yield both ends."""
        yield "float[0]", self.low
        yield "float[1]", self.high

    def inner(self) -> Iterator[Candidate]:
        """Yield nothing: every bound is an interval, so the ends decide."""
        yield from ()


@dataclass(frozen=True)
class LogFloatRange:
    """A positive number in ``[low, high]``, uniform in its logarithm."""

    low: float
    high: float
    when: When = field(default=(), kw_only=True)

    @property
    def first(self) -> float:
        """The value the others are tried against: the geometric middle."""
        return math.sqrt(self.low) * math.sqrt(self.high)

    def corners(self) -> Iterator[Candidate]:
        """Yield both ends."""
        yield "log_float[0]", self.low
        yield "log_float[1]", self.high

    def inner(self) -> Iterator[Candidate]:
        """Yield nothing: every bound is an interval, so the ends decide."""
        yield from ()


@dataclass(frozen=True)
class Simplex:
    """A reward's weight; the weights of all rewards are not negative and sum to one."""

    when: When = field(default=(), init=False)
    """None: weights that come and go could not sum to one."""


Distribution = Choice | IntRange | FloatRange | LogFloatRange | Simplex


def show(value: Any) -> str:
    """Return ``value`` as a user would write it in YAML, cut to a line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(show(item) for item in value) + "]"
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def looks_like_distribution(value: Any) -> bool:
    """Return whether ``value`` is a mapping of one known kind, perhaps with a step and a condition."""
    return isinstance(value, Mapping) and len(set(value) - BESIDE) == 1 and bool(set(value) & set(KINDS))


def is_same(one: Any, other: Any) -> bool:
    """Whether two values of a choice are the same to a user: 1 and 1.0 are, 1 and true are not."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def is_in(value: Any, distribution: Distribution) -> bool:
    """Whether a distribution could give ``value``; of a weight on the simplex, as far as one alone can tell."""
    if isinstance(distribution, Choice):
        return any(is_same(value, option) for option in distribution.options)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(distribution, IntRange):
        reached = range(distribution.low, distribution.high + 1, distribution.step)
        return isinstance(value, int) and value in reached
    low, high = (0, 1) if isinstance(distribution, Simplex) else (distribution.low, distribution.high)
    return low <= value <= high


def in_words(distribution: Distribution) -> str:
    """Return what a distribution gives, for people: ``a whole number from 1 to 12``."""
    match distribution:
        case Choice(options=options):
            return "one of " + ", ".join(show(option) for option in options)
        case IntRange(low=low, high=high, step=step):
            return f"a whole number from {low} to {high}" + (f" in steps of {step}" if step > 1 else "")
        case Simplex():
            return "a number from 0 to 1"
        case _:
            return f"a number from {show(distribution.low)} to {show(distribution.high)}"


def parse_distribution(raw: Mapping[str, Any]) -> Distribution:
    """Return the distribution that ``raw`` describes.

    Raises:
        DistributionError: It describes none.
    """
    kinds = [key for key in raw if key not in BESIDE]
    if not kinds and "when" in raw:
        remedy = "write what is searched there too, such as {int: [1, 12], when: ..}"
        raise DistributionError(("when",), f"a condition needs a distribution beside it, got {show(raw)}", remedy)
    if len(kinds) != 1:
        what = f"a distribution has one kind, got {show(raw)}"
        raise DistributionError((), what, "write one of " + ", ".join(f"{{{kind}: ..}}" for kind in KINDS))
    kind, value = kinds[0], raw[kinds[0]]
    if kind not in KINDS:
        other = OTHER_NAMES.get(kind.lower())
        advice = f"did you mean {other!r}? known: {', '.join(KINDS)}" if other else suggest(kind, KINDS)
        raise DistributionError((kind,), f"unknown distribution, got {show(raw)}", advice)
    if "step" in raw and kind != "int":
        raise DistributionError(("step",), f"only int takes a step, got {show(raw)}", "delete it")
    if kind == "simplex":
        if value is not True:
            raise DistributionError((kind,), f"must be true, got {show(value)}", "write {simplex: true}")
        if "when" in raw:
            what = f"weights on the simplex are searched together or not at all, got {show(raw['when'])}"
            raise DistributionError(("when",), what, "delete it")
        return Simplex()
    distribution = _choice(value) if kind == "choice" else _range(kind, value, raw)
    return replace(distribution, when=_when(raw["when"])) if "when" in raw else distribution


def _range(kind: str, value: Any, raw: Mapping[str, Any]) -> IntRange | FloatRange | LogFloatRange:
    low, high = _bounds(kind, value)
    if kind == "int":
        return _int_range(low, high, raw.get("step", 1))
    if kind == "float":
        return FloatRange(float(low), float(high))
    if low <= 0:
        raise DistributionError((kind, "0"), f"must be above 0, got {show(low)}", "a logarithm needs it; or use float")
    return LogFloatRange(float(low), float(high))


def _when(value: Any) -> When:
    remedy = "write when: {estimator.name: [alignprop, draft]}"
    if not isinstance(value, Mapping) or not value:
        what = f"must be a mapping of searched choices to the options it is searched at, got {show(value)}"
        raise DistributionError(("when",), what, remedy)
    conditions = []
    for path, options in value.items():
        listed = options if isinstance(options, list) else [options]
        if not listed or any(isinstance(option, list | Mapping) for option in listed):
            raise DistributionError(("when",), f"{path} must be given an option or a list, got {show(options)}", remedy)
        conditions.append((tuple(path.split(".")), tuple(listed)))
    return tuple(conditions)


def _choice(value: Any) -> Choice:
    if not isinstance(value, list) or not value:
        raise DistributionError(
            ("choice",), f"must be a list of at least one value, got {show(value)}", "write {choice: [a, b]}"
        )
    for i, option in enumerate(value):
        if isinstance(option, list | Mapping):
            remedy = "a choice is between text, numbers, true and false"
            raise DistributionError(("choice", str(i)), f"must be a single value, got {show(option)}", remedy)
        if any(type(option) is type(earlier) and option == earlier for earlier in value[:i]):
            raise DistributionError(("choice", str(i)), f"stands here twice, got {show(option)}", "delete one")
    return Choice(tuple(value))


def _bounds(kind: str, value: Any) -> tuple[Any, Any]:
    noun = "whole number" if kind == "int" else "number"
    remedy = f"write {{{kind}: [low, high]}}"
    if not isinstance(value, list) or len(value) != 2:
        raise DistributionError((kind,), f"must be a list of two {noun}s, got {show(value)}", remedy)
    for i, bound in enumerate(value):
        is_number = isinstance(bound, int if kind == "int" else int | float) and not isinstance(bound, bool)
        if not is_number or not math.isfinite(bound):
            raise DistributionError((kind, str(i)), f"must be a {noun}, got {show(bound)}", remedy)
    if value[0] >= value[1]:
        advice = "swap them" if value[0] > value[1] else f"write the value itself: {show(value[0])}"
        raise DistributionError((kind,), f"low must be below high, got {show(value)}", advice)
    return value[0], value[1]


def _int_range(low: int, high: int, step: Any) -> IntRange:
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        raise DistributionError(("step",), f"must be a whole number, at least 1, got {show(step)}", "or leave it out")
    if (high - low) % step:
        reached = high - (high - low) % step
        what = f"steps of {step} from {low} miss the high end, got {high}"
        raise DistributionError(("int", "1"), what, f"write {reached if reached > low else low + step}")
    return IntRange(low, high, step)
