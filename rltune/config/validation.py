"""Every fault of an experiment's values at once: of each value, between values, and at the corners of the space."""

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rltune.config.clashes import Clash
from rltune.config.conditions import Space, fill, without
from rltune.config.distributions import KINDS, Choice, IntRange, Simplex, show
from rltune.config.experiment import Context, RunConfig
from rltune.config.schema import describe, is_leaf, known_keys, node_at
from rltune.config.yamlfile import Path
from rltune.registry import suggest


def replaced(data: Mapping[str, Any], values: Mapping[Path, Any], space: Space) -> dict[str, Any]:
    """Return a copy of ``data`` with ``values`` where distributions stand; what has no value is left out."""
    result: dict[str, Any] = copy.deepcopy(dict(data))
    cut_out(result, [path for path in space if path not in values])
    for path, value in values.items():
        parent = _at(result, path[:-1])
        parent[int(path[-1]) if isinstance(parent, list) else path[-1]] = value
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
            return faults + [clash for clash in details[0]["ctx"]["clashes"] if not _touches(clash, cuts)]
        wrong = {_path_of(detail, rest): detail for detail in reversed(details)}
        faults += [_fault_of(detail, path, _at(rest, path)) for path, detail in reversed(wrong.items())]
        wrong_values = {list_or_value(rest, path) for path in wrong}
        cut_out(rest, wrong_values)
        cuts |= wrong_values


def faults_of_space(data: Mapping[str, Any], space: Space, context: Context, ignored: Sequence[Path]) -> list[Clash]:
    """Return all that is wrong at any corner of ``space``; a fault at a distribution's end names that end.

    Each distribution is tried alone, every end and option (and what lies between, if the ends are right) against the
    first value of the others; then the discrete ones in pairs, for what only two of them together break. What is
    searched under a condition is tried where that holds, and left out once where it does not.
    """

    def faults_at(values: Mapping[Path, Any] | None) -> list[Clash]:
        # None: what would have to be tried together never is
        return [] if values is None else faults_of_run(replaced(data, values, space), context, ignored)

    def trial(values: Mapping[Path, Any], ends: Mapping[Path, str]) -> list[Clash]:
        dotted = {".".join(path): end for path, end in ends.items()}
        faults = [f for f in faults_at(fill(space, values)) if set(dotted) <= set(f.paths)]
        blamed = [(next(p for p in f.paths if p in dotted), f) for f in faults]
        return [Clash(f"{path}.{dotted[path]}", f.what, f.remedy, f.paths) for path, f in blamed]

    # weights on the simplex are positive wherever they are drawn, so what their first values break is always broken
    names = {".".join(path) for path, distribution in space.items() if not isinstance(distribution, Simplex)}
    found = [f for f in faults_at(fill(space, {})) if not names & set(f.paths)]
    for path, distribution in space.items():
        if isinstance(distribution, Simplex):
            continue
        wrong = [f for end, value in distribution.corners() for f in trial({path: value}, {path: end})]
        if not wrong:
            wrong = [f for end, value in distribution.inner() for f in trial({path: value}, {path: end})][:1]
        found += wrong
    discrete = [(path, tuple(dist.corners())) for path, dist in space.items() if isinstance(dist, Choice | IntRange)]
    for (one, ends), (other, other_ends) in itertools.combinations(discrete, 2):
        pairs = itertools.product(ends, other_ends)
        wrong = [f for (e, v), (o, w) in pairs for f in trial({one: v, other: w}, {one: e, other: o})]
        reported = {frozenset(f.others) for f in found}
        found += [f for f in wrong if frozenset(f.others) not in reported][:1]
    for path in (path for path, distribution in space.items() if distribution.when):
        dotted = ".".join(path)
        reported = {frozenset(f.others) for f in found}
        wrong = [f for f in faults_at(without(space, path)) if dotted in f.paths and frozenset(f.paths) not in reported]
        found += [Clash(f"{dotted}.when", f"where it does not hold, {f.what}", f.remedy, f.paths) for f in wrong]
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
    node = node_at(path) or {}
    return Clash(where, f"must be {describe(node)}, got {show(value)}", _remedy(node, value))


def _remedy(node: Mapping[str, Any], value: Any) -> str:
    branches = node.get("anyOf", (node,))
    options = next((branch["enum"] for branch in branches if "enum" in branch), ())
    if isinstance(value, str) and options:
        return suggest(value, tuple(options))
    if isinstance(value, float) and node.get("type") == "integer" and value.is_integer():
        return f"write {int(value)}"
    if isinstance(value, str) and node.get("type") in ("integer", "number") and value.strip().isdecimal():
        return "remove the quotes"
    default = node.get("default")
    return "" if default is None or not is_leaf(node) else f"the default is {show(default)}"
