"""What runs on a cluster's head for ``rltune submit`` and ``rltune fetch``: it goes there as a file, before rltune.

It looks whether rltune can run there, or packs a run folder so that it can be downloaded. Standard library alone, for
Python 3.9 and newer; what it finds is one line of JSON behind ``MARK`` in the job's log. An address is tried with the
files of rltune in ``SEAM``, which go along.
"""

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import sys
import tarfile
import time
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MARK = "rltune: "
KEPT_S = 3600
"""How long a pack waits to be downloaded."""
SEAM = ("errors.py", "redaction.py", "runs/objects.py")
"""What opens an address, in the package."""
SEAM_FOLDER = "seam"
"""Where that is beside this file: a folder that nothing is imported from unless it is asked for."""


def look(storage: str, libraries: str) -> None:
    """Say which Python, rltune and libraries are there, and whether run folders can lie in ``storage``."""
    say(
        {
            "python": platform.python_version(),
            "executable": sys.executable,
            "rltune": _installed("rltune"),
            "missing": [name for name in libraries.split(",") if name and _installed(name) is None],
            "ray": _installed("ray"),
            "storage": _address_fault(storage) if "://" in storage else _folder_fault(Path(storage)),
        }
    )


def pack(run: str, skipped: str) -> None:
    """Pack a run folder, wait until the job is stopped, and take the pack away.

    It lies among Ray's logs, which the dashboard hands out; this job's own log says where they are.
    """
    folder, log = Path(run), Path(os.readlink("/proc/self/fd/1"))
    if not (folder / "experiment.yaml").is_file():
        say({"fault": f"{folder} is no run folder, or cannot be seen from the head"})
        return
    left_out = set(skipped.split(","))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    files = [path for path in files if not left_out & set(path.relative_to(folder).parts)]
    size = sum(path.stat().st_size for path in files if path.exists())
    free = shutil.disk_usage(log.parent).free
    if size > free * 0.9:
        room = f"{log.parent}, which has {free >> 20} MiB"
        say({"fault": f"{size >> 20} MiB do not fit beside Ray's logs in {room}"})
        return
    pack_file = log.with_name(f"{log.stem}.tar")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    try:
        with tarfile.open(pack_file, "w") as tar:
            for path in filter(Path.exists, files):  # of a run that goes on some have been replaced by now
                tar.add(path, arcname=str(path.relative_to(folder)), recursive=False)
        digest = hashlib.sha256()
        with pack_file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
        say(
            {"file": pack_file.name, "size": pack_file.stat().st_size, "sha256": digest.hexdigest(), "run": folder.name}
        )
        time.sleep(KEPT_S)
    finally:
        pack_file.unlink()


def say(found: object) -> None:
    """Write what was found into the job's log."""
    sys.stdout.write(f"{MARK}{json.dumps(found)}\n")
    sys.stdout.flush()


def _installed(name: str) -> "str | None":
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown" if name.isidentifier() and importlib.util.find_spec(name) else None


def _address_fault(uri: str) -> str:
    """Say why what lies at an address cannot be written, read and deleted from here; empty if it can."""
    sys.path.insert(0, str(Path(__file__).with_name(SEAM_FOLDER)))
    try:
        from rltune.runs.objects import open_store

        store, key = open_store(uri), f".probe/{uuid.uuid4().hex}"
        store.write(key, key.encode())
        content = store.read(key)
        store.delete(key)
    except Exception as error:  # noqa: BLE001  # of pyarrow, or that it is not there
        return str(error)
    return "" if content == key.encode() else f"{uri}: what was written there is not what is read"


def _folder_fault(storage: Path) -> str:
    """Say why run folders cannot lie there; empty if they can."""
    here = storage
    while not here.exists() and here != here.parent:
        here = here.parent
    if not here.is_dir():
        return f"{here} is a file"
    if not os.access(here, os.W_OK | os.X_OK):
        return f"{here} cannot be written by the user that Ray runs as"
    return ""


if __name__ == "__main__":
    {"look": look, "pack": pack}[sys.argv[1]](*sys.argv[2:])
