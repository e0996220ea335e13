"""What breaks between hosts with addresses of their own: a driver's machine, the network, the head."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rltune.runs.results import read_results
from rltune.runs.rows import read_metrics
from tests.orchestration.hosts import HERE, REASON, are_allowed, kill
from tests.orchestration.processes import PATIENCE_S, trained_alone, wait_for
from tests.orchestration.ray_hosts import WORKERS, RayHosts, ray_hosts

pytestmark = [pytest.mark.ray, pytest.mark.long]

TRIALS = ("001", "002")
STEPS = 40
MIDDLE = 12
CUT_S = 30
"""How long the network is away."""


@pytest.fixture(scope="module")
def world() -> Iterator[RayHosts]:
    if not are_allowed():
        pytest.skip(REASON)
    with ray_hosts() as found:
        yield found


Broken = Callable[[str], "Sweep"]


class Sweep:
    """A sweep of two trials, long enough to be broken in the middle, in a folder that all hosts share."""

    def __init__(self, world: RayHosts, path: Path, name: str) -> None:
        self._world = world
        self._path = path
        self.run = world.shared / name

    def start(self, at: str) -> subprocess.Popen[str]:
        return self._world.rltune("sweep", str(self._path), "--storage", str(self._world.shared), at=at)

    def start_to_the_middle(self, at: str) -> subprocess.Popen[str]:
        """Start it, and return once the last trial, which started when there was room, is on its way."""
        process = self.start(at)
        metrics = self.run / "trials" / TRIALS[-1] / "metrics.jsonl"
        wait_for(lambda: any(row["step"] >= MIDDLE for row in read_metrics(metrics)), process, f"step {MIDDLE}")
        return process

    @property
    def ended(self) -> list[str]:
        return [result.trial for result in read_results(self.run / "results.jsonl")]

    def check(self, root: Path) -> None:
        """Every trial is there once, with every step once, and has the numbers of one that nothing broke."""
        assert sorted(self.ended) == ["000", *TRIALS]
        for result in read_results(self.run / "results.jsonl"):
            if result.trial not in TRIALS:
                continue
            rows = read_metrics(self.run / "trials" / result.trial / "metrics.jsonl")
            assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
            expected = trained_alone(self._path, root / "whole" / result.trial, result.values)
            assert result.metrics == {name: expected[name] for name in result.metrics}


@pytest.fixture
def sweep(world: RayHosts, write: Callable[..., Path]) -> Broken:
    def make(name: str) -> Sweep:
        path = write(
            name=name,
            rewards={"mine": {"reward": "tests.orchestration.own_rewards:unhurried"}, "smoothness": {}},
            optim={"lr": {"choice": [0.002, 0.005]}, "steps": STEPS, "batch": 4},
            evaluate={"every": 10, "prompts": 1, "confirm": 0},
            search={"sampler": "grid"},
        )
        return Sweep(world, path, name)

    return make


def test_a_driver_whose_host_dies_is_resumed_from_another_and_leaves_nothing(
    world: RayHosts, sweep: Broken, tmp_path: Path
) -> None:
    ours = sweep("driver")
    process = ours.start_to_the_middle(WORKERS[0])
    kill([process])
    deadline = time.monotonic() + PATIENCE_S
    while left := world.ask()["actors"]:
        assert time.monotonic() < deadline, left
    assert world.busy() == []
    assert TRIALS[-1] not in ours.ended
    process = ours.start(HERE)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    ours.check(tmp_path)
    assert os.listdir(ours.run / "exports"), output


def test_a_network_that_is_away_for_half_a_minute_changes_no_number(
    world: RayHosts, sweep: Broken, tmp_path: Path
) -> None:
    ours = sweep("network")
    process = ours.start_to_the_middle(HERE)
    (*_, host) = world.busy()
    world.hosts.cut(host)
    time.sleep(CUT_S)
    assert TRIALS[-1] not in ours.ended
    world.hosts.mend(host)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    ours.check(tmp_path)


def test_a_head_that_dies_takes_no_finished_trial_along(world: RayHosts, sweep: Broken, tmp_path: Path) -> None:
    """The last of the tests: its cluster is another."""
    ours = sweep("head")
    process = ours.start_to_the_middle(HERE)
    ended = ours.ended
    world.kill_ray(HERE)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert "the same command resumes" in output
    world.kill_ray(*WORKERS)
    world.start_nodes()
    process = ours.start(HERE)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert ours.ended[: len(ended)] == ended
    ours.check(tmp_path)
