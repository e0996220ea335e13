"""A sweep on object storage whose driver is killed, told to go and interrupted, each time on a machine that is gone."""

import re
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from rltune.runs.objects import open_store
from rltune.runs.remote import reader_folder
from rltune.runs.results import read_results
from rltune.runs.rows import read_metrics
from rltune.training.checkpoint import read_checkpoint_meta
from tests.orchestration.processes import (
    PATIENCE_S,
    descendants,
    name_of,
    rltune,
    trained_alone,
    wait_for,
    wait_for_end_of,
)
from tests.storage import BUCKET

pytestmark = [pytest.mark.ray, pytest.mark.long]

STORAGE = f"s3://{BUCKET}/kills"
STEPS = 40


def test_a_sweep_goes_on_from_the_bucket_alone_and_has_the_numbers_of_trials_trained_alone(
    write: Callable[..., Path], tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        rewards={"mine": {"reward": "tests.orchestration.own_rewards:unhurried"}, "smoothness": {}},
        optim={"lr": {"choice": [0.002, 0.005]}, "steps": STEPS, "batch": 4},
        evaluate={"every": 5, "prompts": 1, "images_per_prompt": 1, "confirm": 0},
        search={"sampler": "grid"},
        resources={"concurrent": 1},
    )
    store = open_store(f"{STORAGE}/tiny")

    def on(machine: str, pause_s: float = 0.15) -> AbstractContextManager[subprocess.Popen[str]]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        return rltune("sweep", str(path), storage=STORAGE, pause_s=pause_s)

    def checkpoints() -> set[str]:
        return {key for key in store.list("trials/") if key.endswith("/checkpoint.json")}

    def one_more() -> Callable[[], bool]:
        before = checkpoints()
        return lambda: bool(checkpoints() - before)

    with on("first", pause_s=2.0) as process:  # its first trial is not to end while the late one comes
        wait_for(one_more(), process, "a checkpoint")
        with on("other") as late:
            output, _ = late.communicate(timeout=PATIENCE_S)
        assert late.returncode == 2, output
        assert re.fullmatch(f"error {STORAGE}/tiny: process {process.pid} on .* works on this run; wait .*\n", output)
        orphans = {pid for pid in descendants(process.pid) if name_of(pid).startswith("ray::")}
        process.kill()
        process.communicate()
    wait_for_end_of(orphans)

    with on("second") as process:
        wait_for(one_more(), process, "a checkpoint after the driver's death")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, output
    assert f"the same command resumes {STORAGE}/tiny" in output
    assert store.list(".claims/") == store.list(".stop") == {}
    folder = reader_folder(f"{STORAGE}/tiny")
    folder.bring(folder.path / "trials", wanted=lambda key: True)
    ended = {result.trial for result in read_results(folder.results_file)}
    (trial,) = {spec.id for spec in folder.read_trials()} - ended
    newest = max(folder.checkpoints_dir(trial).glob("*/*/checkpoint.json")).parent
    reached = read_metrics(folder.trial_dir(trial) / "metrics.jsonl")[-1]["step"]
    assert read_checkpoint_meta(newest).progress.step == reached < STEPS  # asked to leave, it wrote one where it was

    with on("third") as process:
        wait_for(one_more(), process, "a checkpoint after the SIGTERM")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, output
    assert store.list(".claims/") == {}

    with on("fourth", pause_s=0.0) as process:
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    folder = reader_folder(f"{STORAGE}/tiny")
    results = {result.trial: result for result in read_results(folder.results_file)}
    assert sorted(results) == ["000", "001", "002"]
    for trial in ("001", "002"):
        rows = read_metrics(folder.trial_dir(trial) / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        expected = trained_alone(path, tmp_path / "whole" / trial, results[trial].values)
        metrics = results[trial].metrics
        assert metrics == {name: expected[name] for name in metrics}
