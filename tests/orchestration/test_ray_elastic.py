"""A run on a cluster that loses a node while it trains, and gets one back."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rltune.runs.rows import read_metrics
from tests.orchestration import processes
from tests.training.runs import train

pytestmark = [pytest.mark.ray, pytest.mark.long]

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0})
nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
print("address", cluster.address, flush=True)
for line in sys.stdin:
    if line == "lose\\n":
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    else:
        nodes.append(cluster.add_node(num_cpus=1))
cluster.shutdown()
"""
"""Nodes of one CPU each beside a head without any; a line is a node less or more, the end of the input is theirs."""
PATIENCE_S = 300


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """A cluster of its own: with files and a token that no other on this machine has."""
    folder = Path(tempfile.mkdtemp(prefix="rlt-"))  # not pytest's: a socket's path must not be long
    (folder / "ray").mkdir()
    # a step takes its time: it is two minutes until a node is missed and another one seen, with both cores at work
    env = processes.environment(pause_s=0.3) | {"RAY_TMPDIR": str(folder)}
    env |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}  # instead of 60, which a node that is gone is waited for
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex(), "RAY_USAGE_STATS_ENABLED": "0"}
    yield env
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", CLUSTER], env=environment, **pipes)
    yield process
    process.communicate(timeout=60)


def tell(cluster: subprocess.Popen[str], what: str) -> None:
    assert cluster.stdin is not None
    cluster.stdin.write(f"{what}\n")
    cluster.stdin.flush()


def test_a_run_loses_a_node_goes_on_without_it_and_grows_again(
    cluster: subprocess.Popen[str], environment: dict[str, str], make_config: Callable[..., Any], tmp_path: Path
) -> None:
    assert cluster.stdout is not None
    address = next(line.split()[1] for line in cluster.stdout if line.startswith("address"))
    # with a large eps Adam's step is nearly linear in the gradient, so that rounding does not become a whole lr
    sections: dict[str, Any] = {
        "rewards": {
            "mine": {"reward": "tests.orchestration.own_rewards:unhurried", "weight": 0.75},
            "smoothness": {"weight": 0.25},
        },
        "optim": {"steps": 5000, "batch": 3, "lr": 1e-3, "eps": 1.0},
        "evaluate": {"every": 10, "images_per_prompt": 1},
    }
    config = make_config(**sections, resources={"workers": 2, "min_workers": 1})
    (tmp_path / "tiny.yaml").write_text(config.model_dump_json())  # JSON is YAML
    command = [sys.executable, "-c", processes.MAIN, "train", str(tmp_path / "tiny.yaml"), "--address", address]
    command += ["--storage", str(tmp_path / "runs")]
    log = tmp_path / "log"
    rows_file = tmp_path / "runs" / "tiny" / "trials" / "001" / "metrics.jsonl"

    def wait_for(condition: Callable[[dict[str, Any]], bool], what: str) -> int:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            rows = read_metrics(rows_file)
            if rows and condition(rows[-1]):
                return int(rows[-1]["step"])
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{what} never came; rltune printed:\n{log.read_text()}")
            time.sleep(0.2)

    with log.open("w") as output, processes.started(command, env=environment, stdout=output, stderr=output) as process:
        lost = wait_for(lambda row: row["step"] >= 25, "step 25")
        tell(cluster, "lose")
        wait_for(lambda row: row["workers"] == 1 and row["step"] >= lost + 10, "a step with one worker")
        tell(cluster, "get")
        reached = wait_for(lambda row: row["workers"] == 2 and row["step"] > lost + 10, "a step with two again")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130, log.read_text()
    rows = read_metrics(rows_file)[:reached]
    assert [row["step"] for row in rows] == list(range(1, reached + 1))  # none twice, none left out
    sizes = [row["workers"] for row in rows]
    changes = [size for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
    assert changes == [2, 1, 2]
    # up to twenty steps beyond the loss, as one worker takes them that is never interrupted
    num_steps = sizes.index(1) + 20
    sections["optim"]["steps"] = num_steps
    train(make_config(**sections), tmp_path / "whole")
    for whole, elastic in zip(read_metrics(tmp_path / "whole" / "trial" / "metrics.jsonl"), rows, strict=False):
        for name in ("train/reward", "grad_norm", "images_seen"):
            # float32, another order of additions; measured: below 1e-4 of a norm
            assert elastic[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-4), (whole["step"], name)
