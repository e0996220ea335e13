"""From a trial's metrics to what is searched over: objectives with a direction, front.

N: trials. D: objectives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rltune.pareto.front import non_dominated
from rltune.pareto.hypervolume import hypervolume, reference_point
from rltune.pareto.knee import knee
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.metrics import JUDGES
from rltune.runs.results import TrialResult

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Objectives:
    """Names of the objectives, and which way is better."""

    names: tuple[str, ...]

    @property
    def signs_D(self) -> Array:
        """1 where larger is better, -1 where smaller is."""
        return np.array([1.0 if JUDGES.get(name, True) else -1.0 for name in self.names])

    def raw_D(self, metrics: Mapping[str, float]) -> Array:
        """Return the objectives as reported."""
        return np.array([metrics[f"eval/{name}"] for name in self.names], dtype=np.float64)

    def signed_ND(self, results: Sequence[TrialResult]) -> Array:
        """Return the objectives of trials, signs turned so that larger is better."""
        rows = [self.raw_D(result.metrics) for result in results]
        return np.array(rows).reshape(len(rows), len(self.names)) * self.signs_D


@dataclass(frozen=True)
class Fresh:
    """What is known of a front that was measured again."""

    num_reused: int
    """Prompts, of those it was measured on, that trials had been chosen by as well; the noise is fresh on all."""
    half_width: float | None
    """Of the hypervolume's 95 % interval over prompts; None where it is not known."""
    half_width_without_effect: float | None
    """The same had no trial any effect: the hypervolume would then be 1, give or take so much."""
    not_held: Mapping[str, str] = field(default_factory=dict)
    """Member -> why it does not hold its place on fresh prompts."""
    non_dominated: Mapping[str, float] = field(default_factory=dict)
    """Member -> how probable it is that no other, nor the base model, is better by its true values; of those that count
    and of two prompts or more."""
    search_hypervolume: float | None = None
    """The hypervolume that the search claims, by the numbers that members were chosen by."""


@dataclass(frozen=True)
class Soup:
    """LoRAs of a run mixed without training, or a basis of LoRAs at some weights, by fresh measurements."""

    result: TrialResult
    """What it measured; its name stands for a trial, and it has no settings of its own."""
    weights: Mapping[str, float]
    """Trial -> weight of its update; together 1."""
    beaten: str
    """Why it is not on the front; empty where it is."""
    non_dominated: float | None
    """How probable it is that no member, no other soup and not the base model is better by its true values."""
    mix: Mapping[str, float] = field(default_factory=dict)
    """Reward -> weight of its LoRA, where the trial is a basis."""

    @property
    def kind(self) -> str:
        """``soup``, or ``basis`` for a point of one."""
        return "basis" if self.mix else "soup"

    @property
    def name(self) -> str:
        """What it is picked by."""
        return self.result.trial

    @property
    def recipe(self) -> str:
        """What it is a mixture of."""
        if self.mix:
            return f"{', '.join(self.weights)} at " + " + ".join(
                f"{part:.3g} {name}" for name, part in self.mix.items()
            )
        return " + ".join(f"{weight:g} x {trial}" for trial, weight in self.weights.items())


@dataclass(frozen=True)
class Soups:
    """What was mixed from a front's LoRAs, all of it measured on the same fresh prompts."""

    every: tuple[Soup, ...]
    """In the order in which they were measured."""
    hypervolume: float
    """Of the members and every feasible soup, each in the place that the search foresaw: between its LoRAs, or of a
    basis, where it measured on the search's prompts."""
    half_width: float | None
    """Of its 95 % interval over prompts."""
    growth_half_width: float | None
    """Of the interval of how much that is more than the members' own; paired by prompt."""

    @property
    def words(self) -> str:
        """What they are, and how many."""
        points = sum(bool(soup.mix) for soup in self.every)
        told = [f"Soups: {len(self.every) - points} mixtures of LoRAs of the front, not trained"]
        bases = f"Bases: {points} points between LoRAs that were trained together"
        return "; ".join([*(told if points < len(self.every) else []), *([bases] if points else [])])

    @property
    def members(self) -> tuple[Soup, ...]:
        """Those on the front: no member and no other soup measured at least as well in every objective."""
        return tuple(soup for soup in self.every if not soup.beaten)


@dataclass(frozen=True)
class Front:
    """The Pareto front of a run."""

    objectives: Objectives
    members: tuple[TrialResult, ...]
    """Feasible trials that no other dominates, best in the first objective first; the base model may be one. Who is a
    member, and in which order, is by the numbers of the search, also where they were measured again."""
    reference_D: Array
    """Reference point of the hypervolume, as reported: the base model minus one unit."""
    unit_D: Array
    """What an objective is counted in, fixed before any trial."""
    hypervolume: float
    """Of the members in these units, so that the base model alone has 1."""
    knee: TrialResult | None
    """The member furthest from the line through the extremes; None without a trained member."""
    chosen: tuple[TrialResult, ...]
    """The members with the numbers that they were chosen by."""
    num_candidates: int
    """Feasible trained trials that the members were chosen from, themselves included."""
    num_prompts: int = 0
    """Prompts that the members' metrics are means over."""
    fresh: Fresh | None = None
    """What is known of a front that was measured again; None if the members' metrics are those they were chosen by."""
    unit_words: Mapping[str, str] = field(default_factory=dict)
    """What the unit of an objective is, of the base model."""
    soups: Soups | None = None
    """What was mixed from its LoRAs; None where nothing was. Neither counted in ``hypervolume`` nor picked as knee."""

    @property
    def not_held(self) -> Mapping[str, str]:
        """Member -> why it does not hold its place on fresh prompts."""
        return self.fresh.not_held if self.fresh else {}

    def places_ND(self, chosen: Sequence[TrialResult]) -> Array:
        """Return where members lie by what they were chosen by, of a front of the search: the base model at 1."""
        signs_D = self.objectives.signs_D
        base_D = self.reference_D + signs_D * self.unit_D
        places_ND: Array = (self.objectives.signed_ND(chosen) - base_D * signs_D) / self.unit_D + 1.0
        return places_ND

    def best(self, name: str) -> TrialResult:
        """Return the trained member that is best in one objective, or the base model if it is alone.

        It is picked by the numbers of the search: the best of several fresh ones would be the luckiest of them again.
        One that breaks a constraint on fresh prompts is not picked.
        """
        column = self.objectives.names.index(name)
        rows = [i for i, member in enumerate(self.members) if member.trial != BASE_TRIAL and member.is_feasible]
        rows = rows or list(range(len(self.members)))
        return self.members[rows[int(self.objectives.signed_ND([self.chosen[i] for i in rows])[:, column].argmax())]]


def find_front(results: Sequence[TrialResult], objectives: Objectives, units: Mapping[str, float]) -> Front | None:
    """Return the front of the trials that ended well, or None without a base result.

    A base model that breaks a constraint is on it only while no trial keeps them all, and then covers nothing.

    Args:
        results: Trials that ended.
        objectives: What the front is over.
        units: What an objective is counted in, ``training.units``.
    """
    base = next((result for result in results if result.trial == BASE_TRIAL and result.is_ok), None)
    if base is None:
        return None
    unit_D = np.array([units[name] or 1.0 for name in objectives.names])
    signed_base_D = objectives.signed_ND([base])[0]
    candidates = [result for result in results if result.is_ok and result.is_feasible] or [base]
    values_ND = (objectives.signed_ND(candidates) - signed_base_D) / unit_D + 1.0  # the reference point is 0
    order = np.argsort(-values_ND[:, 0], kind="stable")
    is_member = non_dominated(values_ND)
    members = tuple(candidates[i] for i in order if is_member[i])
    members_ND = np.array([values_ND[i] for i in order if is_member[i]])
    counted_ND = members_ND[[member.is_feasible for member in members]]
    return Front(
        objectives=objectives,
        members=members,
        reference_D=reference_point(signed_base_D, unit_D) * objectives.signs_D,
        unit_D=unit_D,
        hypervolume=float(hypervolume(counted_ND.reshape(-1, len(unit_D)), np.zeros(len(unit_D)))),
        knee=find_knee(members, objectives),
        chosen=members,
        num_candidates=sum(result.trial != BASE_TRIAL for result in candidates),
    )


def nearest(results: Sequence[TrialResult], units: Mapping[str, float]) -> TrialResult | None:
    """Return the trained trial that breaks its constraints least, in units of what they bound; None without any."""

    def violation(result: TrialResult) -> float:
        scales = {name: units.get(name.rpartition(".")[0]) or 1.0 for name in result.constraints}
        return sum(max(bad, 0.0) / scales[name] for name, bad in result.constraints.items())

    return min((row for row in results if row.is_ok and row.trial != BASE_TRIAL), key=violation, default=None)


def find_knee(members: Sequence[TrialResult], objectives: Objectives) -> TrialResult | None:
    """Return the knee of the trained members; None where there are none."""
    trained = [member for member in members if member.trial != BASE_TRIAL]
    return trained[knee(objectives.signed_ND(trained))] if trained else None
