"""A run that is submitted to a cluster from another process: followed, stopped, resumed and brought home."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from rltune.orchestration.job_server import UNREACHED
from rltune.orchestration.ray_private import LOCAL
from rltune.runs.objects import open_store
from rltune.runs.results import read_results
from rltune.runs.rows import read_metrics
from tests.orchestration.processes import MAIN, PATIENCE_S, environment, started, trained_alone, wait_for
from tests.storage import BUCKET

pytestmark = [pytest.mark.ray, pytest.mark.long]

UNHURRIED = "tests.orchestration.own_rewards:unhurried"
LOOPBACK = LOCAL | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
NO_TOKEN = "asks for a token"


@pytest.fixture
def cluster() -> Iterator[Mapping[str, str]]:
    """A head of two CPUs on loopback that wants a token and was started without this checkout: what a client needs."""
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        port, dashboard = one.getsockname()[1], other.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="rl", dir="/tmp")  # a longer path than this leaves no room for Ray's sockets
    client = LOOPBACK | {"RAY_AUTH_TOKEN": secrets.token_hex(16)}
    head = environment(pause_s=0.3) | client
    del head["PYTHONPATH"]
    head["PATH"] = f"{Path(sys.executable).parent}:{head['PATH']}"
    words = ["ray", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}", f"--port={port}"]
    words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    words.append("--dashboard-agent-listen-port=0")  # a test beside this one may have the port that Ray always takes
    log = Path(folder, "head.log")
    try:
        with log.open("w") as out, started(words, env=head, cwd="/", stdout=out, stderr=out) as process:
            wait_for(lambda: "Ray runtime started" in log.read_text(), process, "the head")
            yield client | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", MAIN, *words]


def says(env: Mapping[str, str], *words: str, code: int = 0) -> str:
    """Run rltune to its end, and return what it prints."""
    done = subprocess.run(command(*words), env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_submitted_followed_stopped_resumed_and_fetched(
    cluster: Mapping[str, str], write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(
        rewards={"mine": {"reward": UNHURRIED}, "smoothness": {}},
        optim={"lr": 0.002, "steps": 40, "batch": 4},
        evaluate={"every": 20, "prompts": 2},
    )
    run = tmp_path / "shared" / "tiny"
    metrics = run / "trials" / "001" / "metrics.jsonl"
    here = environment() | cluster
    said = partial(says, here)

    submit = ("submit", str(path), "--storage", str(run.parent), "--package", "--follow")
    lone = {name: value for name, value in here.items() if name != "RAY_AUTH_TOKEN"}
    assert NO_TOKEN in says(lone | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}, "jobs", code=2)
    with started(command(*submit), env=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as following:
        wait_for(lambda: (run / "trials" / "001").is_dir(), following, "the trial")
        assert "rltune-tiny" in said("jobs")
        assert "works on this run" in said(*submit, code=2)
        wait_for(lambda: any(row["step"] >= 2 for row in read_metrics(metrics)), following, "step 2")
        assert f"rltune-tiny stopped; the same 'rltune submit {path} ..' resumes {run}" in said("stop", "tiny")
        output, _ = following.communicate(timeout=PATIENCE_S)
    assert "rltune-tiny stopped" in output, output
    assert "trials are left; the same command resumes" in output
    reached = read_metrics(metrics)[-1]["step"]
    assert 2 <= reached < 40
    assert read_results(run / "results.jsonl")[-1].trial == "000"

    output = said(*submit)
    assert "submitted rltune-tiny-2, which writes" in output
    assert "\x1b" not in output
    assert set(output) & set("\N{BOX DRAWINGS LIGHT VERTICAL}\N{BOX DRAWINGS LIGHT HORIZONTAL}") == set()
    assert cluster["RAY_AUTH_TOKEN"] not in output
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, 41))
    expected = trained_alone(path, tmp_path / "whole")
    result = next(result for result in read_results(run / "results.jsonl") if result.trial == "001")
    assert result.metrics == {name: expected[name] for name in result.metrics}

    copy = tmp_path / "copy"
    assert f"{copy}: " in said("fetch", "tiny", str(copy))
    assert (copy / "results.jsonl").read_bytes() == (run / "results.jsonl").read_bytes()
    lora = "exports/001/pytorch_lora_weights.safetensors"
    assert (copy / lora).read_bytes() == (run / lora).read_bytes()
    assert UNREACHED in said("jobs", "--address", "http://127.0.0.1:9", code=1)
    assert not os.path.exists(copy / "trials" / "001" / "checkpoints")


@pytest.fixture
def bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs in the bucket have their copies on the cluster, which is to start after this."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_submitted_to_a_bucket_followed_stopped_resumed_on_another_machine_and_fetched(
    bucket: Path, cluster: Mapping[str, str], write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(
        rewards={"mine": {"reward": UNHURRIED}, "smoothness": {}},
        optim={"lr": 0.002, "steps": 40, "batch": 4},
        evaluate={"every": 5, "prompts": 1, "images_per_prompt": 1, "confirm": 0},
    )
    storage = f"s3://{BUCKET}/jobs"
    store = open_store(f"{storage}/tiny")
    here = environment() | cluster
    said = partial(says, here)
    submit = ("submit", str(path), "--storage", storage, "--package", "--follow")

    def checkpoints() -> list[str]:
        return [key for key in store.list("trials/001/") if key.endswith("/checkpoint.json")]

    with started(command(*submit), env=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as following:
        wait_for(checkpoints, following, "a checkpoint")
        assert f"{storage}/tiny" in said("jobs")
        assert f"the same 'rltune submit {path} ..' resumes {storage}/tiny" in said("stop", "tiny")
        output, _ = following.communicate(timeout=PATIENCE_S)
    assert f"the same command resumes {storage}/tiny" in output, output
    assert store.list(".claims/") == store.list(".stop") == {}

    copy = tmp_path / "copy"
    assert f"{copy}: " in said("fetch", "tiny", str(copy))
    assert [result.trial for result in read_results(copy / "results.jsonl")] == ["000"]
    assert read_metrics(copy / "trials" / "001" / "metrics.jsonl")[-1]["step"] < 40
    shutil.rmtree(bucket)  # nothing of the run is on the cluster any more
    assert "submitted rltune-tiny-2, which writes" in said(*submit)
    assert f"{copy}: " in said("fetch", "tiny", str(copy))
    assert [row["step"] for row in read_metrics(copy / "trials" / "001" / "metrics.jsonl")] == list(range(1, 41))
    expected = trained_alone(path, tmp_path / "whole")
    result = next(result for result in read_results(copy / "results.jsonl") if result.trial == "001")
    assert result.metrics == {name: expected[name] for name in result.metrics}
    assert os.listdir(copy / "exports" / "001")
    assert not os.path.exists(copy / "trials" / "001" / "checkpoints")
