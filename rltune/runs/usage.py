"""Where a run's time went: worker-seconds of its slots, by what they were spent on. Read from events and rows alone.

A slot is room for one worker: trials at a time, times workers per trial. The clock runs from a driver's start to its
end, its own start-up of Ray left out; while no driver ran it stands still.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rltune.runs.events import EVENTS_FILE, NOTICE, Event
from rltune.runs.layout import BASE_TRIAL, RunFolder

KINDS: Mapping[str, str] = {
    "training": "training steps",
    "evaluation": "evaluations of trials",
    "starting": "starting workers: processes, imports",
    "loading": "loading model and rewards, preparing adapters",
    "reporting": "reports and checkpoints, between steps",
    "ending": "from a trial's last step to its record",
    "lost": "steps done again after a kill, since the last checkpoint",
    "base": "the base model: its evaluation and calibration",
    "waiting": "slots without a trial before the last one was suggested",
    "idle": "slots without a trial after the last one was suggested",
}
"""What a slot can be spent on, in words."""

_PHASES = {
    "suggested": "starting",
    "worker_started": "loading",
    "loaded": "loading",
    "first_step": "running",
    "reported": "running",
    "trained": "ending",
}
"""An event -> what the trial does from then on."""


@dataclass(frozen=True)
class Work:
    """What the rows of a trial's ``metrics.jsonl`` say, in worker-seconds."""

    training_s: float = 0.0
    evaluation_s: float = 0.0


@dataclass(frozen=True)
class Usage:
    """Worker-seconds of a run."""

    total_s: float
    """Slots times wall time."""
    seconds: Mapping[str, float]
    """By kind, in the order of ``KINDS``; they add up to the total."""

    @property
    def utilisation(self) -> float:
        """Share of the total that was spent in training steps."""
        return self.seconds["training"] / self.total_s


@dataclass(frozen=True)
class Spent:
    """What budgets are held against."""

    elapsed_s: float
    """While drivers ran."""
    gpu_s: float
    """While trials held GPUs, times how many."""


@dataclass(frozen=True)
class _Period:
    """From a driver's start to its end or last sign of life."""

    start: float
    end: float
    trials_at_once: int
    workers: int
    gpus_per_worker: float = 0.0


@dataclass
class _Spent:
    """What has been added up so far."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys([*KINDS, "running"], 0.0))
    busy: list[tuple[float, float, int]] = field(default_factory=list)
    """Start, end and workers of every stretch in which a trial held its slots."""
    gpu_s: float = 0.0

    def add(self, kind: str, start: float, end: float, period: _Period) -> None:
        self.seconds[kind] += (end - start) * period.workers
        self.busy.append((start, end, period.workers))
        self.gpu_s += (end - start) * period.workers * period.gpus_per_worker


def work_of(rows: Sequence[Mapping[str, Any]]) -> Work:
    """Return what a trial's rows add up to; each row was a step of as many workers as it says."""
    return Work(
        sum(row.get("step_s", 0.0) * row.get("workers", 1) for row in rows),
        sum(row.get("eval_s", 0.0) * row.get("workers", 1) for row in rows),
    )


def last_sign(folder: RunFolder) -> float:
    """Return when a trial of the run last wrote a row or an event; 0 where none did."""
    files = [*folder.path.glob("trials/*/metrics.jsonl"), *folder.path.glob(f"trials/*/{EVENTS_FILE}")]
    return max((file.stat().st_mtime for file in files), default=0.0)


def measure(
    run_events: Sequence[Event],
    trial_events: Mapping[str, Sequence[Event]],
    works: Mapping[str, Work],
    *,
    now: float,
    is_all_suggested: bool = True,
) -> Usage | None:
    """Return where the time of a run went, or None where nothing of it was noted.

    Args:
        run_events: When drivers started and ended; a kill leaves no end, and then the next start knows the last sign of
            life before it.
        trial_events: Trial -> its events.
        works: Trial -> what its rows add up to.
        now: End of a driver that has not ended: the time if it runs, its last sign of life if it was killed.
        is_all_suggested: Whether no trial is still to be suggested, so that an empty slot has nothing left to wait for.
    """
    periods = list(_periods(run_events, now))
    total_s = sum((period.end - period.start) * period.trials_at_once * period.workers for period in periods)
    if total_s <= 0:
        return None
    spent = _spent_in(periods, trial_events)
    seconds = spent.seconds
    seconds["training"] = sum(work.training_s for work in works.values())
    seconds["evaluation"] = sum(work.evaluation_s for work in works.values())
    # a row's step may have ended between two clocks: what is left of a trial's time cannot be less than nothing
    seconds["reporting"] = max(seconds.pop("running") - seconds["training"] - seconds["evaluation"], 0.0)
    empty_s = max(total_s - sum(seconds.values()), 0.0)
    if is_all_suggested:
        seconds["idle"] = min(_empty_at_the_end(trial_events, periods[-1], spent.busy), empty_s)
    seconds["waiting"] = empty_s - seconds["idle"]
    return Usage(total_s, seconds)


def spent(run_events: Sequence[Event], trial_events: Mapping[str, Sequence[Event]], *, now: float) -> Spent:
    """Return what a run has spent, over all its starts; the arguments are those of ``measure``.

    A trial that was interrupted has held its GPUs up to the last sign of life of its driver.
    """
    periods = list(_periods(run_events, now))
    elapsed_s = sum(period.end - period.start for period in periods)
    return Spent(elapsed_s, _spent_in(periods, trial_events).gpu_s)


def _spent_in(periods: Sequence[_Period], trial_events: Mapping[str, Sequence[Event]]) -> _Spent:
    spent = _Spent()
    for trial, events in trial_events.items():
        _add_trial(spent, [event for event in events if event.event != NOTICE], periods, is_base=trial == BASE_TRIAL)
    return spent


def _periods(run_events: Sequence[Event], now: float) -> Iterator[_Period]:
    open_since: Event | None = None
    for event in [*run_events, Event(now, "now", {})]:
        if open_since is not None:
            end = event.time
            if event.event == "driver_started":  # the one before was killed, some time before this one started
                end = min(max(float(event.fields.get("last_sign", 0.0)), open_since.time), event.time)
            fields = open_since.fields
            yield _Period(
                open_since.time,
                max(end, open_since.time),
                int(fields["trials_at_once"]),
                int(fields["workers"]),
                float(fields.get("gpus_per_worker", 0.0)),
            )
        open_since = event if event.event == "driver_started" else None


def _add_trial(spent: _Spent, events: Sequence[Event], periods: Sequence[_Period], *, is_base: bool) -> None:
    for event, following in pairwise([*events, None]):
        assert event is not None  # only the last is None
        phase = _PHASES.get(event.event)
        period = next((period for period in periods if period.start <= event.time <= period.end), None)
        if phase is None or period is None:
            continue
        end = min(following.time, period.end) if following else period.end
        if is_base:
            phase = "base"
        elif phase == "running" and following is not None and following.event in ("suggested", "worker_started"):
            phase = "lost"  # it was killed, and its rows since the last checkpoint were taken back
        spent.add(phase, event.time, end, period)


def _empty_at_the_end(
    trial_events: Mapping[str, Sequence[Event]], period: _Period, busy: Sequence[tuple[float, float, int]]
) -> float:
    """Return the worker-seconds of empty slots since the last trial was suggested."""
    suggested = [event.time for events in trial_events.values() for event in events if event.event == "suggested"]
    since = max([period.start, *suggested])
    used_s = sum(max(end - max(start, since), 0.0) * workers for start, end, workers in busy)
    return max((period.end - since) * period.trials_at_once * period.workers - used_s, 0.0)
