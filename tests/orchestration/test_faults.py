"""How often a trial is started that fails, with Ray's parts played by hand: no cluster is started."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, UserCallback, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

from rltune.errors import RunError, StorageError
from rltune.orchestration import tuning
from rltune.orchestration.faults import (
    MAX_DEATHS,
    MAX_LOSSES,
    MAX_STARTS,
    FaultWatch,
    is_death,
    last_line,
    memory_kills_told,
)
from rltune.orchestration.job import make_trainer
from rltune.orchestration.job_spec import STORAGE_ERROR, JobSpec
from rltune.orchestration.sweep import TUNE_FAILURES
from tests.orchestration.test_scaling import spec

CUDA = "CUDA error: an illegal memory access was encountered"


def raised(error: Exception) -> Exception:
    """What Ray Train hands on of an exception in a worker."""
    return UserExceptionWithTraceback(error, f"Traceback:\n  ...\n{type(error).__name__}: {error}\n")


def died() -> Exception:
    """What it says of a worker that is gone."""
    return WorkerHealthCheckFailedError("Worker 0 failed its health check", ActorDiedError())


class Train:
    """Ray Train's part: starts the workers, asks its callbacks after every failure, starts them again."""

    def __init__(self, trainer: Any, run: Callable[[Any], Exception | None]) -> None:
        self._config = trainer.run_config
        self._run = run

    def fit(self) -> None:
        watch = self._config.callbacks[-1]
        for _ in range(self._config.failure_config.max_failures + 1):
            error = self._run(watch)
            if error is None:
                return
            try:
                watch.after_exception(None, {0: error})
            except Exception as fault:
                raise ControllerError(fault) from fault
        raise WorkerGroupError("gave up", {0: error})


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, list[Any]]]:
    """Play Ray Tune, which starts a trial again whose driver raises: how often workers start, and what it is told."""

    def play(run: Callable[[int, FaultWatch], Exception | None], **resources: Any) -> tuple[int, list[Any]]:
        starts, reports = 0, list[Any]()

        def start(watch: FaultWatch) -> Exception | None:
            nonlocal starts
            starts += 1
            return run(starts, watch)

        monkeypatch.setattr("ray.tune.integration.ray_train.TuneReportCallback", UserCallback)
        monkeypatch.setattr(tuning.tune, "report", reports.append)
        monkeypatch.setattr(tuning, "make_trainer", lambda spec, callbacks: Train(make_trainer(spec, callbacks), start))
        for attempt in range(TUNE_FAILURES + 1):
            try:
                tuning.drive({tuning.SPEC: spec(tmp_path, 0, **resources)})
            except Exception:
                if attempt == TUNE_FAILURES:
                    raise
            else:
                break
        return starts, reports

    return play


def failure(folder: Path) -> str:
    return JobSpec("001", str(folder), {}, 0, "", False).folder.failure_file("001").read_text()


@pytest.mark.parametrize("resources", [{}, {"workers": 2, "min_workers": 1}])
def test_a_fault_that_is_not_ours_starts_a_trial_three_times(
    tune: Callable[..., Any], tmp_path: Path, resources: dict[str, Any]
) -> None:
    starts, _ = tune(lambda start, watch: raised(RuntimeError(CUDA)), **resources)
    assert starts == MAX_STARTS == 3
    assert failure(tmp_path) == f"RuntimeError: {CUDA} (started 3 times without reaching a checkpoint)\n"


def test_a_worker_that_dies_at_its_first_step_is_not_started_for_ever(tune: Callable[..., Any], tmp_path: Path) -> None:
    assert tune(lambda start, watch: died())[0] == MAX_DEATHS
    assert "started 6 times" in failure(tmp_path)


def test_a_trial_that_comes_further_outlives_many_deaths(tune: Callable[..., Any], tmp_path: Path) -> None:
    def run(start: int, watch: FaultWatch) -> Exception | None:
        if start > MAX_LOSSES:
            return None
        watch.after_report(None, [{"step": start}], object())
        return died()

    assert tune(run)[0] == MAX_LOSSES + 1
    assert not (tmp_path / "trials" / "001" / "failure.txt").exists()


def test_a_report_without_a_checkpoint_is_no_progress(tune: Callable[..., Any]) -> None:
    def run(start: int, watch: FaultWatch) -> Exception | None:
        watch.after_report(None, [{"step": 0}], None)
        return raised(RuntimeError(CUDA))

    assert tune(run)[0] == MAX_STARTS


def test_workers_that_fail_because_another_died_count_as_that_death() -> None:
    watch = FaultWatch(lambda reason: None)
    for _ in range(MAX_DEATHS - 1):
        watch.after_exception(None, {0: raised(RuntimeError("Connection closed by peer")), 1: died()})
    with pytest.raises(RunError, match="Connection closed by peer"):
        watch.after_exception(None, {0: raised(RuntimeError("Connection closed by peer")), 1: died()})


def test_what_a_worker_wrote_of_its_end_is_kept(tune: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "trials" / "001"
    folder.mkdir(parents=True)
    (folder / "failure.txt").write_text("step 3: nan\n")
    tune(lambda start, watch: raised(RuntimeError(CUDA)))
    assert failure(tmp_path) == "step 3: nan\n"


def test_a_full_disk_ends_the_run_at_the_first_start(tune: Callable[..., Any], tmp_path: Path) -> None:
    starts, reports = tune(lambda start, watch: raised(StorageError("/runs/mix: no space left on device")))
    assert starts == 1
    assert reports == [{STORAGE_ERROR: "/runs/mix: no space left on device"}]
    assert not (tmp_path / "trials" / "001" / "failure.txt").exists()


def test_a_reason_that_cannot_be_written_ends_the_run(
    tune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("rltune.orchestration.faults.write_atomically", full)
    starts, reports = tune(lambda start, watch: raised(RuntimeError(CUDA)))
    assert starts == MAX_STARTS
    assert [list(report) for report in reports] == [[STORAGE_ERROR]]
    assert "failure.txt: no space left on device" in reports[0][STORAGE_ERROR]


def test_a_driver_that_dies_is_tunes_to_start_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tune: Callable[..., Any]
) -> None:
    def gone(start: int, watch: FaultWatch) -> Exception | None:
        if start <= TUNE_FAILURES:
            raise ActorDiedError  # the controller is killed: fit raises what Ray says of it
        return None

    assert tune(gone)[0] == TUNE_FAILURES + 1


def test_a_memory_kill_is_passed_on() -> None:
    kills: list[str] = []
    text = "2 worker(s) were killed due to the node running low on memory.\nMemory on the node was 15.2GB / 16GB"
    FaultWatch(kills.append).after_exception(None, {0: OutOfMemoryError(text)})
    assert kills == [text.splitlines()[0]]


KILLED = "3 worker(s) were killed due to the node running low on memory. Memory on the node was 22GB used / 23GB limit"
TEXT = f"Traceback ..\nray.exceptions.OutOfMemoryError: {KILLED}\nSelected to kill: [..]\nRefer to the documentation"


def test_ray_s_advice_on_memory_is_not_taken_for_what_happened() -> None:
    assert last_line(TEXT) == f"ray.exceptions.OutOfMemoryError: {KILLED}"
    assert last_line("Traceback ..\nValueError: low\n\n") == "ValueError: low"


def test_a_driver_that_is_killed_to_free_memory_ends_the_run_with_that_message() -> None:
    with pytest.raises(RunError, match=r"^memory ran out, .*22GB used / 23GB limit\); free .* resumes$"):  # noqa: SIM117
        with memory_kills_told():
            raise RuntimeError(f"Caught unexpected exception: {TEXT}")  # as Tune words it
    with pytest.raises(RuntimeError, match=r"^another$"), memory_kills_told():
        raise RuntimeError("another")


def test_ray_still_says_of_a_worker_that_it_died_as_we_read_it() -> None:
    # a private class of Ray 2.60: where it has changed, deaths count as faults and three end a trial
    assert is_death(died())
    assert not is_death(raised(RuntimeError(CUDA)))
