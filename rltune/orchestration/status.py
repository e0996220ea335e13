"""Where a run stands, read from its folder alone: the live table and ``rltune status`` are the same reading."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rltune.config.load import Experiment
from rltune.orchestration.objectives import Front
from rltune.orchestration.results import TrialResult, read_results
from rltune.orchestration.rundir import BASE_TRIAL, RunFolder
from rltune.orchestration.sweep import read_front
from rltune.training.reporter import read_metrics


@dataclass(frozen=True)
class TrialStatus:
    """One row of the trial table."""

    trial: str
    state: str
    """``starting``, ``running``, ``interrupted``, ``done`` or ``failed``."""
    step: int
    num_steps: int
    values: Mapping[str, Any]
    metrics: Mapping[str, float]
    """The newest evaluation; empty before the first."""
    reason: str
    is_on_front: bool
    is_feasible: bool


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
    """Since the run was started or resumed, up to the last sign of life."""
    step_s: float | None
    """Mean seconds of an optimiser step so far."""
    trial_s: float | None
    """Mean seconds of the trained trials that ended."""

    @property
    def num_ended(self) -> int:
        """Trained trials that ended."""
        return sum(trial.state in ("done", "failed") for trial in self.trials if trial.trial != BASE_TRIAL)

    @property
    def remaining_s(self) -> float | None:
        """A rough time left, as if trials still to come took as long as those that ended; None without one."""
        running = [trial for trial in self.trials if trial.state in ("starting", "running") and trial.num_steps]
        left = self.num_trials - self.num_ended - sum(trial.step / trial.num_steps for trial in running)
        if not self.is_active or self.trial_s is None or self.num_ended >= self.num_trials:
            return None
        return self.trial_s * left / max(len(running), 1)


def read_status(folder: RunFolder, experiment: Experiment) -> RunStatus:
    """Return where the run stands; safe while another process writes to it."""
    is_active = folder.is_locked
    results = {result.trial: result for result in read_results(folder.results_file)}
    front = read_front(folder, experiment)
    members = {member.trial for member in front.members} if front else set()
    specs = {spec.id: spec.values for spec in folder.read_trials()}
    trials = []
    step_times: list[float] = []
    last_sign = start = _created(folder)
    for trial in sorted({BASE_TRIAL, *specs, *results}):
        values = specs.get(trial, {})
        config = experiment.concrete(values) if trial != BASE_TRIAL else experiment.shared
        rows = read_metrics(folder.trial_dir(trial) / "metrics.jsonl")
        step_times += [row["step_s"] for row in rows]
        last_sign = max(last_sign, _last_sign(folder, trial))
        result = results.get(trial)
        trials.append(
            TrialStatus(
                trial=trial,
                state=_state(result, has_rows=bool(rows), is_active=is_active),
                step=int(rows[-1]["step"]) if rows else 0,
                num_steps=0 if trial == BASE_TRIAL else config.num_rounds,
                values=values,
                metrics=result.metrics if result else next((row for row in reversed(rows) if _is_evaluated(row)), {}),
                reason=result.reason if result else "",
                is_on_front=trial in members,
                is_feasible=result.is_feasible if result else True,
            )
        )
    return RunStatus(
        name=folder.name,
        is_active=is_active,
        trials=tuple(trials),
        num_trials=experiment.num_trials,
        front=front,
        elapsed_s=(time.time() if is_active else last_sign) - start,
        step_s=_mean(step_times),
        trial_s=_mean([r.duration_s for r in results.values() if r.trial != BASE_TRIAL and r.is_ok]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _state(result: TrialResult | None, *, has_rows: bool, is_active: bool) -> str:
    if result is not None:
        return "done" if result.is_ok else "failed"
    if not is_active:
        return "interrupted"
    return "running" if has_rows else "starting"


def _is_evaluated(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in row)


def _created(folder: RunFolder) -> float:
    return folder.experiment_file.stat().st_mtime


def _last_sign(folder: RunFolder, trial: str) -> float:
    path = folder.trial_dir(trial) / "metrics.jsonl"
    return path.stat().st_mtime if path.is_file() else 0.0
