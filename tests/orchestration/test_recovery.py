"""What a trial goes on from, without a cluster: its storage before Ray starts on it, and the worker's own part."""

import asyncio
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.context import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from rltune.config.experiment import RunConfig
from rltune.config.rules import Known
from rltune.errors import OutOfMemory, RunError, StorageError
from rltune.estimators.alignprop import AlignProp
from rltune.orchestration.job import CHECKPOINTS_KEPT, RayReporter, attempt
from rltune.orchestration.job_spec import JobSpec
from rltune.orchestration.ray_private import SNAPSHOT_FILE
from rltune.orchestration.recovery import (
    RETRY_EVAL_BATCH,
    RETRY_FILE,
    Retry,
    memory_kills,
    plan_retry,
    read_retry,
    resume_point,
    smaller_micro_batch,
    tidy_storage,
)
from rltune.rewards.base import REWARDS
from rltune.runs.events import read_notices
from rltune.runs.layout import BASE_TRIAL
from rltune.training import evaluation
from rltune.training.checkpoint import (
    ADAPTER_FILE,
    TRAINER_FILE,
    Progress,
    load_adapter,
    save_checkpoint,
    why_not_whole,
)
from rltune.training.reporter import FolderReporter
from rltune.training.streams import Stream, generator
from tests.training.conftest import NanWhenTwo

# ray 2.60 reads and writes its snapshot with pydantic's old names
pytestmark = pytest.mark.filterwarnings("ignore:The `(parse_obj|json)` method is deprecated")
Make = Callable[..., RunConfig]


# ---- storage


def name_of(day: int) -> str:
    return f"checkpoint_2026-01-0{day}_10-00-00.000000"


def snapshot_of(days: list[int]) -> str:
    rows = [{"checkpoint_dir_name": name_of(day), "metrics": {}, "version": 0} for day in days]
    return json.dumps(
        {
            "ray_version": ray.__version__,
            "checkpoint_results": rows,
            "checkpoint_report_indices": days,
            "latest_checkpoint_result": rows[-1] if rows else None,
            "pending_training_results": [],
            "pending_validation_specs": [],
            "current_report_index": 9,
            "validated_checkpoint_dir_names": [],
            "timed_out_validation_checkpoint_dir_names": [],
            "failed_validation_checkpoint_dir_names": [],
        }
    )


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Ray's folder with three checkpoints, as a job leaves it."""
    folder = tmp_path / "trial" / "checkpoints" / "run-001"
    for day in (1, 2, 3):
        save_checkpoint(folder / name_of(day), {"a": torch.ones(3)}, {}, Progress(day, day))
    (folder / SNAPSHOT_FILE).write_text(snapshot_of([1, 2, 3]))
    return folder


def left_in(job: Path) -> list[int]:
    return sorted(int(path.name[20]) for path in job.glob("checkpoint_20*"))


def manager_of(job: Path, num_to_keep: int = 3) -> CheckpointManager:
    context = StorageContext(storage_path=str(job.parent), experiment_dir_name=job.name)
    return CheckpointManager(CheckpointConfig(num_to_keep=num_to_keep), context)


def ray_starts(job: Path) -> list[str]:
    """The checkpoints that Ray Train looks after when it starts on a job's folder."""
    return [Path(result.checkpoint.path).name for result in manager_of(job)._checkpoint_results]


def test_storage_in_order_is_left_as_it_is(job: Path) -> None:
    tidy_storage(job, num_to_keep=3)
    assert left_in(job) == [1, 2, 3]
    assert ray_starts(job) == [name_of(1), name_of(2), name_of(3)]
    tidy_storage(job.parent / "none-yet", num_to_keep=3)


@pytest.mark.parametrize("text", ["", snapshot_of([1, 2, 3])[:200], "{}", snapshot_of([0, 1, 2, 3])])
def test_ray_starts_where_its_snapshot_was_cut_short_or_names_what_is_gone(job: Path, text: str) -> None:
    (job / SNAPSHOT_FILE).write_text(text)
    with pytest.raises((CheckpointManagerInitializationError, TypeError)):
        ray_starts(job)
    tidy_storage(job, num_to_keep=3)
    assert ray_starts(job) == []
    assert left_in(job) == [1, 2, 3]
    assert resume_point(job.parent.parent, job.parent) == job / name_of(3)


def test_a_broken_checkpoint_does_not_push_out_a_whole_one(job: Path) -> None:
    (job / name_of(3) / TRAINER_FILE).unlink()
    tidy_storage(job, num_to_keep=3)
    assert ray_starts(job) == []
    assert left_in(job) == [1, 2, 3]  # the trial has still to see it, and to say so
    trial_dir = job.parent.parent
    assert resume_point(trial_dir, job.parent, is_main=False) == job / name_of(2)
    assert read_notices(trial_dir) == []
    assert resume_point(trial_dir, job.parent) == job / name_of(2)
    expected = f"went on from step 2, {name_of(2)}; not whole: {name_of(3)} (trainer.pt is missing)"
    assert read_notices(trial_dir) == [expected]
    # once the trial has gone on, the broken one goes, and no more stay than are to be kept
    for day in (4, 5, 6):
        save_checkpoint(job / name_of(day), {"a": torch.ones(3)}, {}, Progress(day, day))
    (job / SNAPSHOT_FILE).write_text(snapshot_of([4, 5, 6]))
    tidy_storage(job, num_to_keep=3)
    assert left_in(job) == [4, 5, 6]
    assert ray_starts(job) == [name_of(4), name_of(5), name_of(6)]


@pytest.mark.parametrize(("num_to_keep", "num_whole"), [(2, 1), (3, 2)])
def test_how_many_stay_whole_while_ray_still_counts_a_broken_one(job: Path, num_to_keep: int, num_whole: int) -> None:
    # a worker dies, and so does its newest checkpoint; Ray restarts the worker and knows nothing of the latter
    manager = manager_of(job, num_to_keep)
    (job / name_of(3) / ADAPTER_FILE).unlink()
    assert resume_point(job.parent.parent, job.parent) == job / name_of(2)
    save_checkpoint(job / name_of(4), {"a": torch.ones(3)}, {}, Progress(4, 4))
    checkpoint = Checkpoint(str(job / name_of(4)), manager._storage_context.storage_filesystem)

    async def report() -> None:
        manager.register_checkpoint(_TrainingReport(checkpoint=checkpoint, metrics={}, validation=False))

    asyncio.run(report())
    assert len(left_in(job)) == num_to_keep
    assert sum(not why_not_whole(job / name_of(day)) for day in left_in(job)) == num_whole
    assert num_whole >= 2 or num_to_keep < CHECKPOINTS_KEPT


def test_a_trial_without_a_whole_checkpoint_starts_again_and_says_so(job: Path) -> None:
    for day in (1, 2, 3):
        (job / name_of(day) / ADAPTER_FILE).write_bytes(b"")
    trial_dir = job.parent.parent
    assert resume_point(trial_dir, job.parent) is None
    (event,) = read_notices(trial_dir)
    assert event.startswith(f"went on from its first step; not whole: {name_of(3)} (adapter.safetensors is not as it")
    assert event.count("is not as it was written") == 3
    assert resume_point(trial_dir, trial_dir / "nothing") is None
    assert len(read_notices(trial_dir)) == 1


# ---- smaller batches


def config_of(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"rewards": {"brightness": {}}} | sections)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"optim": {"batch": 8}}, 4),
        ({"optim": {"batch": 8}, "resources": {"workers": 2}}, 2),
        ({"optim": {"batch": 12, "micro_batch": 6}}, 3),
        ({"optim": {"batch": 9}}, 4),
        ({"optim": {"batch": 7}}, 3),
        ({"optim": {"batch": 8, "micro_batch": 1}}, None),
        ({"optim": {"batch": 12}, "prompts": {"images_per_prompt": 4}}, 4),  # not 6, not 3
        ({"optim": {"batch": 8, "micro_batch": 4}, "prompts": {"images_per_prompt": 4}}, None),
        ({"optim": {"batch": 8}, "mixture": {"method": "non_dominated"}}, None),
    ],
)
def test_a_micro_batch_shrinks_to_half_and_keeps_images_together(
    sections: dict[str, Any], expected: int | None
) -> None:
    known = Known()
    if "prompts" in sections:
        sections = sections | {"rewards": {"variety": {}}, "evaluate": {"images_per_prompt": 2}}
        known = Known(group_rewards=("variety",))
    assert smaller_micro_batch(config_of(**sections), known) == expected


def test_a_retry_keeps_the_global_batch_and_shrinks_evaluation(tmp_path: Path) -> None:
    config = config_of(optim={"batch": 8})
    assert read_retry(tmp_path) is None
    assert plan_retry(tmp_path, config, Known(), "full", is_evaluation=False)
    retry = read_retry(tmp_path)
    assert retry == Retry(micro_batch=4, eval_batch=RETRY_EVAL_BATCH, reason="full")
    smaller = retry.apply(config)
    assert (smaller.optim.micro_batch, smaller.optim.batch) == (4, 8)
    assert smaller == config_of(optim={"batch": 8, "micro_batch": 4})
    assert read_notices(tmp_path) == [
        "ran out of memory, starts once more with 4 images at a time instead of 8 (optim.micro_batch), 4 at a time in "
        "evaluation: full"
    ]


def test_an_evaluation_that_does_not_fit_leaves_training_as_it_is(tmp_path: Path) -> None:
    assert plan_retry(tmp_path, config_of(optim={"batch": 8}), Known(), "full", is_evaluation=True)
    retry = read_retry(tmp_path)
    assert retry is not None
    assert (retry.micro_batch, retry.eval_batch) == (8, 4)
    # images of a prompt are drawn together: there is nothing smaller
    config = config_of(optim={"batch": 4}, evaluate={"images_per_prompt": 16})
    assert not plan_retry(tmp_path / "none", config, Known(), "full", is_evaluation=True)
    assert not (tmp_path / "none" / RETRY_FILE).exists()


def test_only_a_kill_by_the_memory_monitor_counts_as_one() -> None:
    crash = ActorDiedError()  # says, as for every death, that it may have been the kernel's OOM killer
    text = "Worker unexpectedly exits. Some common causes include: (1) the process was killed by the OOM killer"
    monitor = "2 worker(s) were killed due to the node running low on memory.\nMemory on the node was 15.2GB / 16GB"
    assert memory_kills([crash, RunError(text), ValueError("x")]) == []
    assert memory_kills([ValueError("x"), OutOfMemoryError(monitor)]) == [monitor.splitlines()[0]]
    assert memory_kills([RuntimeError(monitor)]) == [monitor.splitlines()[0]]


# ---- the worker's own part


@pytest.fixture
def spec(make_config: Make, tmp_path: Path) -> Callable[..., JobSpec]:
    """A trial in a run folder."""

    def build(trial: str = "001", **sections: Any) -> JobSpec:
        run = tmp_path / "run"
        (run / "trials" / trial).mkdir(parents=True, exist_ok=True)
        (run / "experiment.yaml").touch()
        config = make_config(**sections).model_dump(mode="json")
        return JobSpec(trial, str(run), config, num_gpus_per_worker=0, work_dir=str(tmp_path), is_loopback=True)

    return build


def start(spec: JobSpec, *, num_workers: int = 1) -> tuple[bool, FolderReporter]:
    reporter = FolderReporter(spec.folder.checkpoints_dir(spec.trial) / spec.train_name, num_to_keep=10)
    return attempt(spec, reporter, rank=0, count=num_workers), reporter


def steps(reporter: FolderReporter) -> list[float]:
    return [report["step"] for report in reporter.reports]


@pytest.mark.slow
def test_a_fault_of_the_experiment_is_recorded_at_once(
    spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REWARDS._builders, "nan_when_two", NanWhenTwo)
    job = spec(rewards={"nan_when_two": {}})
    assert not start(job)[0]
    assert "'nan_when_two': not finite" in job.folder.failure_file("001").read_text()
    with pytest.raises(RunError):
        start(job, num_workers=2)
    assert read_retry(job.folder.trial_dir("001")) is None


@pytest.mark.long
def test_a_full_disk_is_no_fault_of_the_trial(spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job = spec()
    with monkeypatch.context() as patched:
        patched.setattr("rltune.training.checkpoint._flush", fail)
        with pytest.raises(StorageError, match="no space left on device"):
            start(job)
    assert not job.folder.failure_file("001").exists()
    assert start(job)[0]  # the same again


def test_a_run_folder_that_is_gone_is_not_made_anew(spec: Callable[..., JobSpec]) -> None:
    job = spec()
    job.folder.path.rename(job.folder.path.with_name("elsewhere"))
    with pytest.raises(StorageError, match="/run: the run folder is gone"):
        start(job)
    assert not job.folder.path.exists()


@pytest.mark.long
def test_memory_that_runs_out_is_tried_once_more_and_gives_what_the_smaller_batch_gives(
    spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = spec("002", optim={"micro_batch": 2})
    assert start(expected)[0]
    job, train = spec(), AlignProp.train
    limit = 2

    def fits(self: AlignProp, round: Any) -> None:
        # the third step is the first that does not fit: the present checkpoint is gone on from
        is_small = len(round.batches[0].prompts) <= limit
        if not is_small and round.rng.bit_generator.state == third.bit_generator.state:
            raise torch.OutOfMemoryError("CUDA out of memory")
        train(self, round)

    third = generator(0, Stream.ESTIMATOR, 2)
    monkeypatch.setattr(AlignProp, "train", fits)
    with pytest.raises(OutOfMemory, match="step 3: out of memory training on 4 images at a time"):
        start(job)
    assert not job.folder.failure_file("001").exists()
    is_trained, reporter = start(job)
    assert is_trained
    assert steps(reporter) == [4]  # not from the start
    (event,) = read_notices(job.folder.trial_dir("001"))
    assert event.startswith("ran out of memory, starts once more with 2 images at a time instead of 4 (optim.micro_")
    found, wanted = (
        load_adapter(item.folder.checkpoints_dir(item.trial) / item.train_name / "step-000004")
        for item in (job, expected)
    )
    for name, values in wanted.items():
        # the first two steps were the whole batch's: the same but for rounding, which Adam makes up to steps of lr of
        torch.testing.assert_close(found[name], values, rtol=0, atol=2e-3)

    # the second time it is recorded, with what to lower
    limit = 0
    job = spec("003")
    with pytest.raises(OutOfMemory):
        start(job)
    assert not start(job)[0]
    failure = job.folder.failure_file("003").read_text()
    assert failure.startswith("step 3: out of memory training on 2 images at a time")
    assert "; lower optim.micro_batch, or write estimator.checkpoint: always" in failure


@pytest.mark.slow
def test_the_base_model_is_measured_in_smaller_batches_after_memory_ran_out(
    spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, sizes = evaluation.draw_images, []

    def fits(sampler: Any, images: Any, numbers: Any, device: Any) -> Any:
        sizes.append(len(numbers))
        if len(numbers) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(sampler, images, numbers, device)

    monkeypatch.setattr(evaluation, "draw_images", fits)
    job = spec(BASE_TRIAL)
    with pytest.raises(OutOfMemory, match="sampling 16 images"):
        start(job)
    is_trained, reporter = start(job)
    assert is_trained
    assert steps(reporter) == [0]
    assert max(sizes[1:]) == 4


def test_the_stop_file_asks_every_trial_to_stop(spec: Callable[..., JobSpec]) -> None:
    job = spec()
    reporter = RayReporter(job, is_main=True)  # outside Ray no node is ever going
    assert not reporter.is_stopping()
    job.folder.stop_file.touch()
    assert reporter.is_stopping()
