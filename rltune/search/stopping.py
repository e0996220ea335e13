"""When to stop a trial before its last step, and a whole sweep before its last trial. Knows nothing of Ray.

Everything here follows from what trials measured, so that a resumed sweep rebuilds it from ``metrics.jsonl`` alone.

D: objectives.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from rltune.config.experiment import RunConfig
from rltune.pareto.front import non_dominated
from rltune.pareto.rank import total_rank
from rltune.runs.layout import by_number
from rltune.runs.metrics import violations
from rltune.runs.objectives import Objectives

Array = npt.NDArray[np.float64]


class Rungs:
    """MO-ASHA (Schmucker et al. 2021, arXiv:2106.12639): trials are compared at training steps grace * reduction^k.

    At a rung a trial goes on if it is among the best 1 / reduction of those that have come so far, itself included,
    by non-dominated rank and, within a front, by its place in the epsilon-net. Whoever comes early has few to beat:
    nothing ever waits, which is what makes it asynchronous. Up to ``reduction`` trials at a rung all go on.

    Against the paper, a trial that no other at the rung dominates goes on too. With three objectives half of a sweep
    may be on that front, and to cut it down to a share cost more than it saved (experiments/README.md, Search
    samplers): what is cut are trade-offs that nobody else has.

    What a rung holds does not depend on who was stopped, or failed later on: a value that was measured at a step shows
    what can be had by then. Reports may therefore be recorded again in any order after a resume.
    """

    def __init__(self, grace: int, reduction: int) -> None:
        self._grace = grace
        self._reduction = reduction
        self._records: dict[int, dict[str, tuple[Array, float]]] = {}

    def record(self, trial: str, step: int, values_D: Array, violation: float) -> int | None:
        """Note a report and return the rung at which it counts; None if the trial has none there, or has had it.

        Args:
            trial: Its id.
            step: Training steps so far. The report counts at the highest rung up to here.
            values_D: The objectives, larger is better.
            violation: By how much it breaks its constraints in all; at most 0 if they hold.
        """
        rung = self._rung_at(step)
        if rung is None or trial in self._records.setdefault(rung, {}):
            return None
        self._records[rung][trial] = (values_D, violation)
        return rung

    def decide(self, trial: str, rung: int) -> str | None:
        """Return why a trial that was recorded at the rung falls behind there, or None if it may go on."""
        trials = sorted(self._records[rung], key=by_number)  # by id: the order in which they came must not decide ties
        num, num_kept = len(trials), math.ceil(len(self._records[rung]) / self._reduction)
        if num <= self._reduction:
            return None
        rows = [self._records[rung][name] for name in trials]
        values_ND, violation_N = np.array([values_D for values_D, _ in rows]), np.array([broken for _, broken in rows])
        num_kept = max(num_kept, int(non_dominated(values_ND[violation_N <= 0]).sum()))  # they have the first places
        place = int(total_rank(values_ND, violation_N)[trials.index(trial)])
        if place < num_kept:
            return None
        return f"rank {place + 1} of {num} at step {rung}, of which the best {num_kept} go on"

    def _rung_at(self, step: int) -> int | None:
        if step < self._grace:
            return None
        rung = self._grace
        while rung * self._reduction <= step:
            rung *= self._reduction
        return rung


def broken_in_a_row(history: Mapping[int, Mapping[str, float]], num: int) -> str | None:
    """Return which constraint was broken at each of the last ``num`` evaluations, or None.

    Args:
        history: Step of an evaluation -> constraint -> by how much it is broken, at most 0 where it holds.
        num: Evaluations in a row.
    """
    steps = sorted(history)[-num:]
    if len(steps) < num:
        return None
    for name, violation in history[steps[-1]].items():
        if all(history[step][name] > 0 for step in steps):
            often = "" if num == 1 else f", at {num} evaluations in a row"
            return f"constraint {name} broken by {violation:.3g} at step {steps[-1]}{often}"
    return None


def diverged(gains_D: Array, step: int, limit: float) -> str | None:
    """Return that a trial has diverged, or None: every objective is worse than the base model's by more than a limit.

    Every one, since a trial that pays one objective for another may be on the front. Losses are no sign: they are of
    new prompts and noise each step, and a gradient that is too long is scaled down.

    Args:
        gains_D: Objectives minus the base model's in units, larger is better.
        step: At which they were measured.
        limit: In the same unit.
    """
    if (gains_D < -limit).all():
        least = -float(gains_D.max())
        return f"diverged: every objective worse than the base model by {least:.3g} units of its scatter at step {step}"
    return None


def is_stalled(volumes: Sequence[float], num: int, tolerance: float) -> bool:
    """Whether the last ``num`` trials let the hypervolume grow by no more than a share ``tolerance`` of what it was.

    Args:
        volumes: Hypervolume after each ended trial, in order of ending, the base model's own first.
        num: Trials that may pass without growth.
        tolerance: Relative growth that does not count as one.
    """
    return len(volumes) > num and volumes[-1] <= volumes[-1 - num] * (1 + tolerance)


class Rules:
    """Every stopping rule of an experiment: ask it at each report and after each trial.

    Args:
        config: The experiment's shared run, with the sections ``search``, ``stop`` and ``constraints``.
        objectives: What is searched over.
        base: Metrics of the base model, ``eval/NAME``.
        units: What each reward and judge is counted in, ``training.units``: how much the base model's values scatter.
    """

    def __init__(
        self, config: RunConfig, objectives: Objectives, base: Mapping[str, float], units: Mapping[str, float]
    ) -> None:
        self._config = config
        self._objectives = objectives
        self._base = base
        self._units = units
        self._unit_D = np.array([units[name] or 1.0 for name in objectives.names])
        self._base_D = objectives.raw_D(base)
        search = config.search
        self._rungs = Rungs(config.first_rung, search.reduction) if search.prune else None
        self._broken: dict[str, dict[int, Mapping[str, float]]] = {}

    def on_report(self, trial: str, metrics: Mapping[str, float]) -> str | None:
        """Take a report of a running trial and return why to stop it now, or None to let it go on.

        One without an evaluation, or of step 0, where a trial is still the base model, changes nothing; nor does one
        that came before, as after a resume from a checkpoint. With ``is_final`` a trial has ended, and is not stopped.

        Args:
            trial: Its id; the base model's reports are not for this.
            metrics: Of the report: ``step``, ``eval/NAME``, ``is_final``.
        """
        rung = self._record(trial, metrics)
        if not self._counts(metrics) or metrics.get("is_final"):
            return None
        step = int(metrics["step"])
        stop = self._config.stop
        reason = None
        if stop.diverged is not None:
            reason = diverged(self._gains_D(metrics), step, stop.diverged)
        if reason is None and stop.broken_constraint is not None:
            reason = broken_in_a_row(self._broken[trial], stop.broken_constraint)
        if reason is None and self._rungs is not None and rung is not None:
            reason = self._rungs.decide(trial, rung)
        return reason

    def replay(self, trial: str, rows: Sequence[Mapping[str, float]]) -> None:
        """Take up what a trial reported before a resume: the rows of its ``metrics.jsonl``, trials in any order."""
        for row in rows:
            self._record(trial, row)

    def out_of_budget(self, *, elapsed_s: float = 0.0, gpu_s: float = 0.0) -> str | None:
        """Return which budget of the sweep is spent, or None.

        Args:
            elapsed_s: Seconds for which the sweep has run, over all its starts.
            gpu_s: Seconds of trials times GPUs a worker times workers, summed over the trials, those running and those
                that were interrupted included.
        """
        stop = self._config.stop
        if stop.hours is not None and elapsed_s >= 3600 * stop.hours:
            return f"stop.hours: {elapsed_s / 3600:.3g} of {stop.hours:g} hours are over"
        if stop.gpu_hours is not None and gpu_s >= 3600 * stop.gpu_hours:
            return f"stop.gpu_hours: {gpu_s / 3600:.3g} of {stop.gpu_hours:g} GPU-hours are spent"
        return None

    def stalled(self, volumes: Sequence[float]) -> str | None:
        """Return that the front no longer grows, or None.

        Args:
            volumes: Hypervolume after each ended trial, in order of ending, the base model's own first.
        """
        stop = self._config.stop
        if stop.stalled_trials is None or not is_stalled(volumes, stop.stalled_trials, stop.stalled_growth):
            return None
        return (
            f"stop.stalled_trials: the hypervolume grew by no more than {stop.stalled_growth:.3g} of itself, to "
            f"{volumes[-1]:.4g}, in the last {stop.stalled_trials} trials"
        )

    def _record(self, trial: str, metrics: Mapping[str, float]) -> int | None:
        if not self._counts(metrics):
            return None
        step = int(metrics["step"])
        broken = violations(self._config, metrics, self._base)
        self._broken.setdefault(trial, {})[step] = broken
        if self._rungs is None:
            return None
        total = sum(max(violation, 0.0) / self._scale(name) for name, violation in broken.items())
        return self._rungs.record(trial, step, self._gains_D(metrics), total)

    def _counts(self, metrics: Mapping[str, float]) -> bool:
        return metrics["step"] >= 1 and all(f"eval/{name}" in metrics for name in self._objectives.names)

    def _gains_D(self, metrics: Mapping[str, float]) -> Array:
        gains_D: Array = (self._objectives.raw_D(metrics) - self._base_D) * self._objectives.signs_D / self._unit_D
        return gains_D

    def _scale(self, constraint: str) -> float:
        """Return what violations are divided by before they add up: constraints differ in their units."""
        return self._units[constraint.rpartition(".")[0]] or 1.0
