"""A trial as a Ray Train job: N data-parallel workers that run ``training``'s loop. All learning code is there."""

import functools
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray.train
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from rltune.config.experiment import RunConfig
from rltune.config.rules import Known
from rltune.errors import OutOfMemory, RltuneError, RunError, StorageError, writing
from rltune.orchestration.faults import KEPT, MAX_LOSSES, MAX_STARTUPS, MAX_STARTUPS_GROWING, FaultWatch
from rltune.orchestration.interfaces import NodeTorchConfig
from rltune.orchestration.job_spec import STORAGE_ERROR, JobSpec
from rltune.orchestration.loopback import FileTorchConfig
from rltune.orchestration.ray_private import is_node_going
from rltune.orchestration.recovery import RETRY_FILE, plan_retry, read_retry, resume_point, tidy_storage
from rltune.runs.copies import is_light
from rltune.runs.events import append_event
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.record import record_trial
from rltune.runs.remote import at_work, bring_run
from rltune.runs.store import write_atomically
from rltune.training.checkpoint import keep_newest
from rltune.training.quiet import quiet_libraries
from rltune.training.reporter import Reporter

if TYPE_CHECKING:
    from rltune.training.model_cache import ModelCache

MAX_FAILURES = 2
"""Restarts of a job that nothing else counts."""
GROW_AFTER_S = 20.0
"""Between looks for nodes that have come back, each of which starts all workers anew; Ray's own is a minute."""
CHECKPOINTS_KEPT = 3
"""With one of them broken two are still whole: Ray counts it among those it keeps until the job starts anew."""


class RayReporter:
    """Hands metrics and checkpoints to Ray Train.

    Args:
        spec: The trial, of this worker.
        is_main: Whether this is the trial's main worker.
    """

    def __init__(self, spec: JobSpec, *, is_main: bool) -> None:
        self._spec, self._is_main = spec, is_main
        self._stop_file = spec.folder.stop_file
        self.has_trouble = False

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Report from every worker; Ray copies the folder to the run's storage, unless that is object storage."""
        if self._spec.uri:
            if self._is_main:
                publish_report(self._spec, checkpoint)
            ray.train.report({**metrics, KEPT: float(checkpoint is not None)})
            return
        taken = ray.train.Checkpoint.from_directory(str(checkpoint)) if checkpoint else None
        ray.train.report(dict(metrics), checkpoint=taken, delete_local_checkpoint_after_upload=True)

    def storage_error(self, text: str) -> None:
        """Report why the trial cannot go on; a trial alone calls it, not one of several workers."""
        self.has_trouble = True
        ray.train.report({STORAGE_ERROR: text})

    def is_stopping(self) -> bool:
        """Return whether the sweep is being stopped or a node of this trial is to go."""
        return self._stop_file.exists() or is_node_going()


def publish_report(spec: JobSpec, checkpoint: Path | None) -> None:
    """Bring what a trial has written since its last report to where the run lies, its checkpoint after all else.

    Args:
        spec: The trial, of its main worker.
        checkpoint: What ``save_checkpoint`` wrote, which is moved among the trial's checkpoints; None without one.

    Raises:
        StorageError: It cannot be written.
    """
    folder = spec.folder
    place = folder.checkpoints_dir(spec.trial) / spec.train_name
    folder.publish(folder.base_dir, folder.trial_dir(spec.trial), folder.path / "tensorboard" / spec.trial)
    if checkpoint is not None:
        name = datetime.now(UTC).strftime("checkpoint_%Y-%m-%d_%H-%M-%S.%f")  # as Ray Train names them
        keep_newest(checkpoint, place / name, count=CHECKPOINTS_KEPT)
        folder.publish(place)
        if folder.copy is not None:
            folder.copy.prune(f"{place.relative_to(folder.path).as_posix()}/")


def plan_after_kill(spec: JobSpec, reason: str) -> None:
    """Let a trial whose worker was killed to free memory start once more with smaller batches."""
    bring_run(spec.folder)
    spec.folder.bring(spec.folder.trial_dir(spec.trial), wanted=is_light)
    if read_retry(spec.folder.trial_dir(spec.trial)) is None:
        _plan_retry(spec, spec.run_config, reason, is_evaluation=False)
        spec.folder.publish(spec.folder.trial_dir(spec.trial))


class TrialReporter(Reporter, Protocol):
    """A reporter that can also say why a trial cannot go on, through no fault of its own."""

    def storage_error(self, text: str) -> None:
        """Pass on to the sweep, which ends with it."""
        ...


def worker(config: dict[str, JobSpec]) -> None:
    """Run one Ray Train worker of the trial under ``spec``."""
    context = ray.train.get_context()
    rank = context.get_world_rank()
    spec = config["spec"].of_worker(rank)
    reporter = RayReporter(spec, is_main=rank == 0)
    is_trained = run_trial(spec, reporter, rank=rank, count=context.get_world_size())
    folder = spec.folder
    if is_trained or reporter.has_trouble or folder.stop_file.exists() or folder.failure_file(spec.trial).exists():
        return
    # a job that returns is over; one whose workers fail while their node goes starts again on another
    raise RunError(f"trial {spec.trial}: its node is being taken away; it goes on elsewhere")


def run_trial(
    spec: JobSpec, reporter: TrialReporter, *, rank: int, count: int, cache: "ModelCache | None" = None
) -> bool:
    """Run one worker of a trial, and return whether the trial came to its end.

    Args:
        spec: The trial.
        reporter: Takes reports and checkpoints.
        rank: Which of the trial's workers this is.
        count: How many it has.
        cache: What earlier trials of this process have loaded.

    Raises:
        RltuneError: As ``attempt``.
    """
    if Path(spec.work_dir).is_dir():  # Ray puts workers into a folder of its own
        os.chdir(spec.work_dir)
    try:
        with at_work(spec.folder, spec.trial, base_key=spec.base_key, is_main=rank == 0):
            if rank == 0:
                append_event(spec.folder.trial_events_file(spec.trial), "worker_started")
            quiet_libraries()
            if spec.folder.failure_file(spec.trial).exists():
                return False  # another worker met it before the restart; trying again would meet it again
            return attempt(spec, reporter, rank=rank, count=count, cache=cache)
    except StorageError as error:
        if count > 1:
            raise  # the others wait in a collective: only a restart of the group frees them
        reporter.storage_error(str(error))
        return False


def attempt(spec: JobSpec, reporter: Reporter, *, rank: int, count: int, cache: "ModelCache | None" = None) -> bool:
    """Train the trial under ``spec`` from where it is, and return whether it came to its end.

    A fault of the experiment is written to ``failure.txt``. Where memory ran out for the first time, it is written
    down how to try again.

    Raises:
        StorageError: The run folder cannot be written; no fault of the trial's.
        OutOfMemory: Memory ran out, and the trial is to be started once more.
        RltuneError: Any fault, where other workers wait for this one: only a restart of all frees them.
    """
    folder, trial_dir = spec.folder, spec.folder.trial_dir(spec.trial)
    if not folder.experiment_file.is_file():
        raise StorageError(f"{folder.path}: the run folder is gone; bring it back, the same command resumes")
    if rank == 0:
        with writing(trial_dir):
            record_trial(folder, spec.trial, spec.config, spec.base_key)
    retry = read_retry(trial_dir)
    try:
        config = retry.apply(spec.whole_config) if retry and spec.trial != BASE_TRIAL else spec.whole_config
        max_eval_batch = retry.eval_batch if retry else None
        return _train(spec, config, reporter, rank=rank, max_eval_batch=max_eval_batch, cache=cache)
    except StorageError:
        raise
    except RltuneError as error:
        if isinstance(error, OutOfMemory) and retry is None:
            with writing(trial_dir):
                is_planned = _plan_retry(spec, config, str(error), is_evaluation=error.is_evaluation)
            folder.publish(trial_dir / RETRY_FILE)
            if is_planned:
                raise
        failure = folder.failure_file(spec.trial)
        with writing(failure):
            failure.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(failure, f"{error}\n")
        folder.publish(failure)
        if count > 1:
            raise  # the others wait in a collective: only a restart of the group frees them
    return False


def _plan_retry(spec: JobSpec, config: RunConfig, reason: str, *, is_evaluation: bool) -> bool:
    from rltune.training.rewards import compares_images

    kinds = {config.kind_of(name) for name, section in config.rewards.items() if compares_images(name, section)}
    trial_dir, known = spec.folder.trial_dir(spec.trial), Known(group_rewards=tuple(kinds))
    return plan_retry(trial_dir, config, known, reason, is_evaluation=is_evaluation)


def _train(
    spec: JobSpec,
    config: RunConfig,
    reporter: Reporter,
    *,
    rank: int,
    max_eval_batch: int | None,
    cache: "ModelCache | None",
) -> bool:
    # imported here and not above: a trial's driver and controller load this module too, and diffusers takes seconds
    from rltune.training.loop import base_run, train_run

    folder = spec.folder
    places: dict[str, Any] = {"trial_dir": folder.trial_dir(spec.trial), "base_dir": folder.base_dir}
    places |= {"reporter": reporter, "max_eval_batch": max_eval_batch, "key": spec.base_key or None}
    if spec.trial == BASE_TRIAL:
        base_run(config, cache=cache, **places)
        return True
    # not Ray's own idea of it, which knows nothing of what became of the files
    checkpoint = resume_point(folder.trial_dir(spec.trial), folder.checkpoints_dir(spec.trial), is_main=rank == 0)
    base_failure = folder.failure_file(BASE_TRIAL)
    return train_run(
        config,
        resume_from=checkpoint,
        cache=cache,
        is_base_coming=lambda: spec.waits_for_base and not base_failure.exists(),
        **places,
    )


def make_trainer(spec: JobSpec, callbacks: list[Any] | None = None) -> TorchTrainer:
    """Return the Ray Train job of a trial; it goes on from the trial's last checkpoint if there is one."""
    wanted = spec.run_config.resources
    storage = spec.folder.scratch_dir if spec.uri else spec.folder.checkpoints_dir(spec.trial)
    storage.mkdir(parents=True, exist_ok=True)
    tidy_storage(storage / spec.train_name, num_to_keep=CHECKPOINTS_KEPT)
    return make_ray_job(
        worker,
        {"spec": spec},
        spec,
        name=spec.train_name,
        storage=storage,
        workers=(wanted.min_workers, wanted.workers) if wanted.min_workers else wanted.workers,
        callbacks=[*(callbacks or []), FaultWatch(functools.partial(plan_after_kill, spec))],
        max_failures=MAX_LOSSES,
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
    max_failures: int = MAX_FAILURES,
    grow_after_s: float = GROW_AFTER_S,
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
        max_failures: How often its workers are started again.
        grow_after_s: Between looks for more nodes, where it says how few and how many.
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
            elastic_resize_monitor_interval_s=grow_after_s,
        ),
        torch_config=(
            FileTorchConfig(backend=backend_of(spec.num_gpus_per_worker))
            if spec.is_loopback
            else NodeTorchConfig(backend=backend_of(spec.num_gpus_per_worker))
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(storage),
            callbacks=callbacks,
            failure_config=FailureConfig(
                max_failures=max_failures,
                controller_failure_limit=MAX_STARTUPS_GROWING if resources.nodes == "autoscale" else MAX_STARTUPS,
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
