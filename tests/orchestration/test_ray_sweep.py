"""Whole sweeps on a Ray cluster of this machine, through the command line, with kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from rltune.config.load import load_experiment
from rltune.runs.events import read_events
from rltune.runs.record import read_run
from rltune.runs.results import read_results
from rltune.runs.rows import read_metrics
from rltune.runs.status import read_status
from tests.orchestration.processes import (
    LOOPBACK_HEX,
    PATIENCE_S,
    REFERENCE,
    descendants,
    listening_addresses,
    wait_for,
    wait_for_end_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_sweep_gives_front_and_exports_and_listens_on_loopback_alone(
    write: Callable[..., Path], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    path = write(
        rewards={name: {"weight": {"simplex": True}} for name in ("brightness", "smoothness")},
        search={"trials": 3, "sampler": "random"},
    )
    process = start("sweep", str(path))
    run = tmp_path / "runs" / "tiny"
    wait_for(lambda: list(run.glob("trials/001/metrics.jsonl")), process, "the first step of trial 001")
    listening = listening_addresses(descendants(process.pid) | {process.pid})
    assert listening
    assert listening <= LOOPBACK_HEX

    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    results = {result.trial: result for result in read_results(run / "results.jsonl")}
    assert sorted(results) == ["000", "001", "002", "003"]
    assert all(result.is_ok for result in results.values())
    for trial in ("001", "002", "003"):
        weights = [results[trial].values[f"rewards.{name}.weight"] for name in ("brightness", "smoothness")]
        assert sum(weights) == pytest.approx(1)
        assert results[trial].metrics["eval/brightness"] > results["000"].metrics["eval/brightness"]
    front = json.loads((run / "front.json").read_text())
    assert front["knee"] in {member["trial"] for member in front["members"]}
    exported = sorted(path.parent.name for path in run.glob("exports/*/pytorch_lora_weights.safetensors"))
    assert front["knee"] in exported
    assert "Pareto front" in output
    # lines are printed at intervals, in which six small steps may all pass
    assert re.search(r"trial 001 step [36]/6", output)
    assert "Traceback" not in output
    noted = [event.event for event in read_events(run / "trials" / "001" / "events.jsonl")]
    assert [name for name in noted if name != "reported"] == [
        "suggested",
        "worker_started",
        "loaded",
        "first_step",
        "trained",
        "ended",
    ]
    usage = read_status(*read_run(run)).usage
    assert usage is not None
    assert all(usage.seconds[kind] > 0 for kind in ("training", "evaluation", "starting", "loading", "base"))
    assert sum(usage.seconds.values()) == pytest.approx(usage.total_s)
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{run / 'study.db'}")
    assert sorted(trial.user_attrs["trial"] for trial in study.trials) == ["001", "002", "003"]
    # the folder says again what was run, and the same command finds nothing left to do
    assert load_experiment(run / "experiment.yaml").space == load_experiment(path).space
    again = start("sweep", str(path))
    output, _ = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, output
    assert len(read_results(run / "results.jsonl")) == 4


def test_kills_lose_nothing_and_change_nothing(
    write: Callable[..., Path], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    path = write(optim={"lr": 0.002, "steps": 500, "batch": 4}, evaluate={"every": 5, "prompts": 2})
    run = tmp_path / "runs" / "tiny"
    metrics = run / "trials" / "001" / "metrics.jsonl"

    def has_come_to(step: int) -> Callable[[], bool]:
        return lambda: any(row["step"] >= step for row in read_metrics(metrics))

    process = start("train", str(path))
    wait_for(has_come_to(12), process, "step 12")
    (worker,) = (
        pid
        for pid in descendants(process.pid)
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::RayTrainWorker")
    )
    os.kill(worker, signal.SIGKILL)
    time.sleep(2)
    reached = read_metrics(metrics)[-1]["step"]
    wait_for(has_come_to(reached + 8), process, f"the step after the worker's death at {reached}")

    orphans = descendants(process.pid)
    process.kill()
    process.communicate()
    wait_for_end_of(orphans)
    process = start("train", str(path))
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
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, 501))

    command = [sys.executable, "-c", REFERENCE, str(path), str(tmp_path / "whole")]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=3 * PATIENCE_S)
    expected = json.loads((tmp_path / "whole" / "report.json").read_text())
    metrics_of_trial = results["001"].metrics
    assert metrics_of_trial == {name: expected[name] for name in metrics_of_trial}


PICKY = """
def score(images, prompts, *, fails=False):
    if fails:
        raise LookupError("no score today")
    return images.mean(dim=(1, 2, 3))
"""


def test_a_trial_that_fails_is_recorded_and_the_sweep_goes_on(
    write: Callable[..., Path],
    start: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "picky.py").write_text(PICKY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    path = write(
        rewards={"mine": {"reward": "picky:score", "options": {"fails": {"choice": [False, True]}}}},
        search={"trials": 4, "sampler": "random", "seed": 1},
    )
    process = start("sweep", str(path))
    output, _ = process.communicate(timeout=2 * PATIENCE_S)
    assert process.returncode == 0, output
    results = [result for result in read_results(tmp_path / "runs" / "tiny" / "results.jsonl") if result.trial != "000"]
    assert len(results) == 4
    failed = [result for result in results if not result.is_ok]
    assert failed
    assert {result.values["rewards.mine.options.fails"] for result in failed} == {True}
    assert {result.values["rewards.mine.options.fails"] for result in results if result.is_ok} == {False}
    for result in failed:
        assert "no score today" in result.reason
        assert f"trial {result.trial} failed: {result.reason}" in output
    assert "Last result" not in output  # Tune's own line
