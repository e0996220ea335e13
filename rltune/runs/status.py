"""Where a run stands, read from its folder alone: the live table and ``rltune status`` are the same reading."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from rltune.config.load import Experiment
from rltune.runs.events import NOTICE, Event, read_events
from rltune.runs.following import Following
from rltune.runs.fronts import read_front
from rltune.runs.layout import BASE_TRIAL, RunFolder, TrialSpec, by_number, read_trial
from rltune.runs.objectives import Front
from rltune.runs.results import TrialResult, read_results
from rltune.runs.usage import Usage, Work, measure, spent, work_of

T = TypeVar("T")
ENDED = ("done", "stopped", "failed")
"""States of a trial that has a result."""


@dataclass(frozen=True)
class TrialStatus:
    """One row of the trial table."""

    trial: str
    state: str
    """``starting``, ``running``, ``interrupted``, ``done``, ``stopped`` or ``failed``."""
    step: int
    num_steps: int
    values: Mapping[str, Any]
    metrics: Mapping[str, float]
    """The newest evaluation; empty before the first."""
    reason: str
    """Why it was stopped or failed."""
    is_on_front: bool
    is_feasible: bool
    notices: tuple[str, ...] = ()
    """What its user should know of it, in order."""
    place: int = -1
    """Among trials that ended, 0 the first; -1 before."""

    @property
    def has_ended(self) -> bool:
        """Whether it has a result."""
        return self.state in ENDED


@dataclass(frozen=True)
class RunStatus:
    """A run at a moment."""

    name: str
    is_active: bool
    """Whether a process works on it."""
    trials: tuple[TrialStatus, ...]
    num_trials: int
    """Trained trials that the run will have."""
    front: Front | None
    elapsed_s: float
    """In which a process worked on the run, over all its starts; of a killed one up to its last sign of life."""
    step_s: float | None
    """Mean seconds of an optimiser step so far."""
    trial_s: float | None
    """Mean seconds of the trained trials that ended."""
    usage: Usage | None = None
    """Where the time went; None where the run noted no events."""

    @property
    def num_ended(self) -> int:
        """Trained trials that ended."""
        return sum(trial.has_ended for trial in self.trials if trial.trial != BASE_TRIAL)

    @property
    def remaining_s(self) -> float | None:
        """A rough time left, as if trials still to come took as long as those that ended; None without one."""
        running = [trial for trial in self.trials if trial.state in ("starting", "running") and trial.num_steps]
        left = self.num_trials - self.num_ended - sum(trial.step / trial.num_steps for trial in running)
        if not self.is_active or self.trial_s is None or self.num_ended >= self.num_trials:
            return None
        return self.trial_s * left / max(len(running), 1)


@dataclass(frozen=True)
class _Digest:
    """What the table needs of a trial's rows."""

    num_rows: int = 0
    step: int = 0
    step_s: float = 0.0
    """Sum over rows."""
    evaluation: Mapping[str, float] = field(default_factory=dict)
    """The newest row with one."""
    work: Work = field(default_factory=Work)
    last_sign: float = 0.0


class _Cached(Generic[T]):
    """What a file says, read again only when its time or size has changed."""

    def __init__(self, read: Callable[[Path], T]) -> None:
        self._read = read
        self._known: dict[Path, tuple[tuple[int, int], T]] = {}

    def __call__(self, path: Path, *, is_final: bool = False) -> T:
        """Return what ``path`` says; one that ``is_final`` is not even looked at once it has been read."""
        known = self._known.get(path)
        if known is not None and is_final:
            return known[1]
        stamp = _stamp(path)
        if known is None or known[0] != stamp:
            known = self._known[path] = (stamp, self._read(path))
        return known[1]


class _Followed:
    """The digest of a file of rows, each read once."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int], Following, _Digest]] = {}

    def __call__(self, path: Path, *, is_final: bool = False) -> _Digest:
        """Return what ``path`` says; one that ``is_final`` is not even looked at once it has been read."""
        stamp, following, digest = self._known.get(path, ((-1, -1), Following(path), _Digest()))
        if is_final and stamp != (-1, -1):
            return digest
        now = _stamp(path)
        if now != stamp:
            is_anew, rows = following.read()
            digest = _with_rows(_Digest() if is_anew else digest, rows, last_sign=now[0] / 1e9)
            self._known[path] = (now, following, digest)
        return digest


class StatusReader:
    """Reads a run again and again, at the cost of what has changed; safe while another process writes to it."""

    def __init__(self, folder: RunFolder, experiment: Experiment) -> None:
        self._folder = folder
        self._experiment = experiment
        self._specs = _Cached(read_trial)
        self._digests = _Followed()
        self._events = _Cached(read_events)
        self._results = _Cached(read_results)
        self._num_steps: dict[str, int] = {BASE_TRIAL: 0}
        self._final: set[str] = set()
        """Trials whose files were read after their results: they change no more."""
        self._front = _Cached(lambda _: read_front(folder, experiment))

    def read(self) -> RunStatus:
        """Return where the run stands."""
        folder = self._folder
        is_active = folder.is_locked
        all_results = self._results(folder.results_file)
        results = {result.trial: result for result in all_results}
        places = {result.trial: place for place, result in enumerate(all_results)}
        front = self._front(folder.results_file)
        members = {member.trial for member in front.members} if front else set()
        files = {file.parent.name: file for file in folder.trial_files()}
        specs = {trial: self._specs(file, is_final=trial in self._final) for trial, file in files.items()}
        trials, events, digests = [], dict[str, Sequence[Event]](), dict[str, _Digest]()
        for trial in sorted({BASE_TRIAL, *specs, *results}, key=by_number):
            result = results.get(trial)
            is_final = trial in self._final
            digest = self._digests(folder.trial_dir(trial) / "metrics.jsonl", is_final=is_final)
            events[trial] = self._events(folder.trial_events_file(trial), is_final=is_final)
            digests[trial] = digest
            has_ended = trial != BASE_TRIAL and any(event.event == "ended" for event in events[trial])
            if result is not None and (has_ended or not is_active):
                self._final.add(trial)  # the end is noted just before the result: nothing comes after both
            trials.append(
                TrialStatus(
                    trial=trial,
                    state=_state(result, has_rows=digest.num_rows > 0, is_active=is_active),
                    step=digest.step or _stopped_at(result),
                    num_steps=self._steps_of(trial, specs.get(trial)),
                    values=specs[trial].values if trial in specs else {},
                    metrics=result.metrics if result else digest.evaluation,
                    reason=result.reason if result else "",
                    is_on_front=trial in members,
                    is_feasible=result.is_feasible if result else True,
                    notices=tuple(str(e.fields.get("text", "")) for e in events[trial] if e.event == NOTICE),
                    place=places.get(trial, -1),
                )
            )
        start = folder.experiment_file.stat().st_mtime
        last_sign = max([start, *(digest.last_sign for digest in digests.values())])
        num_rows = sum(digest.num_rows for digest in digests.values())
        ended = [result.duration_s for result in results.values() if result.trial != BASE_TRIAL and result.is_ok]
        num_trials = self._experiment.num_trials
        run_events = self._events(folder.events_file)
        now = time.time() if is_active else max([last_sign, *(e.time for row in events.values() for e in row)])
        return RunStatus(
            name=folder.name,
            is_active=is_active,
            trials=tuple(trials),
            num_trials=num_trials,
            front=front,
            elapsed_s=spent(run_events, {}, now=now).elapsed_s if run_events else now - start,
            step_s=sum(digest.step_s for digest in digests.values()) / num_rows if num_rows else None,
            trial_s=sum(ended) / len(ended) if ended else None,
            usage=measure(
                run_events,
                events,
                {trial: digest.work for trial, digest in digests.items()},
                now=now,
                is_all_suggested=len(specs.keys() - {BASE_TRIAL}) >= num_trials,
            ),
        )

    def _steps_of(self, trial: str, spec: TrialSpec | None) -> int:
        if trial not in self._num_steps:
            self._num_steps[trial] = self._experiment.concrete(spec.values if spec else {}).num_rounds
        return self._num_steps[trial]


def read_status(folder: RunFolder, experiment: Experiment) -> RunStatus:
    """Return where the run stands, once."""
    return StatusReader(folder, experiment).read()


def _with_rows(before: _Digest, rows: Sequence[Mapping[str, Any]], *, last_sign: float) -> _Digest:
    """Return a digest with rows that have come since."""
    work = work_of(rows)
    return _Digest(
        num_rows=before.num_rows + len(rows),
        step=int(rows[-1]["step"]) if rows else before.step,
        step_s=before.step_s + sum(row["step_s"] for row in rows),
        evaluation=next((row for row in reversed(rows) if _is_evaluated(row)), before.evaluation),
        work=Work(before.work.training_s + work.training_s, before.work.evaluation_s + work.evaluation_s),
        last_sign=last_sign,
    )


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)


def _stopped_at(result: TrialResult | None) -> int:
    return int(result.metrics["step"]) if result is not None and result.state == "stopped" else 0


def _state(result: TrialResult | None, *, has_rows: bool, is_active: bool) -> str:
    if result is not None:
        return "done" if result.state == "ok" else result.state
    if not is_active:
        return "interrupted"
    return "running" if has_rows else "starting"


def _is_evaluated(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in row)
