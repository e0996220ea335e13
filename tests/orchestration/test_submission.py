"""Handing an experiment in: what is checked before anything goes up, and what Ray is given."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import typer.main

import rltune
from rltune.cli.main import app
from rltune.config.load import Experiment, load_experiment
from rltune.errors import ExperimentError, UserError
from rltune.orchestration import jobs
from rltune.orchestration.known import known_names
from rltune.orchestration.submission import (
    LOG_COLUMNS,
    Head,
    _check_head,
    libraries,
    package_size,
    prepare_submission,
    submit,
)
from rltune.orchestration.sweep import GRACE_S
from rltune.runs import remote
from tests.orchestration.fake_jobs import NODE, FakeServer
from tests.storage import BUCKET, environment

pytestmark = pytest.mark.slow
Write = Callable[..., Path]
HERE = Head("3.11.9", "/usr/bin/python", rltune.__version__, (), "")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    monkeypatch.setattr(jobs, "POLL_S", 0.02)
    (tmp_path / "logs").mkdir()
    return FakeServer(folder=tmp_path / "logs")


@pytest.fixture
def load(write: Write) -> Callable[..., Experiment]:
    return lambda **sections: load_experiment(write(**sections), (), known_names(), must_find_files=False)


def staged(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_job_is_handed_in_and_the_next_one_resumes(
    server: FakeServer, load: Callable[..., Experiment], tmp_path: Path
) -> None:
    storage = str(tmp_path / "shared runs")
    submission = prepare_submission(load(), server, staged(tmp_path / "up"), storage=storage)
    assert submission.package_size == 0
    assert submission.plan.workload.num_slots == 1  # its GPU
    job = submit(submission, server)
    assert (job.id, job.name, job.run) == ("rltune-tiny", "tiny", f"{storage}/tiny")
    handed = server.jobs[job.id]
    assert sorted(handed.files) == ["tiny.yaml"]
    assert handed.details["entrypoint"] == f"exec python -m rltune train tiny.yaml --storage '{storage}'"
    assert set(handed.environment) == {"working_dir", "env_vars"}
    variables = handed.environment["env_vars"]
    assert float(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > GRACE_S
    assert variables["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1"  # or the dashboard knows of no Train run
    assert variables["COLUMNS"] == str(LOG_COLUMNS)
    with pytest.raises(UserError, match="the job rltune-tiny works on this run; follow it with"):
        prepare_submission(load(), server, staged(tmp_path / "busy"), storage=storage)
    server.stop_job(job.id)
    again = prepare_submission(load(), server, staged(tmp_path / "again"), storage=storage)
    assert submit(again, server).id == "rltune-tiny-2"


def test_the_command_is_one_that_rltune_has(
    server: FakeServer, load: Callable[..., Experiment], tmp_path: Path
) -> None:
    rewards = {"brightness": {"weight": {"simplex": True}}, "smoothness": {"weight": {"simplex": True}}}
    submission = prepare_submission(load(rewards=rewards), server, staged(tmp_path / "up"), storage="/tmp")
    words = shlex.split(submission.entrypoint)
    assert words[:4] == ["exec", "python", "-m", "rltune"]
    command: Any = typer.main.get_command(app)
    name, inner, rest = command.resolve_command(command.make_context("rltune", words[4:]), words[4:])
    values = inner.make_context(name, rest).params
    assert (name, values["experiment"], values["storage"]) == ("sweep", Path("tiny.yaml"), Path("/tmp"))


def test_the_package_goes_along_where_there_is_none(
    server: FakeServer, load: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rltune, "__version__", "0.9.9")  # as the head, which has another
    submission = prepare_submission(load(), server, staged(tmp_path / "up"), storage="/tmp")
    assert submission.package_size == package_size() > 10e6  # the weights of the built-in model are in it
    environment = server.jobs[submit(submission, server).id].environment
    assert environment["py_modules"] == [str(Path(rltune.__file__).parent)]
    assert environment["excludes"] == ["__pycache__"]
    kept = prepare_submission(load(name="b"), server, staged(tmp_path / "b"), storage="/tmp", ships_package=False)
    assert kept.package_size == 0


def test_nothing_goes_up_that_the_cluster_s_nodes_cannot_run(
    server: FakeServer, load: Callable[..., Experiment], tmp_path: Path
) -> None:
    small = replace(server, rows=[{**NODE, "resources_total": {"CPU": 1.0}}])
    resources = {"workers": 4, "cpus_per_worker": 1}
    with pytest.raises(ExperimentError, match=r"resources.*1 node of 1 CPU and 0 GPUs"):
        prepare_submission(load(resources=resources), small, staged(tmp_path / "up"), storage="/tmp")
    assert server.jobs == {}
    assert list((tmp_path / "up").iterdir()) == []


def test_another_ray_is_said(server: FakeServer, load: Callable[..., Experiment], tmp_path: Path) -> None:
    other = replace(server, ray_version="2.58.1")
    with pytest.raises(UserError, match=rf"runs Ray 2\.58\.1, rltune .* works with {ray.__version__}"):
        prepare_submission(load(), other, staged(tmp_path / "up"), storage="/tmp")


def test_a_storage_that_the_head_cannot_write(
    server: FakeServer, load: Callable[..., Experiment], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--storage: got '.*', but on the head .*file is a file"):
        prepare_submission(load(), server, staged(tmp_path / "up"), storage=str(tmp_path / "file"))


def test_a_run_on_object_storage_is_handed_in_without_a_look_into_the_bucket(
    server: FakeServer, load: Callable[..., Experiment], tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head has the right to write there, this machine has none."""
    head = replace(server, environment=environment(s3))
    for name in environment(s3):
        monkeypatch.delenv(name)
    monkeypatch.setattr(remote, "open_store", None)
    storage = f"s3://{BUCKET}/runs?scheme=http"
    submission = prepare_submission(load(), head, staged(tmp_path / "up"), storage=storage)
    job = submit(submission, head)
    assert job.run == f"s3://{BUCKET}/runs/tiny?scheme=http"
    assert shlex.split(head.jobs[job.id].details["entrypoint"])[-2:] == ["--storage", storage]
    with pytest.raises(UserError, match="the job rltune-tiny works on this run; follow it with"):
        prepare_submission(load(), head, staged(tmp_path / "busy"), storage=storage)


def test_a_bucket_that_the_head_cannot_use_is_said_before_anything_goes_up(
    server: FakeServer, load: Callable[..., Experiment], tmp_path: Path, s3: str
) -> None:
    said = r"^--storage: cannot be used on the head: s3://nosuch/.*: there is no such bucket"
    with pytest.raises(UserError, match=said):
        prepare_submission(load(), server, staged(tmp_path / "up"), storage="s3://nosuch")
    assert server.jobs == {}


@pytest.mark.parametrize(
    ("head", "ships", "message"),
    [
        (replace(HERE, python="3.10.1"), False, "is too old for rltune, which needs 3.11"),
        (replace(HERE, missing=("torch", "peft")), True, "lacks torch, peft; install rltune there and on all nodes"),
        (replace(HERE, rltune=None), False, "has no rltune; leave --no-package out"),
    ],
)
def test_a_head_that_cannot_run_it(server: FakeServer, head: Head, ships: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _check_head(server, head, "/tmp", ships=ships)


def test_the_libraries_are_those_without_extras() -> None:
    assert {"ray", "torch", "open_clip_torch", "typer"} <= set(libraries())
    assert not {"pytest", "bitsandbytes", "mkdocs-material"} & set(libraries())
