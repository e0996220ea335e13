"""Points that a search tries first, ``search.points``: whether each lies in the space."""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from rltune.config.conditions import Space, condition_in_words
from rltune.config.distributions import Simplex, in_words, is_in, is_same, show
from rltune.config.yamlfile import Path
from rltune.registry import suggest


def faults_of_points(points: Any, space: Space, broken: Collection[Path]) -> Iterator[tuple[int, str, str, str]]:
    """Yield what is wrong with points: the index, the dotted path in it or nothing, what and what to do.

    What is no list of mappings is left to the schema, and what is said of ``broken`` distributions to their own faults.
    """
    for i, point in enumerate(points if isinstance(points, list) else ()):
        if isinstance(point, Mapping):
            for fault in _faults_of_point(point, space, broken):
                yield (i, *fault)


def _faults_of_point(
    point: Mapping[str, Any], space: Space, broken: Collection[Path]
) -> Iterator[tuple[str, str, str]]:
    if not point:
        yield "", "a point needs a setting, got none", "write one such as {optim.lr: 1e-3}, or delete it"
    for name, value in point.items():
        path = tuple(name.split("."))
        distribution = space.get(path)
        if path in broken:
            continue
        if distribution is None:
            searched = tuple(".".join(known) for known in space)
            remedy = suggest(name, searched) if searched else "give it a distribution, or delete the point"
            yield name, f"is not searched, got {show(value)}", remedy
            continue
        if not is_in(value, distribution):
            yield name, f"must be {in_words(distribution)}, got {show(value)}", "that is what is searched"
        for parent, options in distribution.when:
            other = ".".join(parent)
            if other not in point:
                what = f"is searched only {condition_in_words(distribution)}, got {show(value)} without {other}"
                yield name, what, f"give {other} too"
            elif is_in(point[other], space[parent]) and not any(is_same(point[other], option) for option in options):
                what = f"is searched only {condition_in_words(distribution)}, got {show(point[other])} for {other}"
                yield name, what, "delete it here"
    yield from _faults_of_weights(point, [".".join(path) for path, kind in space.items() if isinstance(kind, Simplex)])


def _faults_of_weights(point: Mapping[str, Any], names: list[str]) -> Iterator[tuple[str, str, str]]:
    given = [name for name in names if name in point]
    missing = [name for name in names if name not in point]
    if given and missing:
        what = f"weights on the simplex go together, got {', '.join(given)} without {', '.join(missing)}"
        yield "", what, "give every one of them or none"
    elif given and all(is_in(point[name], Simplex()) for name in given):
        total = sum(point[name] for name in given)
        if not math.isclose(total, 1, abs_tol=1e-6):
            yield "", f"weights on the simplex must sum to 1, got {total:.6g}", "change one of them"
