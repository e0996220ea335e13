"""A trial as a Ray Train job: N data-parallel workers that run ``training``'s loop. All learning code is there."""

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from rltune.config.clashes import Known
from rltune.config.experiment import RunConfig
from rltune.errors import OutOfMemory, RltuneError, RunError, StorageError, writing
from rltune.orchestration.loopback import FileTorchConfig
from rltune.orchestration.recovery import memory_kills, plan_retry, read_retry, resume_point, tidy_storage
from rltune.orchestration.rundir import BASE_TRIAL, RunFolder, write_atomically
from rltune.training.reporter import Reporter

MAX_FAILURES = 2
"""Restarts of a trial whose worker, controller or node died."""
CHECKPOINTS_KEPT = 3
"""With one of them broken two are still whole: Ray counts it among those it keeps until the job starts anew."""


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
    """Hands metrics and checkpoints to Ray Train.

    Args:
        stop_file: Asks every trial of the run to stop once it is there.
    """

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Report from every worker; Ray copies the folder to the run's storage."""
        taken = ray.train.Checkpoint.from_directory(str(checkpoint)) if checkpoint else None
        ray.train.report(dict(metrics), checkpoint=taken, delete_local_checkpoint_after_upload=True)

    def is_stopping(self) -> bool:
        """Return whether the sweep is being stopped or a node of this trial is to go."""
        return self._stop_file.exists() or _is_node_going()


def _is_node_going() -> bool:
    """Return whether Ray has told this worker that a node of its job is to be taken away.

    ``ray.train.get_preemption_info`` says the same, and waits for all workers each time: every step would cost a round
    trip. The loop makes all agree anyway.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None
    except (ImportError, AttributeError, RuntimeError):  # not public: another version of Ray may have it elsewhere
        return False


class MemoryWatch(UserCallback):  # type: ignore[misc]  # ray has no types
    """Lets a trial whose worker was killed to free memory start once more with smaller batches.

    It runs in the job's controller: a worker that is killed has no time for it.
    """

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Plan it once; Ray Train restarts the workers."""
        kills = memory_kills(worker_exceptions.values())
        if kills and read_retry(self._spec.folder.trial_dir(self._spec.trial)) is None:
            _plan_retry(self._spec, self._spec.run_config, kills[0], is_evaluation=False)


def worker(config: dict[str, JobSpec]) -> None:
    """Run one worker of the trial under ``spec``; what a user must know of its failure goes into ``failure.txt``."""
    spec = config["spec"]
    if Path(spec.work_dir).is_dir():  # Ray puts workers into a folder of its own
        os.chdir(spec.work_dir)
    quiet_libraries()
    failure = spec.folder.failure_file(spec.trial)
    if failure.exists():  # another worker met it before the restart; trying again would meet it again
        return
    num_workers = ray.train.get_context().get_world_size()
    is_main = ray.train.get_context().get_world_rank() == 0
    is_trained = attempt(spec, RayReporter(spec.folder.stop_file), is_main=is_main, num_workers=num_workers)
    if not is_trained and not spec.folder.stop_file.exists() and not failure.exists():
        # a job that returns is over; one whose workers fail while their node goes starts again on another
        raise RunError(f"trial {spec.trial}: its node is being taken away; it goes on elsewhere")


def attempt(spec: JobSpec, reporter: Reporter, *, is_main: bool, num_workers: int) -> bool:
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
    retry = read_retry(trial_dir)
    config = retry.apply(spec.run_config) if retry and spec.trial != BASE_TRIAL else spec.run_config
    try:
        return _train(spec, config, reporter, is_main=is_main, max_eval_batch=retry.eval_batch if retry else None)
    except StorageError:
        raise
    except RltuneError as error:
        if isinstance(error, OutOfMemory) and retry is None:
            with writing(trial_dir):
                is_planned = _plan_retry(spec, config, str(error), is_evaluation=error.is_evaluation)
            if is_planned:
                raise
        failure = folder.failure_file(spec.trial)
        with writing(failure):
            failure.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(failure, f"{error}\n")
        if num_workers > 1:
            raise  # the others wait in a collective: only a restart of the group frees them
    return False


def _plan_retry(spec: JobSpec, config: RunConfig, reason: str, *, is_evaluation: bool) -> bool:
    from rltune.training.rewards import compares_images

    kinds = {config.kind_of(name) for name, section in config.rewards.items() if compares_images(name, section)}
    trial_dir, known = spec.folder.trial_dir(spec.trial), Known(group_rewards=tuple(kinds))
    return plan_retry(trial_dir, config, known, reason, is_evaluation=is_evaluation)


def _train(spec: JobSpec, config: RunConfig, reporter: Reporter, *, is_main: bool, max_eval_batch: int | None) -> bool:
    # imported here and not above: a trial's driver and controller load this module too, and diffusers takes seconds
    from rltune.training.loop import base_run, train_run

    folder = spec.folder
    places: dict[str, Any] = {"trial_dir": folder.trial_dir(spec.trial), "base_dir": folder.base_dir}
    places |= {"reporter": reporter, "max_eval_batch": max_eval_batch}
    if spec.trial == BASE_TRIAL:
        base_run(config, **places)
        return True
    # not Ray's own idea of it, which knows nothing of what became of the files
    checkpoint = resume_point(folder.trial_dir(spec.trial), folder.checkpoints_dir(spec.trial), is_main=is_main)
    return train_run(config, resume_from=checkpoint, **places)


def make_trainer(spec: JobSpec, callbacks: list[Any] | None = None) -> TorchTrainer:
    """Return the Ray Train job of a trial; it goes on from the trial's last checkpoint if there is one."""
    resources = spec.run_config.resources
    storage = spec.folder.checkpoints_dir(spec.trial)
    storage.mkdir(parents=True, exist_ok=True)
    tidy_storage(storage / spec.train_name, num_to_keep=CHECKPOINTS_KEPT)
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
            callbacks=[*(callbacks or []), MemoryWatch(spec)],
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
