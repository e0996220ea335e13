"""A cluster over hosts with addresses and folders of their own: attached to from its head, which has no CPU to give."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rltune.runs.results import read_results
from rltune.runs.rows import read_metrics
from tests.orchestration import processes
from tests.orchestration.hosts import HERE, REASON, Hosts, are_allowed, hosts
from tests.orchestration.processes import PATIENCE_S, trained_alone, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.long]

ADDRESS = f"{HERE}:6379"
WORKERS = ("10.77.0.1", "10.77.0.2")
TOKEN = "70c3" * 16
COUNT = f"""
import time
from rltune.orchestration.ray_private import NoGreeting, greet
count = -1
while True:
    try:
        found = len(greet("{ADDRESS}", timeout_s=5).sockets)
    except NoGreeting:
        found = 0
    if found != count:
        print(found, flush=True)
        count = found
    time.sleep(0.5)
"""
"""Prints how many nodes are alive whenever it changes."""


@dataclass
class World:
    """The cluster."""

    hosts: Hosts
    shared: Path
    private: Path
    """A folder of which each host has its own."""
    environment: dict[str, str]

    def rltune(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start rltune on the head."""
        command = [sys.executable, "-c", processes.MAIN, *arguments, "--address", ADDRESS]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return self.hosts.start(HERE, command, env=self.environment | variables, **pipes)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    if not are_allowed():
        pytest.skip(REASON)
    root = Path(tempfile.mkdtemp(prefix="rlt-"))  # not pytest's: a socket's path must not be long
    ray, private, shared = (root / name for name in ("ray", "private", "shared"))
    for folder in (ray, private, shared):
        folder.mkdir()
    variables = processes.environment(pause_s=0.3) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    variables |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=100000000"]
    with hosts([ray, private]) as found, (root / "log").open("w") as log:
        options: dict[str, Any] = {"env": variables, "stderr": log}
        head = ["--head", "--port=6379", "--num-cpus=0", f"--temp-dir={ray}", f"--node-ip-address={HERE}"]
        found.start(HERE, [*start, *head], stdout=log, **options)
        counting = found.start(HERE, [sys.executable, "-c", COUNT], stdout=subprocess.PIPE, **options)
        assert counting.stdout is not None
        for line in counting.stdout:  # one after the other
            if (count := int(line)) == 1 + len(WORKERS):
                break
            if count > 0:
                address = WORKERS[count - 1]
                found.add(address)
                node = [f"--address={ADDRESS}", "--num-cpus=1", f"--node-ip-address={address}"]
                found.start(address, [*start, *node], stdout=log, **options)
        else:
            pytest.fail((root / "log").read_text())
        counting.kill()
        yield World(found, shared, private, variables)
    shutil.rmtree(root, ignore_errors=True)


def test_a_token_that_is_refused_is_told_of_and_not_shown(world: World, write: Callable[..., Path]) -> None:
    wrong = "0bad" * 16
    process = world.rltune("doctor", RAY_AUTH_TOKEN=wrong)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, output
    assert f"the cluster at '{ADDRESS}' refuses the token of RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN to what" in output
    assert wrong not in output
    assert TOKEN not in output


def test_storage_that_is_not_shared_is_told_of_before_the_first_trial(world: World, write: Callable[..., Path]) -> None:
    path = write()
    process = world.rltune("train", str(path), "--storage", str(world.private / "runs"))
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, output
    assert "error the cluster cannot run this yet\n" in output
    assert (
        f"nodes {', '.join(WORKERS)}: --storage: {world.private}/runs is not the same folder as here: what was written "
        "there cannot be read (No such file or directory); name one that all nodes mount at the same path"
    ) in output
    assert "step" not in output


def test_a_host_that_is_lost_costs_no_trial_and_changes_no_number(
    world: World, write: Callable[..., Path], tmp_path: Path
) -> None:
    """The last of the tests: it leaves a host less."""
    path = write(
        rewards={"mine": {"reward": "tests.orchestration.own_rewards:unhurried"}, "smoothness": {}},
        optim={"lr": {"choice": [0.002, 0.005]}, "steps": 40, "batch": 4},
        evaluate={"every": 10, "prompts": 1, "confirm": 1},
        search={"sampler": "grid"},
    )
    process = world.rltune("sweep", str(path), "--storage", str(world.shared))
    run = world.shared / "tiny"

    def steps(trial: str) -> int:
        rows = read_metrics(run / "trials" / trial / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    wait_for(lambda: all(steps(trial) >= 12 for trial in ("001", "002")), process, "step 12 of both trials")
    world.hosts.kill(WORKERS[1])
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    results = {result.trial: result for result in read_results(run / "results.jsonl")}
    assert sorted(results) == ["000", "001", "002"]
    for trial in ("001", "002"):
        rows = read_metrics(run / "trials" / trial / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, 41))
        expected = trained_alone(path, tmp_path / "whole" / trial, results[trial].values)
        metrics = results[trial].metrics
        assert metrics == {name: expected[name] for name in metrics}
    assert os.listdir(run / "exports"), output  # by the host that is left: the head has no CPU to give
    assert (run / "confirmed.jsonl").is_file(), output
