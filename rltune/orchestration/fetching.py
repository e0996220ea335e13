"""Bring a run to this machine: from a cluster by its dashboard alone, or from the object storage that it lies on.

On a cluster, a job on the head packs the run folder beside Ray's logs, which the dashboard hands out as they are, and
takes the pack away when it is stopped. A bucket is read from here, and the cluster may be gone by then.
"""

import hashlib
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rltune.errors import RunError, UserError, writing
from rltune.orchestration.job_server import JobServer
from rltune.orchestration.jobs import on_the_head
from rltune.runs.copies import Copy
from rltune.runs.objects import SEGMENTS, Entry, open_store

SKIPPED = ("checkpoints", ".ray", ".lock", ".stop")
"""Names in a run folder that stay on the cluster: what only a resume needs."""
NOTE_FILE = "fetched.json"
"""Where a copy says what it is a copy of; a folder without it is never replaced."""


@dataclass(frozen=True)
class Fetched:
    """A copy of a run."""

    folder: Path
    size: int
    """Bytes that came."""


def fetch(
    server: JobServer, run: str, target: Path, *, with_checkpoints: bool = False, on_bytes: Callable[[int], None]
) -> Fetched:
    """Copy a run folder from the cluster to ``target``, in place of an older copy.

    Args:
        server: The cluster.
        run: The folder there.
        target: The folder here.
        with_checkpoints: Whether checkpoints come too; they are most of a run.
        on_bytes: Told how many have come, of each part.

    Raises:
        UserError: Something else is at ``target``.
        RunError: The run cannot be read there, or the copy is damaged.
        StorageError: It cannot be written here.
    """
    check_target(target)
    with on_the_head(server, "pack", run, ",".join(_skipped(with_checkpoints))) as found:
        if fault := found.get("fault"):
            raise RunError(f"{server.url}: {fault}")
        with _replacing(target, {"from": server.url, "run": run, "sha256": found["sha256"]}) as whole:
            pack = whole.with_name("pack.tar")
            _download(server, str(found["file"]), pack, str(found["sha256"]), on_bytes)
            _unpack(server, pack, whole)
    return Fetched(target, int(found["size"]))


def fetch_from_store(
    uri: str, target: Path, *, with_checkpoints: bool = False, on_bytes: Callable[[int], None]
) -> Fetched:
    """Copy a run from object storage to ``target``, in place of an older copy.

    Args:
        uri: Address of the run.
        target: The folder here.
        with_checkpoints: Whether checkpoints come too; they are most of a run.
        on_bytes: Told how many have come, of each object.

    Raises:
        UserError: Something else is at ``target``, or there is no run.
        StorageError: It cannot be read there, or not written here.
    """
    check_target(target)
    store, skipped = open_store(uri), set(_skipped(with_checkpoints))
    if not store.list("experiment.yaml"):
        raise UserError(f"{uri}: there is no run, it has no experiment.yaml; name one such as s3://bucket/runs/mix")
    sizes: list[int] = []

    def count(size: int) -> None:
        sizes.append(size)
        on_bytes(size)

    with _replacing(target, {"from": uri, "run": uri}) as whole:
        copy = _CountingCopy(store, whole)
        copy.on_bytes = count
        copy.bring(wanted=lambda key: not skipped & set(key.split("/")))
        for segments in [*whole.rglob(f"*{SEGMENTS.rstrip('/')}")]:  # the files of lines that they add up to are there
            shutil.rmtree(segments)
    return Fetched(target, sum(sizes))


class _CountingCopy(Copy):
    """Tells what comes."""

    on_bytes: Callable[[int], None]

    def _copy(self, place: str, key: str, entry: Entry) -> None:
        super()._copy(place, key, entry)
        self.on_bytes(entry.size)


def _skipped(with_checkpoints: bool) -> tuple[str, ...]:
    return tuple(name for name in SKIPPED if not (with_checkpoints and name == "checkpoints"))


@contextmanager
def _replacing(target: Path, note: dict[str, str]) -> Iterator[Path]:
    """Hand out where to write a copy, which is put in the place of an older one once it is whole."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            whole = Path(scratch, "run")
            yield whole
            note |= {"fetched": datetime.now(UTC).isoformat()}
            (whole / NOTE_FILE).write_text(json.dumps(note, indent=1), encoding="utf-8")
            if target.exists():
                target.rename(Path(scratch, "old"))
            whole.rename(target)


def _unpack(server: JobServer, pack: Path, folder: Path) -> None:
    try:
        with tarfile.open(pack) as tar:
            tar.extractall(folder, filter="data")  # nothing goes outside of the folder
    except tarfile.TarError as error:
        raise RunError(f"{server.url}: what came is no pack of a run ({error}); nothing was kept") from error


def check_target(target: Path) -> None:
    """Check that a copy may go to a folder.

    Raises:
        UserError: There is something that was not fetched.
    """
    if target.exists() and not (target / NOTE_FILE).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: is there and is no copy that 'rltune fetch' made; give another folder")


def _download(server: JobServer, name: str, file: Path, sha256: str, on_bytes: Callable[[int], None]) -> None:
    digest = hashlib.sha256()
    with file.open("wb") as content:
        for part in server.read_log(name):
            content.write(part)
            digest.update(part)
            on_bytes(len(part))
    if digest.hexdigest() != sha256:
        raise RunError(f"{server.url}: the copy came damaged, {file.stat().st_size} bytes; fetch it again")
