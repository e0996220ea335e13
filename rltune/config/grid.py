"""Every combination of a space whose settings each have a few values, one at a time: there may be very many."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rltune.config.conditions import Space, active_values
from rltune.config.distributions import Choice, Distribution, IntRange, is_same
from rltune.config.yamlfile import Path


def is_countable(space: Mapping[Any, Distribution]) -> bool:
    """Whether every setting has values that can be counted."""
    return all(isinstance(distribution, Choice | IntRange) for distribution in space.values())


def combinations(space: Space) -> Iterator[dict[Path, Any]]:
    """Yield every combination of active values of a countable space, the last setting's varying fastest.

    Combinations that differ only in what is not active are one: the first of them, where all that is at its first
    value. So what is not active takes no other, and nothing has to be remembered of what was yielded before.
    """
    return _below(space, list(space), {}, ())


def _below(
    space: Space, left: Sequence[Path], values: Mapping[Path, Any], moved: tuple[Path, ...]
) -> Iterator[dict[Path, Any]]:
    """Yield the combinations that begin with ``values``; ``moved`` have a condition and are not at the first value."""
    if any(_is_off(space, path, values) for path in moved):
        return
    if not left:
        yield active_values(space, values)
        return
    path, *rest = left
    is_conditional = bool(space[path].when)
    for i, value in enumerate(_values(space[path])):
        if i and _is_off(space, path, values):
            return
        yield from _below(space, rest, {**values, path: value}, (*moved, path) if i and is_conditional else moved)


def _is_off(space: Space, path: Path, values: Mapping[Path, Any]) -> bool:
    """Whether ``path`` is not searched, whatever the settings become that have no value yet."""
    return any(
        _is_off(space, parent, values)
        or (parent in values and not any(is_same(values[parent], option) for option in options))
        for parent, options in space[path].when
    )


def _values(distribution: Distribution) -> Sequence[Any]:
    if isinstance(distribution, Choice):
        return distribution.options
    assert isinstance(distribution, IntRange)
    return range(distribution.low, distribution.high + 1, distribution.step)
