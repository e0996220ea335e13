"""From a trial's metrics to what is searched over: objectives with a direction, front.

N: trials. D: objectives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rltune.orchestration.results import TrialResult
from rltune.orchestration.rundir import BASE_TRIAL
from rltune.pareto.front import non_dominated
from rltune.pareto.hypervolume import hypervolume, reference_point
from rltune.pareto.knee import knee
from rltune.training.evaluation import JUDGES

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
class Front:
    """The Pareto front of a run."""

    objectives: Objectives
    members: tuple[TrialResult, ...]
    """Feasible trials that no other dominates, best in the first objective first; the base model may be one."""
    reference_D: Array
    """Reference point of the hypervolume, as reported: the base model minus one standard deviation over prompts."""
    hypervolume: float
    """Of the members, in units of the standard deviations, so that 1 is one of them in every objective."""
    knee: TrialResult | None
    """The member furthest from the line through the extremes; None without a trained member."""
    dropped: tuple[TrialResult, ...] = ()
    """Of a front that was measured again: who was a member by the evaluations of the search and is none any more."""
    num_fresh_prompts: int = 0
    """Prompts that it was measured on again; 0 if the members' metrics are those they were chosen by."""
    num_prompts: int = 0
    """Prompts that the members' metrics are means over."""

    def best(self, name: str) -> TrialResult:
        """Return the trained member that is best in one objective, or the base model if it is alone."""
        column = self.objectives.names.index(name)
        trained = [member for member in self.members if member.trial != BASE_TRIAL] or list(self.members)
        return trained[int(self.objectives.signed_ND(trained)[:, column].argmax())]


def find_front(results: Sequence[TrialResult], objectives: Objectives, spread: Mapping[str, float]) -> Front | None:
    """Return the front of the trials that ended well, or None without a base result.

    Args:
        results: Trials that ended.
        objectives: What the front is over.
        spread: The base model's standard deviation over held-out prompts, per objective.
    """
    base = next((result for result in results if result.trial == BASE_TRIAL and result.is_ok), None)
    if base is None:
        return None
    unit_D = np.array([spread[name] or 1.0 for name in objectives.names])
    signed_base_D = objectives.signed_ND([base])[0]
    candidates = [result for result in results if result.is_ok and (result.is_feasible or result is base)]
    values_ND = (objectives.signed_ND(candidates) - signed_base_D) / unit_D + 1.0  # the reference point is 0
    order = np.argsort(-values_ND[:, 0], kind="stable")
    is_member = non_dominated(values_ND)
    members = [candidates[i] for i in order if is_member[i]]
    members_ND = np.array([values_ND[i] for i in order if is_member[i]])
    trained = [i for i, member in enumerate(members) if member.trial != BASE_TRIAL]
    middle = members[trained[knee(members_ND[trained])]] if trained else None
    return Front(
        objectives=objectives,
        members=tuple(members),
        reference_D=reference_point(signed_base_D, unit_D) * objectives.signs_D,
        hypervolume=float(hypervolume(members_ND, np.zeros(len(objectives.names)))),
        knee=middle,
    )
