"""Memory that runs out and disks that cannot be written: one message each, with what to do."""

import errno
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rltune.errors import OutOfMemory, RunError, StorageError, is_out_of_memory, storage_error, writing
from rltune.estimators.alignprop import AlignProp
from rltune.rewards.base import REWARDS
from rltune.runs.events import note_event, read_notices
from rltune.runs.rows import MetricsFile, read_metrics
from rltune.training.reporter import FolderReporter
from tests.training.conftest import Brightness
from tests.training.runs import Make, train

CPU = "[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
MEMORY: list[Exception] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError(CPU),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
]


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_the_allocator_of_this_machine_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.slow
@pytest.mark.parametrize("error", MEMORY, ids=["gpu", "python", "cpu", "windows"])
def test_a_step_that_does_not_fit_says_with_how_many_images_and_what_to_lower(
    make_config: Make, tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(AlignProp, "train", raising(error))
    with pytest.raises(OutOfMemory) as caught:
        train(make_config(), tmp_path, base_dir=base_dir)
    text = str(caught.value)
    assert text.startswith("step 1: out of memory training on 4 images at a time (optim.micro_batch) on cpu: ")
    assert (str(error) or "MemoryError") in text
    assert text.endswith(
        "; lower optim.micro_batch, or write estimator.checkpoint: always, or write "
        "resources.checkpoint_blocks: true, or lower estimator.k, or lower "
        "sampler.height and sampler.width"
    )
    assert not caught.value.is_evaluation


@pytest.mark.slow
def test_one_image_that_does_not_fit_is_not_told_to_be_fewer(
    make_config: Make, tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AlignProp, "train", raising(MemoryError()))
    config = make_config(
        optim={"micro_batch": 1},
        estimator={"checkpoint": "always", "k": 1},
        resources={"precision": "fp32", "checkpoint_blocks": True},
    )
    with pytest.raises(OutOfMemory, match=r"on 1 images at a time .*: MemoryError; write resources\.precision: bf16, "):
        train(config, tmp_path, base_dir=base_dir)


@pytest.mark.long
def test_an_evaluation_that_does_not_fit_says_so(
    make_config: Make, tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_config(), tmp_path / "first", base_dir=base_dir)  # the base model is measured
    monkeypatch.setattr("rltune.training.evaluation.draw_images", raising(MEMORY[0]))
    with pytest.raises(OutOfMemory, match=r"sampling 16 images at a time without gradient on cpu: .*images_per_prompt"):
        train(make_config(), tmp_path, base_dir=base_dir)
    assert read_metrics(tmp_path / "trial" / "metrics.jsonl")[-1]["step"] == 1  # the file is closed and whole


def test_what_a_worker_raises_reaches_another_process_as_it_is() -> None:
    error = pickle.loads(pickle.dumps(OutOfMemory("full", is_evaluation=True)))
    assert (str(error), error.is_evaluation) == ("full", True)


# ---- rewards


class Failing(Brightness):
    """Fails for one prompt of the training set."""

    error: Exception = ValueError("no such word")

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ValueError("no such word"), RunError, r"^reward 'failing': it failed with ValueError: no such word$"),
        (KeyError("word"), RunError, r"^reward 'failing': it failed with KeyError: 'word'$"),
        (MEMORY[2], OutOfMemory, "out of memory sampling 16 images .*can't allocate memory"),
    ],
    ids=["value", "key", "memory"],
)
def test_a_reward_that_fails_is_named_once(
    make_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[RunError],
    message: str,
) -> None:
    monkeypatch.setitem(REWARDS._builders, "failing", Failing)
    monkeypatch.setattr(Failing, "error", error)
    with pytest.raises(expected, match=message):
        train(make_config(rewards={"failing": {}}), tmp_path)


# ---- storage


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left on device; free some"),
        (errno.EDQUOT, "the disk quota is used up; free some"),
        (errno.EROFS, "the file system is read-only; make it writable"),
        (errno.EACCES, "permission denied; make it writable"),
        (errno.ESTALE, "the file server no longer knows it; mount it again"),
    ],
)
def test_a_fault_of_the_machine_has_words_and_a_place(number: int, words: str) -> None:
    with pytest.raises(StorageError) as caught, writing("/data/runs"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"/data/runs: {words}, the same command resumes"
    named = storage_error(OSError(number, os.strerror(number), "/data/runs/a.json"), "/data")
    assert str(named) == f"/data/runs/a.json: {words}, the same command resumes"


def test_another_fault_of_a_file_is_left_as_it_is() -> None:
    with pytest.raises(IsADirectoryError), writing("/"), open("/", "w"):
        pass


def test_a_full_disk_under_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.partial").symlink_to("/dev/full")  # always full, and really so
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    for write in (lambda: file.write({"step": 1}), file.close):
        with pytest.raises(StorageError, match=r"metrics\.jsonl: no space left on device"):
            write()


@pytest.mark.slow
def test_a_temporary_folder_that_is_gone_is_named_and_not_the_run_folder(
    make_config: Make, tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match=r"/gone/rltune-.*: no such file or folder, it was there before"):
        train(make_config(), tmp_path, base_dir=base_dir)


@pytest.mark.slow
def test_a_full_disk_under_the_checkpoints(
    make_config: Make, tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as Ray Train's copy raises it
    monkeypatch.setattr(FolderReporter, "report", lambda _, metrics, checkpoint: checkpoint and raising(full)())
    with pytest.raises(StorageError, match="/trial: no space left on device"):
        train(make_config(), tmp_path, base_dir=base_dir)


def test_events_are_kept_in_order_and_not_repeated(tmp_path: Path) -> None:
    assert read_notices(tmp_path / "001") == []
    for text in ("first", "second", "second", "first"):
        note_event(tmp_path / "001", text)
    assert read_notices(tmp_path / "001") == ["first", "second", "first"]
