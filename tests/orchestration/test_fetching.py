"""A run comes from a cluster whole, or not at all."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rltune.errors import RunError, UserError
from rltune.orchestration import jobs
from rltune.orchestration.fetching import fetch
from rltune.runs.record import read_run
from tests.orchestration.fake_jobs import FakeServer
from tests.run_folders import experiment, result, write_run


@dataclass(frozen=True)
class Damaging(FakeServer):
    def read_log(self, filename: str) -> Iterator[bytes]:
        whole = b"".join(super().read_log(filename))
        yield whole[:-1] + bytes([whole[-1] ^ 1])


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(jobs, "POLL_S", 0.02)
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "shared", experiment(), [result("000"), result("001")])
    for name in ("trials/001/checkpoints/c/adapter.safetensors", "exports/001/lora.safetensors", ".ray/x", ".lock"):
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_bytes(name.encode() * 1000)
    return folder.path


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_copied_without_checkpoints_and_replaced_by_a_newer_copy(
    logs: Path, run: Path, tmp_path: Path
) -> None:
    server, target, parts = FakeServer(folder=logs), tmp_path / "runs" / "copy", list[int]()
    fetched = fetch(server, str(run), target, on_bytes=parts.append)
    assert sum(parts) == fetched.size > 0
    left_out = {"trials/001/checkpoints/c/adapter.safetensors", ".ray/x", ".lock"}
    assert names(target) == names(run) - left_out | {"fetched.json"}
    assert (target / "exports/001/lora.safetensors").read_bytes() == (run / "exports/001/lora.safetensors").read_bytes()
    assert json.loads((target / "fetched.json").read_text())["run"] == str(run)
    read_run(target)
    (run / "late.txt").touch()
    fetch(server, str(run), target, with_checkpoints=True, on_bytes=parts.append)
    assert names(target) == names(run) - {".ray/x", ".lock"} | {"fetched.json"}
    assert names(target.parent) == {f"copy/{name}" for name in names(target)}
    assert server.jobs == {}
    assert list(logs.glob("*.tar")) == []


def test_a_run_of_this_machine_is_not_replaced(logs: Path, run: Path) -> None:
    with pytest.raises(UserError, match="is there and is no copy that 'rltune fetch' made"):
        fetch(FakeServer(folder=logs), "/elsewhere", run, on_bytes=lambda size: None)


def test_a_copy_that_comes_damaged_is_no_copy(logs: Path, run: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    with pytest.raises(RunError, match="the copy came damaged"):
        fetch(Damaging(folder=logs), str(run), target, on_bytes=lambda size: None)
    assert not target.exists()
    assert not list(tmp_path.glob(".copy*"))


def test_a_run_that_the_head_does_not_see(logs: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run folder, or cannot be seen from the head"):
        fetch(FakeServer(folder=logs), str(tmp_path / "nosuch"), tmp_path / "copy", on_bytes=lambda size: None)
