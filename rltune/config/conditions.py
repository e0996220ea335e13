"""Distributions that are searched only where a choice has taken certain options: order, what is active, what is wrong.

A condition names choices, all of which must be active and have taken one of its options. Conditions may form chains.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from rltune.config.distributions import Choice, Distribution, Scalar, Simplex, in_words, is_same, show
from rltune.config.yamlfile import Path
from rltune.registry import suggest

Space = Mapping[Path, Distribution]


def first_values(space: Space) -> dict[Path, Any]:
    """Return each distribution's first value, conditions aside; equal weights on the simplex."""
    num_simplex = sum(isinstance(distribution, Simplex) for distribution in space.values())
    return {path: 1 / num_simplex if isinstance(dist, Simplex) else dist.first for path, dist in space.items()}


def ancestors(space: Space, path: Path) -> list[Path]:
    """Return the choices that decide whether ``path`` is searched, and those that decide about them."""
    found: dict[Path, None] = {}
    waiting = [path]
    while waiting:
        for parent, _ in space[waiting.pop()].when:
            if parent in space and parent not in found:
                found[parent] = None
                waiting.append(parent)
    return list(found)


def is_active(space: Space, path: Path, values: Mapping[Path, Any]) -> bool:
    """Whether ``path`` is searched where the choices have these values; what is not among them holds nothing."""
    return all(
        parent in space
        and parent in values
        and any(is_same(values[parent], option) for option in options)
        and is_active(space, parent, values)
        for parent, options in space[path].when
    )


def active_values(space: Space, values: Mapping[Path, Any]) -> dict[Path, Any]:
    """Return those of ``values`` that are searched, in the order of ``space``."""
    return {path: values[path] for path in space if path in values and is_active(space, path, values)}


def fill(space: Space, wanted: Mapping[Path, Any]) -> dict[Path, Any] | None:
    """Return active values with ``wanted`` among them; None if its paths are never searched together.

    Choices that a wanted path depends on take the first option that suits it, all else its first value.
    """
    suiting: dict[Path, tuple[Scalar, ...]] = {}
    for path in {above: None for one in wanted for above in (one, *ancestors(space, one))}:
        for parent, options in space[path].when:
            choice = space.get(parent)
            left = suiting.get(parent, choice.options if isinstance(choice, Choice) else ())
            suiting[parent] = tuple(value for value in left if any(is_same(value, option) for option in options))
    chosen = {parent: options[0] for parent, options in suiting.items() if options}
    filled = active_values(space, {**first_values(space), **chosen, **wanted})
    return filled if set(wanted) <= set(filled) else None


def without(space: Space, path: Path) -> dict[Path, Any] | None:
    """Return active values of which ``path`` is none; None if it is always searched."""
    for one in (path, *ancestors(space, path)):
        for parent, options in space[one].when:
            choice = space.get(parent)
            for other in choice.options if isinstance(choice, Choice) else ():
                if not any(is_same(other, option) for option in options):
                    filled = fill(space, {parent: other})
                    if filled is not None:
                        return filled
    return None


def condition_in_words(distribution: Distribution) -> str:
    """Return where a distribution is searched: ``where estimator.name is 'alignprop' or 'draft'``; empty if always."""
    parts = [
        f"{'.'.join(path)} is {' or '.join(show(value) for value in options)}" for path, options in distribution.when
    ]
    return f"where {' and '.join(parts)}" if parts else ""


def faults_of_conditions(space: Space, broken: Collection[Path]) -> Iterator[tuple[Path, Path, str, str]]:
    """Yield what is wrong with conditions: whose, at which of its choices, what and what to do.

    A condition on a choice that is ``broken`` itself cannot be judged, and what is said of it is empty.
    """
    choices = [".".join(path) for path, distribution in space.items() if isinstance(distribution, Choice)]
    for path, distribution in space.items():
        for parent, options in distribution.when:
            name, choice = ".".join(parent), space.get(parent)
            if parent in broken:
                yield path, parent, "", ""
            elif choice is None:
                others = tuple(other for other in choices if other != ".".join(path))
                remedy = suggest(name, others) if others else "make it a choice, or delete the condition"
                yield path, parent, f"must name a choice that is searched, got {name!r}", remedy
            elif not isinstance(choice, Choice):
                what = f"must name a choice, got {name!r}, which is {in_words(choice)}"
                yield path, parent, what, "make that a choice, or delete the condition"
            else:
                for option in options:
                    if not any(is_same(option, known) for known in choice.options):
                        what = f"{name} is {in_words(choice)}, got {show(option)}"
                        remedy = "take one of them" if not isinstance(option, str) else _closest(option, choice)
                        yield path, parent, what, remedy
    yield from _cycles(space)


def _closest(option: str, choice: Choice) -> str:
    return suggest(option, tuple(str(known) for known in choice.options))


def _cycles(space: Space) -> Iterator[tuple[Path, Path, str, str]]:
    said: set[Path] = set()
    for path in space:
        above = ancestors(space, path)
        if path not in above:
            continue
        ring = [other for other in above if path in ancestors(space, other)]
        first = path not in said
        said.update(ring)
        names = ", ".join(sorted(".".join(other) for other in ring))
        what = (
            f"waits for itself, got a ring of conditions: {names}"
            if len(ring) > 1
            else f"waits for itself, got {names}"
        )
        yield path, path, what if first else "", "let one of them stand without a condition"
