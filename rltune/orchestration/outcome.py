"""How a trial ended, judged from what is left of it: its last report, its failure, its checkpoints."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rltune.config.experiment import RunConfig
from rltune.errors import RunError
from rltune.runs.layout import BASE_TRIAL, RunFolder, TrialSpec
from rltune.runs.metrics import violations
from rltune.runs.objectives import Objectives
from rltune.runs.results import TrialResult
from rltune.search.searcher import is_finite
from rltune.training.checkpoint import list_checkpoints, read_checkpoint_meta, why_not_handed_on

HandedOn = tuple[str, dict[str, float]]
"""A checkpoint, relative to the run folder, and its metrics."""


@dataclass(frozen=True)
class Ending:
    """What is known when a trial no longer runs."""

    spec: TrialSpec
    last: Mapping[str, Any]
    """Its last report."""
    failure: str
    """What it failed with; empty where nothing failed."""
    stopped: str
    """Why the sweep stopped it; empty where it did not."""
    duration_s: float
    checkpoints: Path
    """Where its checkpoints lie."""


def judge(
    ending: Ending,
    config: RunConfig,
    objectives: Objectives,
    base: Mapping[str, float] | None,
    find: Callable[[Mapping[str, float]], HandedOn | None],
) -> TrialResult | None:
    """Return a trial's result, or None where it was interrupted: the same command takes it up again.

    Args:
        ending: What is left of it.
        config: What all trials share.
        objectives: What must be finite.
        base: What the base model measured; None while that is what has ended.
        find: From the metrics of its last report to the checkpoint that it is.
    """
    spec, failure, stopped = ending.spec, ending.failure, ending.stopped
    if not failure and not stopped and ending.last.get("is_final") != 1.0:
        return None
    checkpoint, metrics = "", kept_metrics(ending.last)
    if not failure and spec.id != BASE_TRIAL:
        found = find(metrics)
        if found is None:
            failure = f"no whole checkpoint of an evaluation is left in {ending.checkpoints}"
        else:
            checkpoint, metrics = found
    if not failure and not is_finite(metrics, objectives):
        failure = f"an objective is missing or a metric is not finite: {metrics}"
    if failure:
        return failed(spec, failure, duration_s=ending.duration_s)
    return TrialResult(
        trial=spec.id,
        state="stopped" if stopped else "ok",
        values=spec.values,
        params=spec.params,
        metrics=metrics,
        constraints=violations(config, metrics, base or metrics),
        reason=stopped,
        checkpoint=checkpoint,
        duration_s=round(ending.duration_s, 3),
        ended_at=_now(),
    )


def failed(spec: TrialSpec, reason: str, *, duration_s: float = 0.0) -> TrialResult:
    """Return the result of a trial that failed."""
    return TrialResult(
        trial=spec.id,
        state="failed",
        values=spec.values,
        params=spec.params,
        reason=reason,
        duration_s=round(duration_s, 3),
        ended_at=_now(),
    )


def find_checkpoint(folder: RunFolder, trial: str, metrics: Mapping[str, float]) -> HandedOn | None:
    """Return the checkpoint that a trial is, and its metrics; None where none is whole.

    A trial that is stopped trains on for a moment, and a checkpoint may be broken: where that of the last report is
    not to be had, the trial is what its newest whole checkpoint says it is.

    Args:
        folder: The run.
        trial: Its id.
        metrics: Of its last report.
    """
    found = []
    for path in list_checkpoints(folder.checkpoints_dir(trial)):
        with suppress(RunError):
            meta = read_checkpoint_meta(path)
            # one that was written in haste, between evaluations, hands on adapters that nobody has measured
            if meta.selected or (meta.last and meta.last.step == meta.progress.step):
                found.append((path, meta.metrics))
    found.sort(key=lambda row: row[1]["step"] != metrics.get("step"))  # stable: the others stay newest first
    for path, its_metrics in found:  # Tune waits meanwhile: what is hashed is the file that is handed on, of one
        if not why_not_handed_on(path):
            return str(path.relative_to(folder.path)), kept_metrics(its_metrics)
    return None


def kept_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Return what a result keeps of a report, to which Tune adds its own."""
    kept = ("step", "selected_step", "images_seen")
    return {name: float(value) for name, value in report.items() if name.startswith(("eval/", "gain/")) or name in kept}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
