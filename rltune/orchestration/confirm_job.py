"""Chosen trials measured again on fresh prompts, as one Ray Train job over the whole cluster."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train

from rltune.config.load import Experiment
from rltune.errors import RltuneError, RunError
from rltune.orchestration.job import make_ray_job
from rltune.orchestration.job_spec import JobSpec
from rltune.records import to_record
from rltune.runs.confirmations import Confirmation, comparable, missing, read_confirmations
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.record import read_record, settled, with_own_prompts
from rltune.runs.remote import bring_run
from rltune.runs.results import TrialResult
from rltune.runs.store import append_line, write_atomically
from rltune.training.heldout import fresh_prompts
from rltune.training.quiet import quiet_libraries

logger = logging.getLogger(__name__)

NEVER_S = 1e6
"""Between looks for more nodes: to grow would be to begin anew."""


def run_confirmation(
    chosen: Sequence[TrialResult],
    folder: RunFolder,
    experiment: Experiment,
    spec: JobSpec,
    *,
    num_workers: int | tuple[int, int],
) -> None:
    """Measure what was not measured yet; rows are added to ``confirmed.jsonl`` one by one.

    Args:
        chosen: Trials with their checkpoints; the base model goes without saying.
        folder: The run.
        experiment: Its experiment.
        spec: Of the base model's trial: where the run is and what a worker takes.
        num_workers: Of the job, which share the prompts; or how few and how many.

    Raises:
        UserError: The held-out prompts cannot be read.
        RunError: It could not be measured.
    """
    found, record = comparable(read_confirmations(folder)), read_record(folder)
    own = with_own_prompts(experiment.shared, folder, record)
    if found is not None and tuple(found.base.prompts) != tuple(str(prompt) for prompt in fresh_prompts(own).prompts):
        found = None  # measured on other prompts
    wanted = [(result.trial, result.checkpoint, dict(result.values)) for result in missing(chosen, found)]
    if not wanted:
        return
    if found is None:
        wanted.insert(0, (BASE_TRIAL, "", {}))
    folder.remove(folder.confirmation_failure_file)
    asked = [experiment.concrete(values) if trial != BASE_TRIAL else experiment.shared for trial, _, values in wanted]
    configs = [settled(config, record).model_dump(mode="json") for config in asked]
    jobs = [
        {"trial": trial, "checkpoint": checkpoint, "config": config}
        for (trial, checkpoint, _), config in zip(wanted, configs, strict=True)
    ]
    try:
        make_ray_job(
            _worker,
            {"spec": spec, "jobs": jobs},
            spec,
            name="confirm",
            storage=folder.scratch_dir,
            workers=num_workers,
            grow_after_s=NEVER_S,
        ).fit()
    except Exception as error:  # ray raises whatever its layers raise
        raise RunError(f"what was chosen could not be measured on fresh prompts: {_why(folder) or error}") from error
    if why := _why(folder):
        raise RunError(f"what was chosen could not be measured on fresh prompts: {why}")


def _why(folder: RunFolder) -> str:
    file = folder.confirmation_failure_file
    folder.bring(file)
    return file.read_text().strip() if file.is_file() else ""


def _worker(config: dict[str, Any]) -> None:
    """Measure the candidates as one of several workers; the first one writes."""
    from rltune.config.experiment import RunConfig
    from rltune.training.confirm import Candidate, confirm

    rank = ray.train.get_context().get_world_rank()
    spec: JobSpec = config["spec"].of_worker(rank)
    folder = spec.folder
    bring_run(folder)
    folder.bring(
        folder.confirmed_file, *(folder.path / job["checkpoint"] for job in config["jobs"] if job["checkpoint"])
    )
    record = read_record(folder)
    if Path(spec.work_dir).is_dir():
        os.chdir(spec.work_dir)
    quiet_libraries()
    is_main = rank == 0
    jobs = {job["trial"]: job for job in config["jobs"]}
    candidates = [
        Candidate(
            trial,
            with_own_prompts(RunConfig.model_validate(job["config"]), folder, record),
            folder.path / job["checkpoint"] if job["checkpoint"] else None,
        )
        for trial, job in jobs.items()
    ]
    fresh = fresh_prompts(candidates[0].config)

    def take(trial: str, metrics: dict[str, float], values: dict[str, list[float]]) -> None:
        if is_main:
            row = Confirmation(
                trial,
                jobs[trial]["checkpoint"],
                len(fresh.prompts),
                metrics,
                values=values,
                prompts=fresh.prompts,
                num_reused=fresh.num_reused,
            )
            append_line(folder.confirmed_file, json.dumps(to_record(asdict(row)), allow_nan=False))
            folder.publish(folder.confirmed_file)

    try:
        confirm(candidates, take)
    except RltuneError as error:
        write_atomically(folder.confirmation_failure_file, f"{error}\n")
        folder.publish(folder.confirmation_failure_file)
        if ray.train.get_context().get_world_size() > 1:
            raise
