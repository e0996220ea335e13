"""Whole sweeps on a Ray cluster of this machine, through the command line, with kills."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from rltune.config.load import load_experiment
from rltune.orchestration.results import read_results
from rltune.orchestration.status import read_status
from rltune.orchestration.sweep import open_run
from rltune.training.events import read_events
from rltune.training.reporter import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MAIN = "from rltune.cli.main import main; main()"
REFERENCE = """
import json, sys
from pathlib import Path
from rltune.config.load import load_experiment
from rltune.training.loop import train_run
from rltune.training.reporter import FolderReporter
root = Path(sys.argv[2])
reporter = FolderReporter(root / "checkpoints")
experiment = load_experiment(sys.argv[1])
train_run(experiment.shared, trial_dir=root / "trial", base_dir=root / "base", reporter=reporter)
(root / "report.json").write_text(json.dumps(reporter.reports[-1]))
"""
PATIENCE_S = 240


@pytest.fixture
def write(tmp_path: Path, tiny_pipeline: Path) -> Callable[..., Path]:
    """Write an experiment on the tiny pipeline; sections replace those below."""

    def build(**sections: Any) -> Path:
        raw: dict[str, Any] = {
            "name": "tiny",
            "model": {"base": str(tiny_pipeline), "lora": {"rank": 2, "alpha": 4}},
            "prompts": {"train": ["a cat", "a dog", "two red birds"], "eval": ["a snail", "an octopus"]},
            "sampler": {"steps": 4, "guidance": 2.0},
            "estimator": {"k": 3, "draw": "uniform"},
            "rewards": {"brightness": {"weight": 0.5}, "smoothness": {"weight": 0.5}},
            "optim": {"lr": 0.005, "steps": 6, "batch": 4},
            "evaluate": {"every": 3, "prompts": 2, "images_per_prompt": 2},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(json.dumps(raw | sections))  # JSON is YAML
        return path

    return build


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start rltune in a process of its own; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        env.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-c", MAIN, *arguments, "--storage", str(tmp_path / "runs")]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # a shell's background job ignores Ctrl-C, and so would everything that these tests start from one
        hears = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, env=env, preexec_fn=hears, **pipes)
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{what} never came; rltune printed:\n{process.communicate()[0]}")
        time.sleep(0.2)


def wait_for_end_of(pids: set[int]) -> None:
    """Wait until what a killed process has left behind is gone: it trains on for a moment."""
    deadline = time.monotonic() + PATIENCE_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"still there: {pids}"
        time.sleep(0.1)


def descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(after_name[1]), []).append(int(stat.parent.name))
    found, waiting = set(), [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child)
    return found


def listening_addresses(pids: set[int]) -> set[str]:
    """Return the local IP of every listening TCP socket of the processes, from /proc, IPv4 as hex."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A is LISTEN
                addresses.add(fields[1].split(":")[0])
    return addresses


LOOPBACK_HEX = {
    "0100007F",  # 127.0.0.1
    "00000000000000000000000001000000",  # ::1
    "0000000000000000FFFF00000100007F",  # ::ffff:127.0.0.1
}


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
        "dealt",
        "worker_started",
        "loaded",
        "first_step",
        "trained",
        "ended",
    ]
    usage = read_status(*open_run(run)).usage
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
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=PATIENCE_S)
    expected = json.loads((tmp_path / "whole" / "report.json").read_text())
    metrics_of_trial = results["001"].metrics
    assert metrics_of_trial == {name: expected[name] for name in metrics_of_trial}


def test_a_trial_that_fails_is_recorded_and_the_sweep_goes_on(
    write: Callable[..., Path], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    good, empty = tmp_path / "good.txt", tmp_path / "empty.txt"
    good.write_text("a cat\n")
    empty.write_text("# nothing yet\n")
    path = write(
        prompts={"train": {"choice": [str(good), str(empty)]}, "eval": ["a snail", "an octopus"]},
        search={"trials": 4, "sampler": "random", "seed": 1},
    )
    process = start("sweep", str(path))
    output, _ = process.communicate(timeout=2 * PATIENCE_S)
    assert process.returncode == 0, output
    results = [result for result in read_results(tmp_path / "runs" / "tiny" / "results.jsonl") if result.trial != "000"]
    assert len(results) == 4
    failed = [result for result in results if not result.is_ok]
    assert {result.values["prompts.train"] for result in failed} == {str(empty)}
    assert {result.values["prompts.train"] for result in results if result.is_ok} == {str(good)}
    for result in failed:
        assert "holds no prompt" in result.reason
        assert f"trial {result.trial} failed: {result.reason}" in output
    assert "Last result" not in output  # Tune's own line
