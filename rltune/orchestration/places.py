"""Where a Ray cluster of our own keeps its files and its token, where Ray's own choice would not work."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
"""Bytes that the path of a Unix socket may have."""
PREFIX = "rltune-"
"""Of the folder that each cluster has for itself; eight letters follow."""
LONGEST_SOCKET = f"{PREFIX}12345678/session_2026-11-29_22-00-00_123456_1234567/sockets/dash_MetricsHead"
"""The longest that Ray 2.60 makes."""
PYTHON_SOCKET = f"{PREFIX}12345678/pymp-12345678/listener-12345678"
"""What Python's multiprocessing makes below TMPDIR, in Ray's dashboard for one."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


@dataclass(frozen=True)
class Place:
    """Where a cluster that is started here has its temporary folder."""

    folder: Path
    """For Ray's files."""
    python_folder: Path
    """For the temporary files of its processes: below TMPDIR where that works, on what disk it may be."""
    fault: str = ""
    """What is wrong with what Ray would take by itself; empty where that is taken."""
    is_usable: bool = True
    """False where no folder is."""


def find_place() -> Place:
    """Return Ray's own choice if it works, else the first short folder that does."""
    folder = ray_s_temporary_folder()
    fault = _fault(folder)
    if fault and "RAY_TMPDIR" not in os.environ:  # which names a place for Ray alone, and stays
        for short in map(Path, SHORT_FOLDERS):
            if not _fault(short):
                return Place(short, _python_folder(short), fault)
    return Place(folder, _python_folder(folder), fault, is_usable=not fault)


def ray_s_temporary_folder() -> Path:
    """Return the folder in which Ray makes its folder ``ray``: by its own rule, which is not that of ``tempfile``."""
    named = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None)
    return Path(named or "/tmp")


def _python_folder(default: Path) -> Path:
    """Return where Python's own sockets fit below."""
    named = Path(os.environ.get("TMPDIR") or "/tmp")
    fits = len(os.fsencode(named / PYTHON_SOCKET)) <= MAX_SOCKET_PATH
    return named if fits and can_write(named) else default


def _fault(folder: Path) -> str:
    length = len(os.fsencode(folder / LONGEST_SOCKET))
    if length > MAX_SOCKET_PATH:
        most = len(os.fsencode(folder)) - (length - MAX_SOCKET_PATH)
        return f"its path is too long for the Unix sockets that Ray makes below it, which leave it {most} characters"
    return "" if can_write(folder) else "it cannot be written"


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
