"""A cluster over hosts that share no folder: what a trial with a worker on each makes meets in a bucket."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rltune.runs.results import read_results
from rltune.runs.rows import read_metrics
from tests import storage
from tests.orchestration import processes
from tests.orchestration.hosts import HERE, REASON, are_allowed
from tests.orchestration.processes import PATIENCE_S, trained_alone
from tests.orchestration.ray_hosts import WORKERS, RayHosts, ray_hosts

pytestmark = [pytest.mark.ray, pytest.mark.long]

PORT = 5555
ENDPOINT = f"http://{HERE}:{PORT}"
NOWHERE = f"http://{HERE}:9"
"""What nodes take for S3 unless an address names another: one that nothing answers at."""
MAKE_BUCKET = f"""
import time
from urllib.request import Request, urlopen
while True:
    try:
        urlopen(Request("{ENDPOINT}/{storage.BUCKET}", method="PUT")).close()
        break
    except OSError:
        time.sleep(0.2)
"""


@pytest.fixture(scope="module")
def world() -> Iterator[RayHosts]:
    if not are_allowed():
        pytest.skip(REASON)
    variables = storage.environment(NOWHERE)
    with ray_hosts(variables) as found, (found.root / "s3.log").open("w") as log:
        options: dict[str, Any] = {"env": found.environment, "stdout": log, "stderr": log}
        found.hosts.start(HERE, [sys.executable, "-m", "moto.server", "-H", HERE, "-p", str(PORT)], **options)
        found.hosts.start(HERE, [sys.executable, "-c", MAKE_BUCKET], **options).wait(timeout=PATIENCE_S)
        yield found


def said(process: subprocess.Popen[str], code: int) -> str:
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, output
    return output


def test_a_bucket_that_nodes_cannot_reach_is_told_of_once_before_the_first_trial(
    world: RayHosts, write: Callable[..., Path]
) -> None:
    uri = f"s3://{storage.BUCKET}/unseen"
    output = said(world.rltune("train", str(write()), "--storage", uri, AWS_ENDPOINT_URL=ENDPOINT), 2)
    assert "error the cluster cannot run this yet\n" in output
    assert f"nodes {', '.join([*WORKERS, HERE])}: --storage: cannot be used there: {uri}/tiny/.probe/" in output
    assert output.count("the store does not answer") == 1
    assert "step" not in output


def test_a_trial_with_a_worker_on_each_host_works_in_a_bucket_under_both_executors(
    world: RayHosts, write: Callable[..., Path], tmp_path: Path
) -> None:
    """Each host has its own copies; the driver's has no place that a worker could see."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for executor in ("warm", "train"):
        # with a large eps Adam's step is nearly linear in the gradient, so that rounding does not become a whole lr
        path = write(
            name=executor,
            optim={"lr": 0.002, "steps": 4, "batch": 4, "eps": 1.0},
            evaluate={"every": 2, "prompts": 2, "images_per_prompt": 1, "confirm": 0},
            resources={"workers": 2, "executor": executor},
        )
        uri = f"s3://{storage.BUCKET}/{executor}?endpoint_override={HERE}:{PORT}&scheme=http"
        output = said(world.rltune("train", str(path), "--storage", uri), 0)
        copy = world.shared / f"{executor}-copy"
        words = ["fetch", uri.replace("?", f"/{executor}?"), str(copy), "--checkpoints"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = [sys.executable, "-c", processes.MAIN, *words]
        said(world.hosts.start(HERE, command, env=world.environment, **pipes), 0)
        rows[executor] = read_metrics(copy / "trials" / "001" / "metrics.jsonl")
        assert [row["workers"] for row in rows[executor]] == [2] * 4
        assert os.listdir(copy / "exports" / "001"), output
        assert sorted(result.trial for result in read_results(copy / "results.jsonl")) == ["000", "001"]
    trained_alone(path, tmp_path / "whole")
    whole = read_metrics(tmp_path / "whole" / "trial" / "metrics.jsonl")
    for name in ("train/reward", "grad_norm", "images_seen"):
        ours = [row[name] for row in rows["train"]]
        assert ours == [row[name] for row in rows["warm"]]
        # float32, another order of additions
        assert ours == pytest.approx([row[name] for row in whole], rel=1e-3, abs=1e-4)
