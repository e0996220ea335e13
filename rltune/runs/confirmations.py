"""What chosen trials measured on fresh prompts, and what a front is by it. Reads files, starts nothing.

P: prompts. N: members. D: objectives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from rltune.config.load import Experiment
from rltune.pareto.fresh import FreshVolume, fresh_volume, prob_non_dominated
from rltune.pareto.front import dominators
from rltune.records import from_record
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.metrics import violations
from rltune.runs.objectives import Fresh, Front, find_knee
from rltune.runs.results import TrialResult
from rltune.runs.store import read_json_lines

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Confirmation:
    """What one trial, or the base model, measured on fresh prompts."""

    trial: str
    checkpoint: str
    """Which of the trial's checkpoints it was, as ``TrialResult.checkpoint``."""
    num_prompts: int
    metrics: Mapping[str, float]
    spread: Mapping[str, float] = field(default_factory=dict)
    """Standard deviation over prompts of each reward and judge; no longer written."""
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Each reward's and judge's mean over the images of every prompt; empty in runs of before."""
    prompts: Sequence[str] = ()
    """The prompts, in this order; empty in runs of before."""
    num_reused: int = 0
    """Of the prompts, those that trials had been chosen by."""


@dataclass(frozen=True)
class Confirmed:
    """The newest measurements that compare: all on the prompts that the base model was measured on last."""

    base: Confirmation
    rows: Mapping[tuple[str, str], Confirmation]
    """By trial and checkpoint."""

    def of(self, result: TrialResult) -> Confirmation | None:
        """Return what was measured of a trial's checkpoint."""
        return self.rows.get((result.trial, result.checkpoint))

    def apply(self, result: TrialResult, experiment: Experiment) -> TrialResult | None:
        """Return a trial with its fresh measurements in the place of those it was chosen by; None without any."""
        row = self.base if result.trial == BASE_TRIAL else self.of(result)
        if row is None:
            return None
        broken = violations(experiment.shared, row.metrics, self.base.metrics)
        return replace(result, metrics=row.metrics, constraints=broken)


def read_confirmations(folder: RunFolder) -> list[Confirmation]:
    """Return the fresh measurements of a run, in the order in which they were made."""
    return [from_record(Confirmation, row, folder.confirmed_file) for row in read_json_lines(folder.confirmed_file)]


def comparable(confirmations: Sequence[Confirmation]) -> Confirmed | None:
    """Return the measurements that compare with the newest of the base model; None without one of it."""
    base = next((row for row in reversed(confirmations) if row.trial == BASE_TRIAL), None)
    if base is None:
        return None
    same = [row for row in confirmations if (row.num_prompts, *row.prompts) == (base.num_prompts, *base.prompts)]
    return Confirmed(base, {(row.trial, row.checkpoint): row for row in same})


def confirmed_front(front: Front, experiment: Experiment, confirmations: Sequence[Confirmation]) -> Front | None:
    """Return a front with the fresh measurements of its members; None unless all of them have one.

    Members, their order, knee and best are those of the search. To pick them again by the fresh numbers would be to
    pick the lucky again. Who breaks a constraint on fresh prompts is a member in name only: it is neither picked nor
    counted. Who is dominated there is told of, and stays, for that may be luck as well.
    """
    found = comparable(confirmations)
    if found is None:
        return None
    members = [member for member in (found.apply(member, experiment) for member in front.members) if member is not None]
    if len(members) < len(front.members):
        return None
    counted = [i for i, member in enumerate(members) if member.is_feasible]
    middle = find_knee([front.chosen[i] for i in counted], front.objectives)
    volume = _volume(front, members, counted, found)
    probabilities = _non_dominated(front, [members[i] for i in counted], found)
    base_D = front.objectives.raw_D(found.base.metrics)
    return replace(
        front,
        members=tuple(members),
        reference_D=base_D - front.objectives.signs_D * front.unit_D,
        hypervolume=volume.value,
        knee=next((member for member in members if middle is not None and member.trial == middle.trial), None),
        num_prompts=found.base.num_prompts,
        fresh=Fresh(
            num_reused=found.base.num_reused,
            half_width=volume.half_width,
            half_width_without_effect=volume.half_width_without_effect,
            not_held=_not_held(front, members),
            non_dominated=probabilities,
            search_hypervolume=front.hypervolume,
        ),
    )


def counted_gains(
    front: Front, experiment: Experiment, confirmations: Sequence[Confirmation]
) -> tuple[tuple[TrialResult, ...], Array]:
    """Return the members that count by the fresh measurements, as the search has them, and their gains there.

    Args:
        front: That of the search, of which every member was measured again.
        experiment: Of the run.
        confirmations: What was measured.

    Returns:
        Members, and what each gained over the base model on every fresh prompt, ``(P, N, D)`` in units.
    """
    found = comparable(confirmations)
    assert found is not None
    fresh = [(member, found.apply(member, experiment)) for member in front.members]
    counted = [(chosen, member) for chosen, member in fresh if member is not None and member.is_feasible]
    if not counted:
        return (), np.zeros((found.base.num_prompts, 0, len(front.unit_D)))
    gains_PND = np.stack([gains_PD(front, _row(member, found), found) for _, member in counted], axis=1)
    return tuple(chosen for chosen, _ in counted), gains_PND


@dataclass(frozen=True)
class Measured:
    """A trial as it is reported."""

    result: TrialResult
    num_prompts: int
    num_reused: int | None
    """Prompts, of those, that it was chosen by as well; None where it was not measured again."""
    is_selected: bool
    """Whether its checkpoint was picked among several by what they measured."""


def measured(result: TrialResult, experiment: Experiment, confirmations: Sequence[Confirmation]) -> Measured:
    """Return a trial by its fresh measurements, or as it is where there are none."""
    found = comparable(confirmations)
    fresh = None if found is None else found.apply(result, experiment)
    is_selected = experiment.shared.evaluate.select != "last"
    if found is None or fresh is None:
        return Measured(result, experiment.shared.evaluate.prompts, None, is_selected)
    return Measured(fresh, found.base.num_prompts, found.base.num_reused, is_selected)


def missing(chosen: Sequence[TrialResult], found: Confirmed | None) -> list[TrialResult]:
    """Return the trained ones of some trials that were not measured on fresh prompts yet."""
    return [result for result in chosen if result.trial != BASE_TRIAL and (found is None or found.of(result) is None)]


def _volume(front: Front, members: Sequence[TrialResult], counted: Sequence[int], found: Confirmed) -> FreshVolume:
    """Return the hypervolume of the members that count, above the base model minus one unit."""
    if not counted:
        return FreshVolume(0.0, None, None)
    gains_PND = np.stack([gains_PD(front, _row(members[i], found), found) for i in counted], axis=1)
    return fresh_volume(front.places_ND([front.chosen[i] for i in counted]), gains_PND)


def _non_dominated(front: Front, counted: Sequence[TrialResult], found: Confirmed) -> dict[str, float]:
    """Return how probable each member's place is among those that count and the base model."""
    gains = [gains_PD(front, _row(member, found), found) for member in counted]
    if not gains or min(len(own_PD) for own_PD in gains) < 2 or len({len(own_PD) for own_PD in gains}) > 1:
        return {}
    base_PD = np.zeros_like(gains[0])
    probability_N = prob_non_dominated(np.stack([*gains, base_PD], axis=1))
    return {member.trial: float(value) for member, value in zip(counted, probability_N, strict=False)}


def _row(member: TrialResult, found: Confirmed) -> Confirmation:
    row = found.base if member.trial == BASE_TRIAL else found.of(member)
    assert row is not None
    return row


def gains_PD(front: Front, row: Confirmation, found: Confirmed) -> Array:
    """Return what a row gained over the base model on every prompt, in units; in runs of before, the mean alone."""
    names, base = front.objectives.names, found.base
    if all(name in base.values for name in names) and all(name in row.values for name in names):
        gains = [np.asarray(row.values[name]) - np.asarray(base.values[name]) for name in names]
    else:
        gains = [np.array([row.metrics[f"eval/{name}"] - base.metrics[f"eval/{name}"]]) for name in names]
    signed_PD: Array = np.stack(gains, axis=1) * front.objectives.signs_D / front.unit_D
    return signed_PD


def _not_held(front: Front, members: Sequence[TrialResult]) -> dict[str, str]:
    """Return why members do not hold their places on fresh prompts."""
    feasible = [member for member in members if member.is_feasible]
    better = dominators(front.objectives.signed_ND(feasible))
    why = {
        member.trial: f"{feasible[row].trial} is at least as good in every objective"
        for member, row in zip(feasible, better, strict=True)
        if row is not None
    }
    for member in members:
        broken = [f"{name} by {bad:.3g}" for name, bad in member.constraints.items() if bad > 0]
        if broken:
            why[member.trial] = f"breaks {', '.join(broken)}"
    return why
