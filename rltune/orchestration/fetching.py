"""Bring a run from a cluster to this machine by its dashboard alone.

A job on the head packs the run folder beside Ray's logs, which the dashboard hands out as they are, and takes the pack
away when it is stopped.
"""

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rltune.errors import RunError, UserError, writing
from rltune.orchestration.job_server import JobServer
from rltune.orchestration.jobs import on_the_head

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
    skipped = SKIPPED if not with_checkpoints else tuple(name for name in SKIPPED if name != "checkpoints")
    with on_the_head(server, "pack", run, ",".join(skipped)) as found:
        if fault := found.get("fault"):
            raise RunError(f"{server.url}: {fault}")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
                pack, whole = Path(scratch, "pack.tar"), Path(scratch, "run")
                _download(server, str(found["file"]), pack, str(found["sha256"]), on_bytes)
                _unpack(server, pack, whole)
                note = {
                    "from": server.url,
                    "run": run,
                    "sha256": found["sha256"],
                    "fetched": datetime.now(UTC).isoformat(),
                }
                (whole / NOTE_FILE).write_text(json.dumps(note, indent=1), encoding="utf-8")
                if target.exists():
                    target.rename(Path(scratch, "old"))
                whole.rename(target)
    return Fetched(target, int(found["size"]))


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
