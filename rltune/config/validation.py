"""Every fault of an experiment's values at once: of each value, between values, and anywhere in the space."""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rltune.config.conditions import Space, active_values, ancestors, fill, first_values, without
from rltune.config.distributions import (
    KINDS,
    Choice,
    Distribution,
    FloatRange,
    IntRange,
    LogFloatRange,
    Simplex,
    is_in,
)
from rltune.config.experiment import Context, RunConfig
from rltune.config.kinds import without_lora
from rltune.config.rules import RULES, Clash, Together
from rltune.config.schema import belongs_to_whole_sweep, node_at
from rltune.config.words import is_leaf, known_keys, what_is_wrong
from rltune.config.yamlfile import Path
from rltune.registry import suggest

MAX_TOGETHER = 10_000
"""Combinations of what one rule reads, a fraction of a millisecond each; a space with more is refused."""


def replaced(data: Mapping[str, Any], values: Mapping[Path, Any], space: Space) -> dict[str, Any]:
    """Return a copy of ``data`` with ``values`` where distributions stand; what has no value is left out.

    So is what is said of LoRAs in a trial of another kind, where kinds are searched.
    """
    result: dict[str, Any] = copy.deepcopy(dict(data))
    cut_out(result, [path for path in space if path not in values])
    for path, value in values.items():
        parent = _at(result, path[:-1])
        parent[int(path[-1]) if isinstance(parent, list) else path[-1]] = value
    without_lora(result, values)
    return result


def faults_of_run(data: Mapping[str, Any], context: Context, ignored: Sequence[Path] = ()) -> list[Clash]:
    """Return all that is wrong with concrete ``data``; what clashes with an ``ignored`` path is left out.

    pydantic checks what spans sections only once every value is right. So the values at fault are cut out, which puts
    defaults in their place, and the rest is validated again. A clash with such a default is not the user's.
    """
    rest, cuts, faults = copy.deepcopy(dict(data)), set(ignored), list[Clash]()
    while True:
        try:
            RunConfig.model_validate(rest, context=context)
            return faults
        except ValidationError as error:
            details = error.errors(include_url=False)
        if details[0]["type"] == "clash":
            clashes = details[0]["ctx"]["clashes"]
            assert all(map(_is_of_a_rule, clashes)), f"name in clashes.RULES what is read together: {clashes}"
            return faults + [clash for clash in clashes if not _touches(clash, cuts)]
        wrong = {_path_of(detail, rest): detail for detail in reversed(details)}
        faults += [_fault_of(detail, path, _at(rest, path)) for path, detail in reversed(wrong.items())]
        wrong_values = {list_or_value(rest, path) for path in wrong}
        cut_out(rest, wrong_values)
        cuts |= wrong_values


def faults_of_space(data: Mapping[str, Any], space: Space, context: Context, ignored: Sequence[Path]) -> list[Clash]:
    """Return all that is wrong anywhere in ``space``; a fault at a distribution's end names that end.

    Each distribution is tried alone, every end and option (and what lies between, if the ends are right) against the
    first value of the others; then the settings that a rule reads together, over their product. What is searched under
    a condition is tried where that holds, and left out once where it does not. Points to try first are tried too.
    """

    def faults_at(values: Mapping[Path, Any] | None) -> list[Clash]:
        # None: what would have to be tried together never is
        return [] if values is None else faults_of_run(replaced(data, values, space), context, ignored)

    def trial(path: Path, end: str, value: Any) -> list[Clash]:
        dotted = ".".join(path)
        faults = [f for f in faults_at(fill(space, {path: value})) if dotted in f.paths]
        return [Clash(f"{dotted}.{end}", f.what, f.remedy, f.paths) for f in faults]

    # weights on the simplex are positive wherever they are drawn, so what their first values break is always broken
    names = {".".join(path) for path, distribution in space.items() if not isinstance(distribution, Simplex)}
    found = [f for f in faults_at(fill(space, {})) if not names & set(f.paths)]
    for path, distribution in space.items():
        if isinstance(distribution, Simplex):
            continue
        wrong = [f for end, value in distribution.corners() for f in trial(path, end, value)]
        if not wrong:
            wrong = [f for end, value in distribution.inner() for f in trial(path, end, value)][:1]
        found += wrong
    for rule in RULES:
        for group in searched_together(rule, space):
            found += _faults_together(rule, group, space, faults_at, {frozenset(f.others) for f in found})
    for path in (path for path, distribution in space.items() if distribution.when):
        dotted = ".".join(path)
        reported = {frozenset(f.others) for f in found}
        wrong = [f for f in faults_at(without(space, path)) if dotted in f.paths and frozenset(f.paths) not in reported]
        found += [Clash(f"{dotted}.when", f"where it does not hold, {f.what}", f.remedy, f.paths) for f in wrong]
    return found or _faults_of_points(data, space, faults_at)


def searched_together(rule: Together, space: Space) -> list[list[Path]]:
    """Return the paths of ``space`` that a rule reads together: one list, or one for every reward and option."""
    searched = [path for path, distribution in space.items() if not isinstance(distribution, Simplex)]
    patterns = [tuple(pattern.split(".")) for pattern in rule.paths]
    names = {wild: dict[str, None]() for wild in ("*", "?")}
    for path, pattern in itertools.product(searched, patterns):
        if len(path) == len(pattern) and path[0] == pattern[0]:
            for key, want in zip(path, pattern, strict=True):
                names.get(want, {})[key] = None
    groups = []
    for reward, option in itertools.product(names["*"] or [""], names["?"] or [""]):
        given = {"*": reward, "?": option}
        allowed = [tuple(given.get(part, part) for part in pattern) for pattern in patterns]
        groups.append([path for path in searched if any(_matches(path, pattern) for pattern in allowed)])
    return list({tuple(group): group for group in groups if len(group) > 1}.values())


def _is_of_a_rule(clash: Clash) -> bool:
    """Whether what could be searched of all that decides ``clash`` stands together in one of the rules."""
    paths = [tuple(path.split(".")) for path in clash.paths]
    searchable = {path: FloatRange(0, 1) for path in paths if not belongs_to_whole_sweep(path) and _is_value(path)}
    together = [group for rule in RULES for group in searched_together(rule, searchable)]
    return len(searchable) < 2 or any(set(group) == set(searchable) for group in together)


def _is_value(path: Path) -> bool:
    node = node_at(path)
    return node is not None and is_leaf(node)


def _matches(path: Path, pattern: Path) -> bool:
    return len(path) == len(pattern) and all(want in ("**", key) for key, want in zip(path, pattern, strict=True))


def _faults_together(
    rule: Together,
    group: Sequence[Path],
    space: Space,
    faults_at: Callable[[Mapping[Path, Any]], list[Clash]],
    reported: set[frozenset[str]],
) -> list[Clash]:
    """Return what the settings of ``group`` break together, one fault for what was not reported before."""
    above = {parent: None for path in group for parent in ancestors(space, path) if parent not in group}
    axes = {path: _candidates(rule, path, space[path]) for path in group}
    axes |= {path: list(choice.corners()) for path in above if isinstance(choice := space[path], Choice)}
    if (num := math.prod(len(candidates) for candidates in axes.values())) > MAX_TOGETHER:
        dotted = [".".join(path) for path in axes]
        what = f"has {num} combinations with {', '.join(dotted[1:])}, which must be tried for what they break together"
        return [Clash(dotted[0], f"{what}, got more than {MAX_TOGETHER}", "fix one of them, or give fewer options")]
    tried, found = set[str](), list[Clash]()
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        # a number from a range meets its very end with probability 0, and two of them never
        if (
            sum(isinstance(space[path], FloatRange | LogFloatRange) and bool(end) for path, (end, _) in chosen.items())
            > 1
        ):
            continue
        values = active_values(space, first_values(space) | {path: value for path, (_, value) in chosen.items()})
        key = repr([(path, values[path]) for path in group if path in values])
        if key in tried:
            continue
        tried.add(key)
        ends = {".".join(path): chosen[path][0] for path in group if path in values and chosen[path][0]}
        for f in faults_at(values):
            blamed = next((path for path in f.paths if path in ends), None)
            if blamed is not None and frozenset(f.paths) not in reported:
                reported.add(frozenset(f.paths))
                found.append(Clash(f"{blamed}.{ends[blamed]}", f.what, f.remedy, f.paths))
    return found


def _candidates(rule: Together, path: Path, distribution: Distribution) -> list[tuple[str, Any]]:
    """Return what a setting is tried at together with others; the first value of a range of numbers has no end."""
    assert not isinstance(distribution, Simplex)
    candidates = list(distribution.corners())
    if isinstance(distribution, FloatRange | LogFloatRange):
        candidates.insert(0, ("", distribution.first))
    if isinstance(distribution, IntRange):
        is_divisor = ".".join(path) in rule.divisors
        candidates += list(distribution.inner())[: None if is_divisor else 1]
    if not rule.only:
        return candidates
    first: tuple[str, Any] = ("", distribution.first)
    return [candidate for candidate in candidates if candidate[1] in rule.only] or [first]


def _faults_of_points(
    data: Mapping[str, Any], space: Space, faults_at: Callable[[Mapping[Path, Any] | None], list[Clash]]
) -> list[Clash]:
    """Return what points to try first break: the ends of two ranges of numbers at once, which are never drawn."""
    search = data.get("search")
    points = search.get("points") if isinstance(search, Mapping) else None
    found = []
    for i, point in enumerate(points if isinstance(points, list) else ()):
        wanted = {tuple(name.split(".")): value for name, value in point.items()} if isinstance(point, Mapping) else {}
        if all(path in space and is_in(value, space[path]) for path, value in wanted.items()):
            faults = [f for f in faults_at(fill(space, wanted)) if set(f.paths) & set(point)]
            found += [Clash(f"search.points.{i}", f.what, f.remedy, f.paths) for f in faults]
    return found


def list_or_value(data: Any, path: Path) -> Path:
    """Return ``path``, or the list that it is an item of: without the item its list would mean something else."""
    return path[:-1] if isinstance(_at(data, path[:-1]), list) else path


def cut_out(data: dict[str, Any], paths: Iterable[Path]) -> None:
    """Delete the values at ``paths``."""
    for path in paths:
        del _at(data, path[:-1])[path[-1]]


def _at(data: Any, path: Path) -> Any:
    for key in path:
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def _touches(clash: Clash, cuts: set[Path]) -> bool:
    """Whether something that decides ``clash`` is cut out: its own value, or any part of the others."""
    where, *others = (tuple(path.split(".")) for path in clash.paths)
    is_cut = any(where[: len(cut)] == cut for cut in cuts)
    return is_cut or any(path[: len(cut)] == cut[: len(path)] for path in others for cut in cuts)


def _path_of(detail: ErrorDetails, data: Any) -> Path:
    """The part of pydantic's location that is in the file; behind it stand names of union members."""
    path: list[str] = []
    for key in detail["loc"]:
        is_key = isinstance(data, Mapping) and key in data
        if not is_key and not (isinstance(data, list) and isinstance(key, int) and key < len(data)):
            break
        data = data[key]
        path.append(str(key))
    return tuple(path)


def _fault_of(detail: ErrorDetails, path: Path, value: Any) -> Clash:
    """Pydantic's error in our words: it says what it checked, the user wants to know what to write."""
    where = ".".join(path)
    if detail["type"] == "extra_forbidden":
        section = node_at(path[:-1]) or {}
        if path[-1] in KINDS:
            remedy = f"give a distribution to the values inside: {', '.join(known_keys(section))}"
            return Clash(where, f"a whole section cannot be a distribution, got {path[-1]!r}", remedy)
        return Clash(where, f"unknown key, got {path[-1]!r}", suggest(path[-1], known_keys(section)))
    return Clash(where, *what_is_wrong(node_at(path) or {}, value))
