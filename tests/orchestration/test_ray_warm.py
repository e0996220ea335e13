"""The warm executor through the command line, with kills: its numbers are those of a trial trained alone."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rltune.runs.results import read_results
from rltune.runs.rows import read_metrics
from rltune.training.checkpoint import newest_whole, read_checkpoint_meta
from tests.orchestration.processes import PATIENCE_S, descendants, name_of, trained_alone, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.long]


def test_a_warm_sweep_survives_and_ends_with_the_numbers_of_trials_trained_alone(
    write: Callable[..., Path], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    path = write(
        rewards={"mine": {"reward": "tests.orchestration.own_rewards:unhurried"}, "smoothness": {}},
        optim={"lr": {"choice": [0.002, 0.005]}, "steps": 60, "batch": 4},
        evaluate={"every": 10, "prompts": 2, "confirm": 0},
        search={"sampler": "grid"},
        resources={"executor": "warm", "concurrent": 1},
    )
    run = tmp_path / "runs" / "tiny"

    def has_come_to(trial: str, step: int) -> Callable[[], bool]:
        file = run / "trials" / trial / "metrics.jsonl"
        return lambda: any(row["step"] >= step for row in read_metrics(file))

    process = start("sweep", str(path), pause_s=0.1)  # long enough for the signals to come in time
    wait_for(has_come_to("001", 15), process, "step 15")
    (worker,) = (pid for pid in descendants(process.pid) if name_of(pid).startswith("ray::WarmWorker"))
    os.kill(worker, signal.SIGKILL)
    wait_for(has_come_to("002", 15), process, "step 15 of the second trial, on workers that ran the first")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, output
    assert not (run / ".stop").exists()
    reached = read_metrics(run / "trials" / "002" / "metrics.jsonl")[-1]["step"]
    newest, _ = newest_whole(run / "trials" / "002" / "checkpoints")
    assert newest is not None
    assert read_checkpoint_meta(newest).progress.step == reached  # asked to leave, it wrote a checkpoint where it was

    process = start("sweep", str(path))
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    results = {result.trial: result for result in read_results(run / "results.jsonl")}
    assert sorted(results) == ["000", "001", "002"]
    for trial in ("001", "002"):
        rows = read_metrics(run / "trials" / trial / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, 61))
        expected = trained_alone(path, tmp_path / "whole" / trial, results[trial].values)
        metrics = results[trial].metrics
        assert metrics == {name: expected[name] for name in metrics}


def test_one_worker_takes_trials_of_words_and_of_loras_in_turn(
    write: Callable[..., Path], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    words, lora = {"model.adapter.kind": "prompt"}, {"model.adapter.kind": "lora"}
    path = write(
        model={
            "adapter": {"kind": {"choice": ["prompt", "lora"]}},
            "prompt": {
                "template": "{prompt}{light}",
                "words": {"light": {"choice": [", dim light", ", warm light"], "when": words}},
            },
        },
        prompts={"train": "builtin", "eval": "builtin-heldout"},
        optim={"lr": {"choice": [0.002, 0.005], "when": lora}, "steps": 4, "batch": 2},
        evaluate={"every": 2, "prompts": 2, "confirm": 0},
        search={"sampler": "grid", "points": []},
        resources={"executor": "warm", "concurrent": 1},
    )
    process = start("sweep", str(path))
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    run = tmp_path / "runs" / "tiny"
    results = {result.trial: result for result in read_results(run / "results.jsonl")}
    kinds = [result.values.get("model.adapter.kind") for result in results.values()]
    assert kinds == [None, "prompt", "prompt", "lora", "lora"]
    for trial, result in list(results.items())[1:]:
        expected = trained_alone(path, tmp_path / "whole" / trial, result.values)
        assert result.metrics == {name: expected[name] for name in result.metrics}
    assert len({tuple(result.metrics.items()) for result in results.values()}) == 5
