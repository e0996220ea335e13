"""A trial as a Ray Train job: N data-parallel workers that run ``training``'s loop. All learning code is there."""

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rltune.config.experiment import RunConfig
from rltune.errors import RltuneError
from rltune.orchestration.loopback import FileTorchConfig
from rltune.orchestration.rundir import BASE_TRIAL, RunFolder, write_atomically
from rltune.training.events import append_event
from rltune.training.reporter import Reporter

if TYPE_CHECKING:
    from rltune.training.loading import Shelf

MAX_FAILURES = 2
"""Restarts of a trial whose worker, controller or node died."""
MAX_LOSSES = 20
"""The same where workers may come and go: every node that dies counts as one."""
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
    """Run one Ray Train worker of the trial under ``spec``."""
    context = ray.train.get_context()
    run_trial(config["spec"], RayReporter(), rank=context.get_world_rank(), count=context.get_world_size())


def run_trial(spec: JobSpec, reporter: Reporter, *, rank: int, count: int, shelf: "Shelf | None" = None) -> None:
    """Run one worker of a trial; what a user must know of its failure goes into ``failure.txt``.

    Args:
        spec: The trial.
        reporter: Takes reports and checkpoints.
        rank: Which of the trial's workers this is.
        count: How many it has.
        shelf: What earlier trials of this process have loaded.
    """
    if Path(spec.work_dir).is_dir():  # Ray puts workers into a folder of its own
        os.chdir(spec.work_dir)
    if rank == 0:
        append_event(spec.folder.trial_events_file(spec.trial), "worker_started")
    quiet_libraries()
    failure = spec.folder.failure_file(spec.trial)
    if failure.exists():  # another worker met it before the restart; trying again would meet it again
        return
    try:
        _train(spec, reporter, shelf)
    except RltuneError as error:
        failure.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(failure, f"{error}\n")
        if count > 1:
            raise  # the others wait in a collective: only a restart of the group frees them


def _train(spec: JobSpec, reporter: Reporter, shelf: "Shelf | None") -> None:
    # imported here and not above: a trial's driver and controller load this module too, and diffusers takes seconds
    from rltune.training.loop import base_run, train_run

    folder = spec.folder
    places: dict[str, Any] = {"trial_dir": folder.trial_dir(spec.trial), "base_dir": folder.base_dir}
    if spec.trial == BASE_TRIAL:
        base_run(spec.run_config, reporter=reporter, shelf=shelf, **places)
        return
    found = sorted((folder.checkpoints_dir(spec.trial) / spec.train_name).glob("checkpoint_*"))
    resume_from = found[-1] if found else None
    train_run(spec.run_config, reporter=reporter, resume_from=resume_from, shelf=shelf, **places)


def make_trainer(spec: JobSpec, callbacks: list[Any] | None = None) -> TorchTrainer:
    """Return the Ray Train job of a trial; it goes on from the trial's last checkpoint if there is one."""
    wanted = spec.run_config.resources
    return make_ray_job(
        worker,
        {"spec": spec},
        spec,
        name=spec.train_name,
        storage=spec.folder.checkpoints_dir(spec.trial),
        workers=(wanted.min_workers, wanted.workers) if wanted.min_workers else wanted.workers,
        callbacks=callbacks,
    )


def make_ray_job(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    spec: JobSpec,
    *,
    name: str,
    storage: Path,
    workers: int | tuple[int, int],
    callbacks: list[Any] | None = None,
) -> TorchTrainer:
    """Return a Ray Train job.

    Args:
        loop: Runs on every worker.
        config: Its argument.
        spec: Says what a worker takes and whether the cluster is our own.
        name: Of the Ray Train run.
        storage: Where Ray Train keeps the run.
        workers: How many, or how few and how many.
        callbacks: Of Ray Train.
    """
    storage.mkdir(parents=True, exist_ok=True)
    resources = spec.run_config.resources
    return TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=spec.num_gpus_per_worker > 0,
            resources_per_worker=worker_resources(spec.num_gpus_per_worker, num_cpus=resources.cpus_per_worker),
            accelerator_type=resources.accelerator,
        ),
        torch_config=(FileTorchConfig if spec.is_loopback else TorchConfig)(
            backend=backend_of(spec.num_gpus_per_worker)
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(storage),
            callbacks=callbacks,
            failure_config=FailureConfig(
                max_failures=MAX_LOSSES if isinstance(workers, tuple) else MAX_FAILURES,
                controller_failure_limit=MAX_FAILURES,
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def backend_of(num_gpus: float) -> str:
    """Return how workers talk: two ranks of NCCL cannot share a GPU."""
    return "nccl" if num_gpus >= 1 else "gloo"


def worker_resources(num_gpus: float, *, num_cpus: int = 1) -> dict[str, float]:
    """Return what one worker takes from the cluster."""
    return {"CPU": num_cpus, "GPU": num_gpus} if num_gpus else {"CPU": num_cpus}


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
