"""Chosen trials exported by workers of a cluster that was attached to, a task each: its head may have no GPU."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from rltune.config.load import Experiment
from rltune.errors import RltuneError, RunError
from rltune.export.trials import export_trials
from rltune.export.write import Exported
from rltune.orchestration.faults import last_line
from rltune.orchestration.job_spec import JobSpec
from rltune.orchestration.nodes import WorkerNeed
from rltune.runs.layout import RunFolder
from rltune.runs.remote import bring_run
from rltune.runs.results import TrialResult
from rltune.training.quiet import quiet_libraries

MAX_RETRIES = 2
"""Of a task whose worker or node died."""


def export_on_workers(
    picks: Sequence[TrialResult],
    folder: RunFolder,
    experiment: Experiment,
    spec: JobSpec,
    need: WorkerNeed,
    *,
    on_export: Callable[[Exported], None],
) -> None:
    """Export every pick as ``export_trials`` does, each on a worker of the cluster that we are connected to.

    Args:
        picks: Trials with their checkpoints.
        folder: The run.
        experiment: Its experiment.
        spec: Of the base model's trial: where the run is.
        need: What a worker takes.
        on_export: Is told of each LoRA in the order of the picks.

    Raises:
        RunError: Some failed; the message names each with its reason.
    """
    task = ray.remote(
        num_cpus=need.num_cpus, num_gpus=need.num_gpus, accelerator_type=need.accelerator, max_retries=MAX_RETRIES
    )(_export)
    tasks = [task.options(name=f"export-{pick.trial}").remote(pick, spec, experiment) for pick in picks]
    faults = []
    for pick, running in zip(picks, tasks, strict=True):
        try:
            exported, fault = ray.get(running)
        except Exception as error:  # noqa: BLE001  # ray raises whatever its layers raise
            exported, fault = [], f"trial {pick.trial}: {last_line(str(error))}"
        folder.bring(folder.exports_dir)
        for one in exported:
            on_export(replace(one, folder=folder.exports_dir / one.trial))  # a worker's copy is another
        faults += [fault] if fault else []
    if faults:
        head = "" if len(picks) == 1 else f"{len(faults)} of {len(picks)} exports failed\n  "
        raise RunError(head + "\n  ".join(faults))


def _export(pick: TrialResult, spec: JobSpec, experiment: Experiment) -> tuple[list[Exported], str]:
    """Export one trial here, and return what was written, and which trial was not and why."""
    exported: list[Exported] = []
    options: dict[str, Any] = {"on_export": exported.append}
    try:
        folder = replace(spec, role=f"export-{pick.trial}").folder
        bring_run(folder)
        folder.bring(folder.results_file, folder.confirmed_file)  # a LoRA's card tells what it measured
        if Path(spec.work_dir).is_dir():  # relative paths of the experiment are meant from there
            os.chdir(spec.work_dir)
        quiet_libraries()
        export_trials([pick], folder, experiment, **options)
    except RltuneError as error:
        return exported, str(error)
    return exported, ""
