"""Where a Ray cluster of our own keeps its sockets and its token, where Ray's own choice would not work."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
"""Bytes that the path of a Unix socket may have."""
LONGEST_SOCKET = "ray/session_2026-11-29_22-00-00_123456_1234567/sockets/dash_MetricsHead"
"""The longest that Ray 2.60 makes below its temporary folder."""
PYTHON_SOCKET = "pymp-12345678/listener-12345678"
"""What Python's multiprocessing makes below TMPDIR, in Ray's dashboard for one."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


@dataclass(frozen=True)
class Place:
    """The temporary folder of a cluster that is started here; Ray makes its own folder ``ray`` in it."""

    folder: Path
    is_ray_s_own: bool
    """Whether it is what Ray would take by itself."""
    fault: str = ""
    """What is wrong with Ray's own choice; empty where that is taken."""
    is_usable: bool = True
    """False where no folder is."""


def find_place() -> Place:
    """Return Ray's own choice if it works, else the first short folder that does."""
    folder = ray_s_temporary_folder()
    fault = _fault(folder)
    if not fault:
        return Place(folder, is_ray_s_own=True)
    if "RAY_TMPDIR" not in os.environ:  # which names a place for Ray alone, and stays
        for short in map(Path, SHORT_FOLDERS):
            if not _fault(short):
                return Place(short, is_ray_s_own=False, fault=fault)
    return Place(folder, is_ray_s_own=True, fault=fault, is_usable=False)


def ray_s_temporary_folder() -> Path:
    """Return the folder in which Ray makes its folder ``ray``: by its own rule, which is not that of ``tempfile``."""
    named = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None)
    return Path(named or "/tmp")


def serves_python() -> bool:
    """Return whether Python's own sockets fit below TMPDIR."""
    folder = os.environ.get("TMPDIR", "")
    return len(os.fsencode(f"{folder}/{PYTHON_SOCKET}")) <= MAX_SOCKET_PATH


def _fault(folder: Path) -> str:
    length = len(os.fsencode(folder / LONGEST_SOCKET))
    if length > MAX_SOCKET_PATH:
        most = len(os.fsencode(folder)) - (length - MAX_SOCKET_PATH)
        return f"its path is too long for the Unix sockets that Ray makes below it, which leave it {most} characters"
    return "" if can_write(folder / "ray") else "it cannot be written"


def can_write(folder: Path) -> bool:
    """Return whether files can be made in a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def token_folder() -> Path | None:
    """Return the folder that Ray keeps its token in, None if there is no home or it cannot be written."""
    try:
        folder = Path.home() / ".ray"
    except RuntimeError:  # no HOME, and a user id that the machine does not know
        return None
    return folder if can_write(folder) else None
