"""A run on a Ray cluster of this machine that is killed in parts, whole, and by Ctrl-C."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rltune.runs.results import read_results
from rltune.runs.rows import read_metrics
from tests.orchestration.processes import (
    PATIENCE_S,
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


def test_kills_lose_nothing_and_change_nothing(
    write: Callable[..., Path], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
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

    orphans = {pid for pid in descendants(process.pid) if name_of(pid).startswith("ray::")}
    process.kill()
    process.communicate()
    wait_for_end_of(orphans)
    process = start("train", str(path), pause_s=PAUSE_S)
    reached = read_metrics(metrics)[-1]["step"]
    wait_for(has_come_to(reached + 8), process, f"the step after the driver's death at {reached}")

    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, output
    assert "the same command resumes" in output
    assert [result.trial for result in read_results(run / "results.jsonl")] == ["000"]

    process = start("train", str(path))
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    results = {result.trial: result for result in read_results(run / "results.jsonl")}
    assert sorted(results) == ["000", "001"]
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, 81))

    expected = trained_alone(path, tmp_path / "whole")
    metrics_of_trial = results["001"].metrics
    assert metrics_of_trial == {name: expected[name] for name in metrics_of_trial}
