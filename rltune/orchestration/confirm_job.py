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


Candidates = Sequence[Mapping[str, Any]]
"""What is to be measured: a name, the experiment it is measured by, the checkpoints it is made of and their weights."""


def unconfirmed(chosen: Sequence[TrialResult], folder: RunFolder, experiment: Experiment) -> Candidates:
    """Return what of a run's chosen trials was not measured yet; the base model goes without saying.

    Raises:
        UserError: The held-out prompts cannot be read.
    """
    found, record = comparable(read_confirmations(folder)), read_record(folder)
    own = with_own_prompts(experiment.shared, folder, record)
    if found is not None and tuple(found.base.prompts) != tuple(str(prompt) for prompt in fresh_prompts(own).prompts):
        found = None  # measured on other prompts
    wanted = [(result.trial, result.checkpoint, dict(result.values)) for result in missing(chosen, found)]
    if not wanted:
        return []
    if found is None:
        wanted.insert(0, (BASE_TRIAL, "", {}))
    asked = [experiment.concrete(values) if trial != BASE_TRIAL else experiment.shared for trial, _, values in wanted]
    configs = [settled(config, record).model_dump(mode="json") for config in asked]
    return [
        {"name": trial, "config": config, "parts": [(config, checkpoint, 1.0)] if checkpoint else []}
        for (trial, checkpoint, _), config in zip(wanted, configs, strict=True)
    ]


def mixed(
    mixtures: Sequence[Mixture], trials: Mapping[str, TrialResult], folder: RunFolder, experiment: Experiment
) -> Candidates:
    """Return mixtures of the LoRAs of a run's ``trials``, which have no measurements yet."""
    record, found = read_record(folder), []
    for mixture in mixtures:
        parts = [
            (
                settled(experiment.concrete(trials[trial].values), record).model_dump(mode="json"),
                mixture.checkpoints[trial],
                weight,
            )
            for trial, weight in mixture.weights.items()
        ]
        about = {"weights": dict(mixture.weights), "checkpoints": dict(mixture.checkpoints), "mix": dict(mixture.mix)}
        found.append({"name": mixture.name, "config": parts[0][0], "parts": parts, "mixture": about})
    return found


def measure(candidates: Candidates, folder: RunFolder, spec: JobSpec, *, num_workers: int | tuple[int, int]) -> None:
    """Measure on fresh prompts, all on the same and from the same noise; a row is added to the run as each is done.

    Args:
        candidates: Those of trials get their rows in ``confirmed.jsonl``, mixtures in ``mixtures.jsonl``.
        folder: The run.
        spec: Of the base model's trial: where the run is and what a worker takes.
        num_workers: Of the job, which share the prompts; or how few and how many.

    Raises:
        RunError: They could not be measured.
    """
    if not candidates:
        return
    folder.remove(folder.confirmation_failure_file)
    try:
        make_ray_job(
            _worker,
            {"spec": spec, "jobs": candidates},
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
            name,
            own(job["config"]),
            [Part(own(of), folder.path / at, weight) for of, at, weight in job["parts"]],
            tuple(job.get("mixture", {}).get("mix", {}).values()),
        )
        for name, job in jobs.items()
    ]
    fresh = fresh_prompts(candidates[0].config)

    def take(name: str, metrics: dict[str, float], values: dict[str, list[float]], foreseen: dict[str, float]) -> None:
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
            row = Mixture(name, **about, foreseen=foreseen, **measured)
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
