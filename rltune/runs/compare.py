"""Several runs side by side, in common units from a common reference point. Reads their folders alone.

S: seeds. P: prompts. N: members. D: objectives.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rltune.errors import UserError
from rltune.intervals import difference, over_prompts_and_seeds
from rltune.pareto.attainment import attainment_surfaces
from rltune.pareto.fresh import volume_by_prompt
from rltune.pareto.hypervolume import hypervolume
from rltune.runs.confirmations import counted_gains
from rltune.runs.contenders import Contender, check_comparable, read_contender
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.record import leaves

Array = npt.NDArray[np.float64]

SEEDS = ("seed", "search.seed")
UNIMPORTANT = ("name", "track", *SEEDS)
"""Settings that do not make a run another experiment; nor do ``resources``, but for its number formats."""


@dataclass(frozen=True)
class Entry:
    """One run in common units: the base model lies at 1 in every objective, the reference point at 0."""

    path: Path
    seeds: Mapping[str, int]
    num_trials: int
    members: tuple[str, ...]
    """Trained members of its front that keep every constraint."""
    points_ND: Array
    """Where they are."""
    volumes_P: Array
    """What each prompt says of the hypervolume; of the search's own numbers it is one number."""
    front_ND: Array
    """Where all members are that count, of whom the base model may be one."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone."""

    label: str
    entries: tuple[Entry, ...]
    settings: Mapping[str, Any]
    """By dotted path, defaults included."""

    @property
    def volumes_SP(self) -> Array:
        """What each prompt says of each run's hypervolume."""
        return np.stack([entry.volumes_P for entry in self.entries])

    @property
    def hypervolume(self) -> tuple[float, float | None]:
        """Mean over runs, and half the width of its 95 % interval over prompts and seeds."""
        return over_prompts_and_seeds(self.volumes_SP)

    @property
    def surfaces(self) -> list[Array]:
        """Corners of what at least k of its runs attain, k = 1 up to their number."""
        return attainment_surfaces([entry.front_ND for entry in self.entries])

    @property
    def attained(self) -> list[float]:
        """Hypervolume of these."""
        return [hypervolume(corners_ND, np.zeros(corners_ND.shape[1])) for corners_ND in self.surfaces]


@dataclass(frozen=True)
class Pair:
    """Two groups against each other."""

    first: Group
    second: Group

    @property
    def difference(self) -> tuple[float, float | None]:
        """First hypervolume less the second, and half the width of its 95 % interval, paired by prompt."""
        return difference(self.first.volumes_SP, self.second.volumes_SP)

    @property
    def dominated(self) -> tuple[float | None, float | None]:
        """Share of the first's members that one of the second dominates, and the other way round."""
        return _dominated(self.first, self.second), _dominated(self.second, self.first)


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    objectives: tuple[str, ...]
    signs_D: Array
    unit_D: Array
    reference_D: Array
    """As reported; the base model of the first run less one unit."""
    unit_words: Mapping[str, str]
    num_prompts: int
    is_fresh: bool
    """Whether on prompts that no trial was chosen by; else by the numbers of the search, since a run has no others."""
    groups: tuple[Group, ...]

    @property
    def pairs(self) -> list[Pair]:
        """Every two groups."""
        return [Pair(first, second) for first, second in combinations(self.groups, 2)]

    @property
    def differing(self) -> dict[str, list[Any]]:
        """Setting -> its value in each group, of those that are not the same in all; None where it is not there."""
        paths = dict.fromkeys(path for group in self.groups for path in group.settings)
        values = {path: [group.settings.get(path) for group in self.groups] for path in paths}
        return {path: row for path, row in values.items() if any(value != row[0] for value in row)}


def compare_runs(paths: Sequence[Path], *, objectives: Sequence[str] = ()) -> Comparison:
    """Return runs side by side, those together that differ in their seeds alone.

    Hypervolumes and gains are by the fresh measurements if all runs have them, else by the search's numbers.

    Args:
        paths: Run folders, two at least.
        objectives: What fronts are over, any rewards and judges that all have measured; the runs' own if left out.

    Raises:
        UserError: There is no run at a path, the base model has no result yet, one path is named twice, or the runs
            were measured on other objectives, prompts or base models.
        RunError: A record cannot be read.
    """
    if len({path.resolve() for path in paths}) < max(len(paths), 2):
        raise UserError(f"compare: must be two different runs or more, got {', '.join(map(str, paths))}")
    first = read_contender(paths[0], objectives)
    contenders = [first, *(read_contender(path, objectives, like=first) for path in paths[1:])]
    check_comparable(contenders)
    is_fresh = all(contender.fresh is not None for contender in contenders)
    front = (first.fresh if is_fresh else None) or first.front
    grouped: dict[str, list[Contender]] = {}
    for contender in contenders:
        grouped.setdefault(json.dumps(_settings(contender), sort_keys=True), []).append(contender)
    groups = [
        Group(_label(i), tuple(_entry(run, first.front.unit_D, is_fresh=is_fresh) for run in runs), _settings(runs[0]))
        for i, runs in enumerate(grouped.values())
    ]
    return Comparison(
        objectives=front.objectives.names,
        signs_D=front.objectives.signs_D,
        unit_D=front.unit_D,
        reference_D=front.reference_D,
        unit_words=front.unit_words,
        num_prompts=front.num_prompts,
        is_fresh=is_fresh,
        groups=tuple(groups),
    )


def comparison_as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison in JSON's types.

    Half widths are of 95 % intervals, over prompts and, where a group has several runs, over seeds. Points and surfaces
    are in units, the reference point at 0 and the base model at 1, larger is better. ``attained`` has what at least
    1, 2 .. of a group's runs attain.
    """
    names = comparison.objectives
    return {
        "objectives": {
            name: "maximize" if sign > 0 else "minimize" for name, sign in zip(names, comparison.signs_D, strict=True)
        },
        "units": {
            name: {"size": size, "what": comparison.unit_words.get(name, "")}
            for name, size in zip(names, comparison.unit_D.tolist(), strict=True)
        },
        "reference_point": dict(zip(names, comparison.reference_D.tolist(), strict=True)),
        "prompts": comparison.num_prompts,
        "is_measured_again": comparison.is_fresh,
        "groups": [_group_as_dict(group) for group in comparison.groups],
        "pairs": [_pair_as_dict(pair) for pair in comparison.pairs],
        "differing_settings": {
            path: dict(zip((group.label for group in comparison.groups), row, strict=True))
            for path, row in comparison.differing.items()
        },
    }


def _group_as_dict(group: Group) -> dict[str, Any]:
    value, half = group.hypervolume
    return {
        "label": group.label,
        "hypervolume": value,
        "hypervolume_half_width": half,
        "attained": [
            {"by": k, "hypervolume": volume, "surface": surface.tolist()}
            for k, (volume, surface) in enumerate(zip(group.attained, group.surfaces, strict=True), start=1)
        ],
        "runs": [
            {
                "path": str(entry.path),
                **entry.seeds,
                "trials": entry.num_trials,
                "hypervolume": float(entry.volumes_P.mean()),
                "members": dict(zip(entry.members, entry.points_ND.tolist(), strict=True)),
            }
            for entry in group.entries
        ],
    }


def _pair_as_dict(pair: Pair) -> dict[str, Any]:
    value, half = pair.difference
    first, second = pair.dominated
    return {
        "groups": [pair.first.label, pair.second.label],
        "hypervolume_difference": value,
        "hypervolume_difference_half_width": half,
        "dominated": {pair.first.label: first, pair.second.label: second},
    }


def _entry(run: Contender, unit_D: Array, *, is_fresh: bool) -> Entry:
    """Return a run in units that are not its own."""
    if is_fresh:
        counted, gains_PND = counted_gains(run.front, run.experiment, run.confirmations)
        places_ND = run.front.places_ND(counted)
    else:
        counted = tuple(member for member in run.front.members if member.is_feasible)
        places_ND = run.front.places_ND(counted)
        gains_PND = (places_ND - 1)[None]
    ratio_D = run.front.unit_D / unit_D
    places_ND, gains_PND = 1 + (places_ND - 1) * ratio_D, gains_PND * ratio_D
    front_ND = 1 + gains_PND.mean(axis=0)
    is_trained_N = np.array([member.trial != BASE_TRIAL for member in counted], dtype=np.bool_)
    return Entry(
        path=run.path,
        seeds={path: int(leaves(run.record.settings)[path]) for path in SEEDS},
        num_trials=run.num_trials,
        members=tuple(member.trial for member in counted if member.trial != BASE_TRIAL),
        points_ND=front_ND[is_trained_N],
        volumes_P=volume_by_prompt(places_ND, gains_PND),
        front_ND=front_ND,
    )


def _settings(run: Contender) -> dict[str, Any]:
    """Return the settings that make a run another experiment."""
    return {
        path: value
        for path, value in leaves(run.record.settings).items()
        if path not in UNIMPORTANT and (not path.startswith("resources.") or path.endswith("precision"))
    }


def _label(number: int) -> str:
    return chr(ord("A") + number % 26) * (1 + number // 26)


def _dominated(group: Group, other: Group) -> float | None:
    """Return the share of members that a run of the other group has a better one of, the mean over runs of both."""
    shares = []
    for entry in group.entries:
        for rival in other.entries:
            rivals_MD, points_ND = rival.points_ND[:, None], entry.points_ND[None]
            is_dominated_MN = (rivals_MD >= points_ND).all(axis=2) & (rivals_MD > points_ND).any(axis=2)
            shares += [float(is_dominated_MN.any(axis=0).mean())] if len(entry.points_ND) else []
    return float(np.mean(shares)) if shares else None
