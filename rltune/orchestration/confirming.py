"""The front of a sweep measured again on fresh prompts, as one Ray Train job over the whole cluster."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray.train

from rltune.config.load import Experiment
from rltune.errors import RltuneError, RunError
from rltune.orchestration.job import JobSpec, make_ray_job, quiet_libraries
from rltune.orchestration.objectives import Front, Objectives, find_front
from rltune.orchestration.results import TrialResult, append_line
from rltune.orchestration.rundir import BASE_TRIAL, RunFolder, write_atomically
from rltune.training.reporter import read_json_lines
from rltune.training.selection import violations

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Confirmation:
    """What one trial, or the base model, measured on fresh prompts."""

    trial: str
    checkpoint: str
    """Which of the trial's checkpoints it was, as ``TrialResult.checkpoint``."""
    num_prompts: int
    metrics: Mapping[str, float]
    spread: Mapping[str, float]
    """Standard deviation over prompts of each reward and judge."""


def read_confirmations(folder: RunFolder) -> list[Confirmation]:
    """Return the fresh measurements of a run, in the order in which they were made."""
    return [Confirmation(**row) for row in read_json_lines(folder.confirmed_file)]


def confirmed_front(front: Front, experiment: Experiment, confirmations: Sequence[Confirmation]) -> Front | None:
    """Return the front of a front's members by their fresh measurements; None unless all of them have one.

    Members that others dominate there, or that break a constraint, are in ``dropped``.
    """
    newest = {(row.trial, row.checkpoint): row for row in confirmations}
    base = newest.get((BASE_TRIAL, ""))
    members = [member for member in front.members if member.trial != BASE_TRIAL]
    fresh = [newest.get((member.trial, member.checkpoint)) for member in members]
    if base is None or any(row is None for row in fresh):
        return None
    config = experiment.shared
    results = [
        replace(member, metrics=row.metrics, constraints=violations(config, row.metrics, base.metrics))
        for member, row in zip(members, fresh, strict=True)
        if row is not None
    ]
    base_result = TrialResult(BASE_TRIAL, "ok", {}, {}, metrics=base.metrics)
    found = find_front([base_result, *results], Objectives(config.objective_names), base.spread)
    if found is None:
        return None
    kept = {member.trial for member in found.members}
    dropped = tuple(result for result in results if result.trial not in kept)
    return replace(found, dropped=dropped, num_fresh_prompts=base.num_prompts, num_prompts=base.num_prompts)


def missing(front: Front, confirmations: Sequence[Confirmation]) -> list[TrialResult]:
    """Return the trained members of a front that were not measured on fresh prompts yet."""
    done = {(row.trial, row.checkpoint) for row in confirmations}
    return [m for m in front.members if m.trial != BASE_TRIAL and (m.trial, m.checkpoint) not in done]


def run_confirmation(
    front: Front, folder: RunFolder, experiment: Experiment, spec: JobSpec, *, num_workers: int
) -> None:
    """Measure what of a front was not measured yet; rows are added to ``confirmed.jsonl`` one by one.

    Args:
        front: By the evaluations that trials were chosen by.
        folder: The run.
        experiment: Its experiment.
        spec: Of the base model's trial: where the run is and what a worker takes.
        num_workers: Of the job; they share the prompts.

    Raises:
        RunError: It could not be measured.
    """
    confirmations = read_confirmations(folder)
    wanted = [(m.trial, m.checkpoint, dict(m.values)) for m in missing(front, confirmations)]
    if not wanted:
        return
    if not any(row.trial == BASE_TRIAL for row in confirmations):
        wanted.insert(0, (BASE_TRIAL, "", {}))
    folder.confirmation_failure_file.unlink(missing_ok=True)
    configs = [
        (experiment.concrete(values) if trial != BASE_TRIAL else experiment.shared).model_dump(mode="json")
        for trial, _, values in wanted
    ]
    jobs = [
        {"trial": trial, "checkpoint": checkpoint, "config": config}
        for (trial, checkpoint, _), config in zip(wanted, configs, strict=True)
    ]
    try:
        make_ray_job(
            _worker, {"spec": spec, "jobs": jobs}, spec, name="confirm", storage=folder.scratch_dir, workers=num_workers
        ).fit()
    except Exception as error:  # ray raises whatever its layers raise
        raise RunError(f"the front could not be measured on fresh prompts: {_why(folder) or error}") from error
    if why := _why(folder):
        raise RunError(f"the front could not be measured on fresh prompts: {why}")


def _why(folder: RunFolder) -> str:
    file = folder.confirmation_failure_file
    return file.read_text().strip() if file.is_file() else ""


def _worker(config: dict[str, Any]) -> None:
    """Measure the candidates as one of several workers; the first one writes."""
    from rltune.config.experiment import RunConfig
    from rltune.training.confirm import Candidate, confirm, fresh_prompts

    spec: JobSpec = config["spec"]
    folder = spec.folder
    if Path(spec.work_dir).is_dir():
        os.chdir(spec.work_dir)
    quiet_libraries()
    is_main = ray.train.get_context().get_world_rank() == 0
    jobs = {job["trial"]: job for job in config["jobs"]}
    candidates = [
        Candidate(
            trial,
            RunConfig.model_validate(job["config"]),
            folder.path / job["checkpoint"] if job["checkpoint"] else None,
        )
        for trial, job in jobs.items()
    ]
    num_prompts = len(fresh_prompts(candidates[0].config))

    def take(trial: str, metrics: dict[str, float], spread: dict[str, float]) -> None:
        if is_main:
            row = Confirmation(trial, jobs[trial]["checkpoint"], num_prompts, metrics, spread)
            append_line(folder.confirmed_file, json.dumps(asdict(row), allow_nan=False))

    try:
        confirm(candidates, take)
    except RltuneError as error:
        write_atomically(folder.confirmation_failure_file, f"{error}\n")
        if ray.train.get_context().get_world_size() > 1:
            raise
