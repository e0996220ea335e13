"""A cluster over hosts with addresses and folders of their own: attached to from its head, which has no CPU to give."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rltune.orchestration.metrics import GAUGES
from rltune.runs.results import read_results
from rltune.runs.rows import read_metrics
from tests.orchestration.hosts import HERE, REASON, are_allowed
from tests.orchestration.processes import PATIENCE_S, trained_alone, wait_for
from tests.orchestration.ray_hosts import ADDRESS, TOKEN, WORKERS, RayHosts, ray_hosts

pytestmark = [pytest.mark.ray, pytest.mark.long]


@pytest.fixture(scope="module")
def world() -> Iterator[RayHosts]:
    if not are_allowed():
        pytest.skip(REASON)
    with ray_hosts() as found:
        yield found


def test_a_token_that_is_refused_is_told_of_and_not_shown(world: RayHosts, write: Callable[..., Path]) -> None:
    wrong = "0bad" * 16
    process = world.rltune("doctor", RAY_AUTH_TOKEN=wrong)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, output
    assert f"the cluster at '{ADDRESS}' refuses the token of RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN to what" in output
    assert wrong not in output
    assert TOKEN not in output


def test_storage_that_is_not_shared_is_told_of_before_the_first_trial(
    world: RayHosts, write: Callable[..., Path]
) -> None:
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


def test_a_sweep_is_seen_by_the_names_of_its_actors_and_at_the_metrics_endpoints_of_nodes(
    world: RayHosts, write: Callable[..., Path]
) -> None:
    path = write(
        name="seen",
        rewards={"mine": {"reward": "tests.orchestration.own_rewards:unhurried"}, "smoothness": {}},
        optim={"lr": {"choice": [0.002, 0.005]}, "steps": 2000, "batch": 4},  # it does not come to its end
        evaluate={"every": 10, "prompts": 1, "confirm": 0},
        search={"sampler": "grid"},
        resources={"executor": "warm"},
    )
    process = world.rltune("sweep", str(path), "--storage", str(world.shared))
    metrics = world.shared / "seen" / "trials" / "001" / "metrics.jsonl"
    wait_for(lambda: any(row["step"] >= 12 for row in read_metrics(metrics)), process, "step 12")
    wanted = {f"ray_{name}" for name in GAUGES}  # which are what Grafana's file asks for: test_metrics.py
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = world.ask()
        pages = "\n".join(found["metrics"].values())
        tagged = {line.partition("{")[0] for line in pages.splitlines() if 'run="seen"' in line}
        if tagged >= wanted:
            break
        assert time.monotonic() < deadline, (wanted - tagged, process.poll())
    process.terminate()
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, output
    assert sorted(found["metrics"]) == sorted([*WORKERS, HERE])
    assert {"seen-gang", "seen-worker-0"} <= set(found["names"])
    (k,) = {line.rpartition(" ")[2] for line in pages.splitlines() if line.startswith("ray_rltune_k{")}
    assert float(k) == 3


def test_a_host_that_is_lost_costs_no_trial_and_changes_no_number(
    world: RayHosts, write: Callable[..., Path], tmp_path: Path
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
    world.kill_ray(WORKERS[1])
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
