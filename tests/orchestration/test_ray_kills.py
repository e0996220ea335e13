"""A run on a Ray cluster of this machine that is killed in parts, whole, and by Ctrl-C; and what each leaves behind."""

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rltune.orchestration.scratch import KEPT_S
from rltune.runs.results import read_results
from rltune.runs.rows import read_metrics
from tests.orchestration.processes import (
    PATIENCE_S,
    age,
    descendants,
    name_of,
    trained_alone,
    wait_for,
    wait_for_end_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.long]

UNHURRIED = "tests.orchestration.own_rewards:unhurried"
PAUSE_S = 0.1
"""What a step takes at least: the signals below come before the last one, on a fast machine too."""


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What TMPDIR is to rltune: not pytest's, since a socket's path must not be long."""
    with tempfile.TemporaryDirectory(prefix="rlt-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@contextmanager
def nothing_left_of(process: subprocess.Popen[str], temporary: Path) -> Iterator[None]:
    """Check that what rltune has started, and where it wrote for the moment, is gone once the block has ended it."""
    started = descendants(process.pid)
    assert len(started) > 5
    yield
    assert process.poll() is not None
    assert [name_of(pid) for pid in started if name_of(pid)] == []
    assert left_in(temporary) == []


def left_in(temporary: Path) -> list[Path]:
    """Return what is there but for what libraries make once they are imported, empty, in every process.

    That is torch's cache, one for all, and two folders of wandb's, which stay where a process is killed.
    """
    return [path for path in temporary.iterdir() if not re.search(r"^torchinductor_|wandb-\w+$", path.name)]


def test_kills_lose_nothing_and_change_nothing(
    write: Callable[..., Path], start: Callable[..., subprocess.Popen[str]], tmp_path: Path, temporary: Path
) -> None:
    shared_memory = set(os.listdir("/dev/shm"))
    path = write(
        rewards={"mine": {"reward": UNHURRIED}, "smoothness": {}},
        optim={"lr": 0.002, "steps": 80, "batch": 4},
        evaluate={"every": 10, "prompts": 2},
    )
    run = tmp_path / "runs" / "tiny"
    metrics = run / "trials" / "001" / "metrics.jsonl"

    def has_come_to(step: int) -> Callable[[], bool]:
        return lambda: any(row["step"] >= step for row in read_metrics(metrics))

    process = start("train", str(path), pause_s=PAUSE_S)
    wait_for(has_come_to(12), process, "step 12")
    (worker,) = (pid for pid in descendants(process.pid) if name_of(pid).startswith("ray::RayTrainWorker"))
    os.kill(worker, signal.SIGKILL)
    time.sleep(2)
    reached = read_metrics(metrics)[-1]["step"]
    wait_for(has_come_to(reached + 8), process, f"the step after the worker's death at {reached}")

    orphans = descendants(process.pid)
    process.kill()
    process.communicate()
    wait_for_end_of(orphans)
    (killed,) = left_in(temporary)
    assert (killed / "session_latest" / "logs" / "raylet.out").is_file()
    age(killed, KEPT_S + 60)
    process = start("train", str(path), pause_s=PAUSE_S)
    reached = read_metrics(metrics)[-1]["step"]
    wait_for(has_come_to(reached + 8), process, f"the step after the driver's death at {reached}")
    assert not killed.exists()

    with nothing_left_of(process, temporary):
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, output
    assert "the same command resumes" in output
    assert [result.trial for result in read_results(run / "results.jsonl")] == ["000"]

    process = start("train", str(path))
    reached = read_metrics(metrics)[-1]["step"]
    wait_for(has_come_to(reached + 1), process, f"the step after the interrupt at {reached}")
    with nothing_left_of(process, temporary):
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert set(os.listdir("/dev/shm")) <= shared_memory
    results = {result.trial: result for result in read_results(run / "results.jsonl")}
    assert sorted(results) == ["000", "001"]
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, 81))

    expected = trained_alone(path, tmp_path / "whole")
    metrics_of_trial = results["001"].metrics
    assert metrics_of_trial == {name: expected[name] for name in metrics_of_trial}
