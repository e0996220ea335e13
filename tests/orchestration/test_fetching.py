"""A run comes from a cluster whole, or not at all."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rltune.errors import RunError, UserError
from rltune.orchestration import fetching, jobs, on_head
from rltune.orchestration.fetching import fetch, fetch_from_store
from rltune.runs.copies import Copy
from rltune.runs.objects import open_store
from rltune.runs.record import read_run
from rltune.runs.results import read_results
from tests.orchestration.fake_jobs import FakeServer
from tests.run_folders import experiment, result, write_run
from tests.storage import BUCKET


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


def test_a_run_on_object_storage_is_copied_from_there_as_a_folder(
    run: Path, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of lines are whole again, and nothing of the claim comes."""
    uri, target, parts = f"s3://{BUCKET}/fetch/tiny", tmp_path / "runs" / "copy", list[int]()
    store = open_store(uri)
    Copy(store, run).publish("")
    store.append("results.jsonl", [(run / "results.jsonl").read_text().splitlines()[0].replace("000", "002")])
    store.write(".claims/x.json", b"{}")
    fetched = fetch_from_store(uri, target, on_bytes=parts.append)
    assert sum(parts) == fetched.size > 0
    left_out = {"trials/001/checkpoints/c/adapter.safetensors", ".ray/x", ".lock"}
    assert names(target) == names(run) - left_out | {"fetched.json"}
    assert (target / "exports/001/lora.safetensors").read_bytes() == (run / "exports/001/lora.safetensors").read_bytes()
    assert [found.trial for found in read_results(target / "results.jsonl")] == ["000", "001", "002"]
    assert json.loads((target / "fetched.json").read_text())["run"] == uri
    read_run(target)
    fetch_from_store(uri, target, with_checkpoints=True, on_bytes=parts.append)
    assert names(target) == names(run) - {".ray/x", ".lock"} | {"fetched.json"}
    assert names(target.parent) == {f"copy/{name}" for name in names(target)}


def test_an_address_without_a_run_leaves_an_older_copy(tmp_path: Path, s3: str) -> None:
    with pytest.raises(UserError, match=f"^s3://{BUCKET}/nosuch: there is no run, it has no experiment.yaml"):
        fetch_from_store(f"s3://{BUCKET}/nosuch", tmp_path / "copy", on_bytes=lambda size: None)
    assert not list(tmp_path.iterdir())


def test_a_run_of_this_machine_is_not_replaced(logs: Path, run: Path) -> None:
    with pytest.raises(UserError, match="is there and is no copy that 'rltune fetch' made"):
        fetch(FakeServer(folder=logs), "/elsewhere", run, on_bytes=lambda size: None)


def test_an_empty_folder_is_filled(logs: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    fetch(FakeServer(folder=logs), str(run), tmp_path / "copy", on_bytes=lambda size: None)
    assert (tmp_path / "copy" / "results.jsonl").is_file()


def test_a_pack_that_points_elsewhere_is_not_unpacked(
    logs: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a cluster sends is not trusted with this machine's files."""

    def download(server: FakeServer, name: str, file: Path, *rest: object) -> None:
        with tarfile.open(file, "w") as tar:
            tar.add(run / "results.jsonl", arcname="../../escaped")

    monkeypatch.setattr(fetching, "_download", download)
    target = tmp_path / "copy"
    with pytest.raises(RunError, match=r"^http://head:8265: what came is no pack of a run .*escaped"):
        fetch(FakeServer(folder=logs), str(run), target, on_bytes=lambda size: None)
    assert not target.exists()
    assert not list(tmp_path.rglob("escaped"))


@pytest.fixture
def packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Packs are made in this process, whose job ends when it would wait; what it says."""

    def wait(seconds: float) -> None:
        raise SystemExit

    said: list[dict[str, Any]] = []
    monkeypatch.setattr(on_head, "say", said.append)
    monkeypatch.setattr(on_head, "signal", SimpleNamespace(signal=lambda *given: None, SIGTERM=15))
    monkeypatch.setattr(on_head, "time", SimpleNamespace(sleep=wait))
    monkeypatch.setattr(on_head, "os", SimpleNamespace(readlink=lambda path: str(tmp_path / "job.log")))
    return said


def test_a_run_that_does_not_fit_beside_the_logs_is_not_packed(
    packing: list[dict[str, Any]], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    disk = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=size))  # and a tenth for the logs
    monkeypatch.setattr(on_head, "shutil", disk)
    on_head.pack(str(run), "")
    assert f"do not fit beside Ray's logs in {tmp_path}" in packing[0]["fault"]


def test_a_file_that_a_run_takes_away_meanwhile_is_left_out(
    packing: list[dict[str, Any]], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(path: Path) -> SimpleNamespace:  # after the files are listed
        (run / "exports/001/lora.safetensors").unlink()
        return SimpleNamespace(free=1 << 40)

    monkeypatch.setattr(on_head, "shutil", SimpleNamespace(disk_usage=measure))
    with pytest.raises(SystemExit):
        on_head.pack(str(run), "")
    assert packing[0]["run"] == run.name


def test_what_a_link_points_to_is_not_fetched(logs: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of another")
    (run / "link").symlink_to(tmp_path / "secret")
    fetch(FakeServer(folder=logs), str(run), tmp_path / "copy", on_bytes=lambda size: None)
    assert not (tmp_path / "copy" / "link").exists()


def test_a_copy_that_comes_damaged_is_no_copy(logs: Path, run: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    with pytest.raises(RunError, match="the copy came damaged"):
        fetch(Damaging(folder=logs), str(run), target, on_bytes=lambda size: None)
    assert not target.exists()
    assert not list(tmp_path.glob(".copy*"))


def test_a_run_that_the_head_does_not_see(logs: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run folder, or cannot be seen from the head"):
        fetch(FakeServer(folder=logs), str(tmp_path / "nosuch"), tmp_path / "copy", on_bytes=lambda size: None)
