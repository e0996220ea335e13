"""Chosen trials, and mixtures of them, measured on fresh prompts: one Ray Train job over the whole cluster."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
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
from rltune.runs.mixtures import Mixture
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
    asked = [experiment.concrete(values) if trial != BASE_TRIAL else experiment.shared for trial, _, values in wanted]
    configs = [settled(config, record).model_dump(mode="json") for config in asked]
    jobs = [
        {"name": trial, "config": config, "parts": [(config, checkpoint, 1.0)] if checkpoint else []}
        for (trial, checkpoint, _), config in zip(wanted, configs, strict=True)
    ]
    _measure(jobs, folder, spec, num_workers)


def run_mixtures(
    mixtures: Sequence[Mixture],
    trials: Mapping[str, TrialResult],
    folder: RunFolder,
    experiment: Experiment,
    spec: JobSpec,
    *,
    num_workers: int | tuple[int, int],
) -> None:
    """Measure mixtures on the prompts and noise of the confirmation; rows are added to ``mixtures.jsonl`` one by one.

    Args:
        mixtures: What is wanted, without measurements.
        trials: Their LoRAs.
        folder: The run; arguments that follow are those of ``run_confirmation``.

    Raises:
        UserError: The held-out prompts cannot be read.
        RunError: They could not be measured.
    """
    record, jobs = read_record(folder), []
    for mixture in mixtures:
        parts = [
            (
                settled(experiment.concrete(trials[trial].values), record).model_dump(mode="json"),
                mixture.checkpoints[trial],
                weight,
            )
            for trial, weight in mixture.weights.items()
        ]
        about = {"weights": dict(mixture.weights), "checkpoints": dict(mixture.checkpoints)}
        jobs.append({"name": mixture.name, "config": parts[0][0], "parts": parts, "mixture": about})
    if jobs:
        _measure(jobs, folder, spec, num_workers)


def _measure(
    jobs: Sequence[Mapping[str, Any]], folder: RunFolder, spec: JobSpec, num_workers: int | tuple[int, int]
) -> None:
    folder.remove(folder.confirmation_failure_file)
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
    from rltune.training.confirm import Candidate, Part, confirm

    rank = ray.train.get_context().get_world_rank()
    spec: JobSpec = config["spec"].of_worker(rank)
    folder = spec.folder
    bring_run(folder)
    checkpoints = {at for job in config["jobs"] for _, at, _ in job["parts"]}
    folder.bring(folder.confirmed_file, folder.mixtures_file, *(folder.path / at for at in checkpoints))
    record = read_record(folder)
    if Path(spec.work_dir).is_dir():
        os.chdir(spec.work_dir)
    quiet_libraries()
    is_main = rank == 0
    jobs = {job["name"]: job for job in config["jobs"]}

    def own(config: Mapping[str, Any]) -> RunConfig:
        return with_own_prompts(RunConfig.model_validate(config), folder, record)

    candidates = [
        Candidate(
            name, own(job["config"]), [Part(own(of), folder.path / at, weight) for of, at, weight in job["parts"]]
        )
        for name, job in jobs.items()
    ]
    fresh = fresh_prompts(candidates[0].config)

    def take(name: str, metrics: dict[str, float], values: dict[str, list[float]]) -> None:
        if not is_main:
            return
        about = jobs[name].get("mixture")
        measured: dict[str, Any] = {
            "num_prompts": len(fresh.prompts),
            "metrics": metrics,
            "values": values,
            "prompts": fresh.prompts,
            "num_reused": fresh.num_reused,
        }
        if about is None:
            checkpoint = next((at for _, at, _ in jobs[name]["parts"]), "")
            row: Confirmation | Mixture = Confirmation(name, checkpoint, **measured)
        else:
            row = Mixture(name, **about, **measured)
        file = folder.confirmed_file if about is None else folder.mixtures_file
        append_line(file, json.dumps(to_record(asdict(row)), allow_nan=False))
        folder.publish(file)

    try:
        confirm(candidates, take)
    except RltuneError as error:
        write_atomically(folder.confirmation_failure_file, f"{error}\n")
        folder.publish(folder.confirmation_failure_file)
        if ray.train.get_context().get_world_size() > 1:
            raise
