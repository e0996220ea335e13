"""A trial as a Ray Train job: N data-parallel workers that run ``training``'s loop. All learning code is there."""

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rltune.config.experiment import RunConfig
from rltune.errors import RltuneError
from rltune.orchestration.loopback import FileTorchConfig
from rltune.orchestration.rundir import BASE_TRIAL, RunFolder, write_atomically
from rltune.training.events import append_event

MAX_FAILURES = 2
"""Restarts of a trial whose worker, controller or node died."""
CHECKPOINTS_KEPT = 2


@dataclass(frozen=True)
class JobSpec:
    """A trial, as it travels to its workers; plain values, so that it pickles anywhere."""

    trial: str
    run_dir: str
    config: Mapping[str, Any]
    """A concrete experiment, in JSON's types."""
    num_gpus_per_worker: float
    work_dir: str
    """Where the user stands; relative paths of the experiment are meant from there."""
    is_loopback: bool
    """Whether the cluster is our own on one machine, where nothing may listen to the network."""

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(Path(self.run_dir))

    @property
    def run_config(self) -> RunConfig:
        """The concrete experiment."""
        return RunConfig.model_validate(self.config)

    @property
    def train_name(self) -> str:
        """Name of the Ray Train run: the same after every restart, by which Ray finds the checkpoints again."""
        return f"{self.folder.name}-{self.trial}"


class RayReporter:
    """Hands metrics and checkpoints to Ray Train."""

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Report from every worker; Ray copies the folder to the run's storage."""
        taken = ray.train.Checkpoint.from_directory(str(checkpoint)) if checkpoint else None
        ray.train.report(dict(metrics), checkpoint=taken, delete_local_checkpoint_after_upload=True)


def worker(config: dict[str, JobSpec]) -> None:
    """Run one worker of the trial under ``spec``; what a user must know of its failure goes into ``failure.txt``."""
    spec = config["spec"]
    if Path(spec.work_dir).is_dir():  # Ray puts workers into a folder of its own
        os.chdir(spec.work_dir)
    if ray.train.get_context().get_world_rank() == 0:
        append_event(spec.folder.trial_events_file(spec.trial), "worker_started")
    quiet_libraries()
    failure = spec.folder.failure_file(spec.trial)
    if failure.exists():  # another worker met it before the restart; trying again would meet it again
        return
    try:
        _train(spec)
    except RltuneError as error:
        failure.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(failure, f"{error}\n")
        if ray.train.get_context().get_world_size() > 1:
            raise  # the others wait in a collective: only a restart of the group frees them


def _train(spec: JobSpec) -> None:
    # imported here and not above: a trial's driver and controller load this module too, and diffusers takes seconds
    from rltune.training.loop import base_run, train_run

    folder = spec.folder
    places: dict[str, Any] = {"trial_dir": folder.trial_dir(spec.trial), "base_dir": folder.base_dir}
    if spec.trial == BASE_TRIAL:
        base_run(spec.run_config, reporter=RayReporter(), **places)
        return
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        train_run(spec.run_config, reporter=RayReporter(), **places)
        return
    with checkpoint.as_directory() as path:
        train_run(spec.run_config, reporter=RayReporter(), resume_from=Path(path), **places)


def make_trainer(spec: JobSpec, callbacks: list[Any] | None = None) -> TorchTrainer:
    """Return the Ray Train job of a trial; it goes on from the trial's last checkpoint if there is one."""
    resources = spec.run_config.resources
    storage = spec.folder.checkpoints_dir(spec.trial)
    storage.mkdir(parents=True, exist_ok=True)
    return TorchTrainer(
        worker,
        train_loop_config={"spec": spec},
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=spec.num_gpus_per_worker > 0,
            resources_per_worker=worker_resources(spec.num_gpus_per_worker),
        ),
        torch_config=(FileTorchConfig if spec.is_loopback else TorchConfig)(
            backend="nccl" if spec.num_gpus_per_worker >= 1 else "gloo"  # two ranks of NCCL cannot share a GPU
        ),
        run_config=ray.train.RunConfig(
            name=spec.train_name,
            storage_path=str(storage),
            callbacks=callbacks,
            failure_config=FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def worker_resources(num_gpus: float) -> dict[str, float]:
    """Return what one worker takes from the cluster."""
    return {"CPU": 1, "GPU": num_gpus} if num_gpus else {"CPU": 1}


def quiet_libraries() -> None:
    """Switch off progress bars and warnings that tell a user nothing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
