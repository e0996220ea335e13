"""The temporary folder of a cluster of our own: whatever its processes write there goes when the cluster ends.

Ray by itself keeps the sessions of all clusters of a machine in one folder, and removes none. Nothing here imports ray.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from rltune.errors import UserError
from rltune.orchestration.places import PREFIX, Place

LOCK_FILE = "rltune-cluster.lock"
"""Says that a folder is of a cluster of ours, which holds its lock: no process identifier that may be another's."""
KEPT_S = 24 * 3600.0
"""How long a run that failed or was killed leaves its logs, after the last line of them."""
ENDING_S = 10.0
"""In which Ray's processes end by themselves: 1.4 s on two cores."""


@dataclass
class Scratch:
    """The folders of one cluster."""

    ray: Path
    """Has Ray's session."""
    python: Path
    """What TMPDIR is to the cluster's processes; mostly the same."""
    is_kept: bool = False
    """Whether they stay when the cluster has ended."""

    @property
    def logs(self) -> Path:
        """Where the logs of Ray's processes are."""
        return self.ray / "session_latest" / "logs"


@contextmanager
def scratch(place: Place) -> Iterator[Scratch]:
    """Make the folders of a cluster that runs for as long as the block does, and remove them with what is in them.

    They stay where the block ends in an error that may have its reason in the logs, or asks for it. What earlier runs
    have left is removed once it is a day old.
    """
    with ExitStack() as stack:
        ray = python = stack.enter_context(_held(place.folder))
        if place.python_folder != place.folder:
            python = stack.enter_context(_held(place.python_folder))
        found = Scratch(ray, python)
        try:
            yield found
        except (KeyboardInterrupt, UserError, GeneratorExit):
            raise
        except BaseException:
            found.is_kept = True
            raise
        finally:
            _end_processes(python)
            if not found.is_kept:
                for folder in {ray, python}:
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(root: Path) -> Iterator[Path]:
    """Make a folder and hold its lock."""
    forget_old(root)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    with (folder / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def forget_old(root: Path) -> None:
    """Remove the folders of clusters that have ended, where nothing has been written for ``KEPT_S``.

    Never what has no lock file of ours, such as the sessions of a user's own ``ray start``, nor what is another user's.
    """
    for file in root.glob(f"{PREFIX}*/{LOCK_FILE}"):
        with suppress(OSError), file.open() as lock:  # what another run removes at this moment, or holds
            if os.fstat(lock.fileno()).st_uid == os.getuid() and _idle_s(file.parent) > KEPT_S:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(file.parent)


def _idle_s(folder: Path) -> float:
    """Return how long ago the last write to a folder and what is in it was."""
    return time.time() - max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _end_processes(folder: Path) -> None:
    """Wait until the processes whose TMPDIR is the folder have ended, and end those that do not by themselves."""
    for timeout_s in (ENDING_S, 1.0):
        _, left = psutil.wait_procs(_processes(folder), timeout=timeout_s)
        for process in left:
            with suppress(psutil.Error):
                process.kill()


def _processes(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another user's, or one that has ended
            if process.environ().get("TMPDIR") == str(folder):
                found.append(process)
    return found
