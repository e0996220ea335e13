"""``rltune submit``, ``jobs``, ``logs``, ``stop`` and ``fetch`` as a user reads them, with a cluster that is none."""

from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus

from rltune.cli.jobs import _ago
from rltune.orchestration import dashboard, job_server, jobs
from rltune.runs.copies import Copy
from rltune.runs.objects import open_store
from tests.cli.conftest import Call
from tests.orchestration.fake_jobs import FakeServer
from tests.orchestration.processes import write_experiment
from tests.run_folders import experiment, result, write_run
from tests.storage import BUCKET

ADDRESS = ("--address", "http://head:8265")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    (tmp_path / "logs").mkdir()
    fake = FakeServer(folder=tmp_path / "logs")
    monkeypatch.setattr(job_server, "connect_to_jobs", lambda address: fake)
    monkeypatch.setattr(jobs, "POLL_S", 0.02)
    return fake


def submitted(server: FakeServer, name: str, run: Path | str) -> Any:
    about = {"rltune": "0.1.0", "name": name, "experiment": f"{name}.yaml", "run": str(run)}
    empty = server.folder / "empty"
    empty.mkdir(exist_ok=True)
    server.submit_job(
        entrypoint="", submission_id=f"rltune-{name}", runtime_env={"working_dir": str(empty)}, metadata=about
    )


@pytest.mark.long
def test_submit_says_what_goes_up_and_what_comes_next(
    server: FakeServer, call: Call, tmp_path: Path, tiny_pipeline: Path
) -> None:
    path = write_experiment(tmp_path, tiny_pipeline)
    storage = ("--storage", str(tmp_path / "shared"))
    code, out, err = call("submit", path, *storage, "--name", "dry", "--dry-run", *ADDRESS)
    assert (code, out, server.jobs) == (0, "", {})
    assert "goes up  dry.yaml (< 1 MB)\n" in err
    assert f"note  model.base: {tiny_pipeline} must be there on every node" in err
    server.chunks[:] = [["trial 001 started\n"]]
    code, out, err = call("submit", path, *storage, "--follow", *ADDRESS)
    assert code == 0, err
    run = tmp_path / "shared" / "tiny"
    assert out.startswith(f"submitted rltune-tiny, which writes {run}\n")
    for line in (
        "     follow  rltune logs rltune-tiny --follow --address http://head:8265\n",
        "       stop  rltune stop rltune-tiny --address http://head:8265\n",
        "      fetch  rltune fetch rltune-tiny --address http://head:8265\n",
        "  dashboard  http://head:8265/#/jobs/rltune-tiny\n",
    ):
        assert line in out
    assert out.endswith("trial 001 started\n")
    assert err.endswith("rltune-tiny succeeded\n")


@pytest.mark.long
def test_a_run_on_object_storage_is_fetched_by_its_job_and_by_its_address(
    server: FakeServer, call: Call, tmp_path: Path, s3: str
) -> None:
    folder = write_run(tmp_path / "shared", experiment(), [result("000"), result("001")])
    uri = f"s3://{BUCKET}/cli/mix"
    Copy(open_store(uri), folder.path).publish("")
    submitted(server, "mix", uri)
    code, out, err = call("fetch", "mix", tmp_path / "by-job", *ADDRESS)
    assert (code, err) == (0, "")
    assert f"{tmp_path / 'by-job'}: " in out
    assert "as it was a moment ago: rltune-mix goes on" in out
    code, out, _ = call("fetch", uri, tmp_path / "by-address")  # the cluster is not asked
    assert code == 0
    assert "goes on" not in out
    for copy in ("by-job", "by-address"):
        assert (tmp_path / copy / "results.jsonl").read_text() == folder.results_file.read_text()


@pytest.mark.parametrize("name", ["a/b", ""])
def test_a_name_that_is_none(server: FakeServer, call: Call, name: str) -> None:
    code, _, err = call("submit", "x.yaml", "--storage", "/shared", "--name", name)
    assert (code, "error --name: must be" in err) == (2, True)


def test_a_storage_is_asked_for_before_anything_is_read(call: Call) -> None:
    code, _, err = call("submit", "nosuch.yaml", *ADDRESS)
    assert code == 2
    assert err.startswith("error --storage: where on the cluster the run folder goes is not said; give")


def test_jobs_are_listed_by_the_run_that_they_are(server: FakeServer, call: Call) -> None:
    code, out, err = call("jobs")
    assert (code, out) == (0, "")
    assert err == "http://head:8265 has no job of rltune; 'rltune submit' hands one in\n"
    submitted(server, "mix", "/s/mix")
    submitted(server, "max", "/s/max")
    server.end("rltune-mix", JobStatus.FAILED)
    _, out, _ = call("jobs")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["job", "experiment", "state", "since", "run", "folder"]
    assert [(row[0], row[1], row[2], row[-1]) for row in lines[1:]] == [
        ("rltune-max", "max.yaml", "running", "/s/max"),
        ("rltune-mix", "mix.yaml", "failed", "/s/mix"),
    ]


def test_logs_are_printed_as_they_stand(server: FakeServer, call: Call) -> None:
    submitted(server, "mix", "/s/mix")
    (server.folder / "job-driver-rltune-mix.log").write_text("[red]one :smile:\n" + "long " * 50 + "\n")
    code, out, _ = call("logs", "mix")
    assert (code, out) == (0, "[red]one :smile:\n" + "long " * 50 + "\n")
    server.chunks[:] = [[RuntimeError("gone")]]
    server.end("rltune-mix", JobStatus.FAILED)
    code, _, err = call("logs", "mix", "--follow")
    assert (code, err) == (1, "error rltune-mix failed; what it printed last says why\n")


def test_stop_says_how_to_go_on(server: FakeServer, call: Call) -> None:
    submitted(server, "mix", "/s/mix")
    code, out, _ = call("stop", "mix")
    assert (code, out) == (0, "rltune-mix stopped; the same 'rltune submit mix.yaml ..' resumes /s/mix\n")
    assert call("stop", "mix") == (0, "rltune-mix has ended: stopped\n", "")
    assert call("stop", "nosuch")[0] == 2


@pytest.mark.slow
def test_fetch_brings_a_run_to_its_place(
    server: FakeServer, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "shared", experiment(), [result("000"), result("001")])
    submitted(server, "mix", run.path)
    monkeypatch.chdir(tmp_path)
    code, out, err = call("fetch", "mix")
    assert (code, err) == (0, "")
    assert out.startswith("runs/mix: < 1 MB, as it was a moment ago: rltune-mix goes on\n")
    assert (tmp_path / "runs" / "mix" / "results.jsonl").read_bytes() == run.results_file.read_bytes()
    code, _, err = call("fetch", "mix", run.path)
    assert (code, f"{run.path}: is there and is no copy" in err) == (2, True)


def test_times_are_for_people() -> None:
    assert [_ago(s) for s in (-1, 40, 100, 3600, 8000, 200_000)] == [
        "0 s",
        "40 s",
        "2 min",
        "60 min",
        "2.2 h",
        "2 days",
    ]


def test_dashboard_says_where_it_is_and_what_goes_on(
    server: FakeServer, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef0123456789abcdef")
    monkeypatch.setattr(dashboard, "connect_to_jobs", lambda address: server)
    monkeypatch.setattr(dashboard, "train_runs", lambda server: [f"mix-{i:03}" for i in range(8)])
    submitted(server, "mix", "/s/mix")
    code, out, err = call("dashboard", *ADDRESS)
    assert (code, err) == (0, "")
    assert out == (
        "http://head:8265\n"
        f"    answers  Ray {server.ray_version}, 1 node\n"
        "     tunnel  ssh -N -L 8265:127.0.0.1:8265 head, where only ssh gets there\n"
        "      token  the page asks for it: RAY_AUTH_TOKEN\n"
        "       jobs  rltune-mix: http://head:8265/#/jobs\n"
        "     trials  mix-000, mix-001, mix-002, mix-003, mix-004, mix-005 and 2 more\n"
        "    metrics  http://head:8265/#/metrics, once Prometheus and Grafana run\n"
    )
