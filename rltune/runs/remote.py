"""Run folders of runs that lie on object storage: for the driver, for a worker, for who only reads."""

import functools
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from rltune.beside import beside
from rltune.errors import RltuneError, UserError
from rltune.runs.addresses import is_address, written
from rltune.runs.copies import Copy, is_light
from rltune.runs.layout import RunFolder
from rltune.runs.lease import RENEWED_S, Lease
from rltune.runs.objects import open_store

logger = logging.getLogger(__name__)

LOOK_S = 5.0
"""Between two looks of a process at what others have published."""
RUN_FILES = ("experiment.yaml", "resolved.json", "prompts/", "base/")
"""What a worker needs of a run beside its trial."""


class HeldFolder(RunFolder):
    """The driver's copy of a run that it has claimed: its lock is held already."""

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Do nothing: the claim is the lock."""
        yield

    @property
    def is_locked(self) -> bool:
        """Whether a process works on the run: this one does."""
        return True


def address_of(storage: str | Path, name: str) -> str:
    """Return the address of a run below one of storage, whose options stay at the end."""
    place, mark, query = written(storage).partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{query}"


def copy_path(uri: str, role: str, begun: str = "") -> Path:
    """Return where this machine keeps a copy of a run; its last part is the run's name."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    place = uri.partition("?")[0].rstrip("/")
    digest = hashlib.sha256(f"{uri} {begun}".encode()).hexdigest()[:12]
    return caches / "rltune" / "runs" / role / digest / place.rpartition("/")[2]


@contextmanager
def run_folder(storage: str | Path, name: str) -> Iterator[RunFolder]:
    """Return the folder of a run that is to be worked on, for as long as the block runs.

    Args:
        storage: What holds runs: a folder, or an address.
        name: Of the run.

    Raises:
        UserError: The run lies on object storage, and somebody else works on it.
        StorageError: The store does not let it, or does not answer.
    """
    if is_address(storage):
        with _driver_folder(address_of(storage, name)) as folder:
            yield folder
    else:
        yield RunFolder(Path(storage) / name)


@contextmanager
def _driver_folder(uri: str) -> Iterator[RunFolder]:
    store = open_store(uri)
    lease = Lease(store)
    lease.take()
    try:
        copy = Copy(store, copy_path(uri, "driver"), check=lease.check)
        copy.bring()
        folder = HeldFolder(copy.path, copy)
        with _often(lease.renew, RENEWED_S), _often(functools.partial(_look, copy), LOOK_S):
            try:
                yield folder
            except BaseException:  # Ctrl-C too: what is known by now is worth as much as in a folder
                with suppress(RltuneError):
                    copy.publish()
                raise
            copy.publish()
    finally:
        with suppress(RltuneError):
            lease.release()


def _look(copy: Copy) -> None:
    """Take in what workers have published, for who watches the run."""
    copy.bring("trials/", "base/", wanted=_is_of_workers, is_exact=False)


def _is_of_workers(key: str) -> bool:
    return is_light(key) and "/checkpoints/" not in key


def planned_folder(storage: str | Path, name: str) -> RunFolder:
    """Return the folder of a run that is only looked at, and need not have been started.

    Raises:
        UserError: The address is none.
        StorageError: The store does not let it, or does not answer.
    """
    if not is_address(storage):
        return RunFolder(Path(storage) / name)
    uri = address_of(storage, name)
    copy = Copy(open_store(uri), copy_path(uri, "reader"))
    copy.bring()
    return RunFolder(copy.path, copy)


def reader_folder(uri: str) -> RunFolder:
    """Return a run that lies on object storage as a folder that is read, brought up to date now.

    Raises:
        UserError: The address is none, or there is no run.
        StorageError: The store does not let it, or does not answer.
    """
    copy = Copy(open_store(uri), copy_path(uri, "reader"))
    if not copy.store.list("experiment.yaml"):
        raise UserError(f"{uri}: not a run folder, it has no experiment.yaml; name one such as s3://bucket/runs/mix")
    copy.bring()
    return RunFolder(copy.path, copy)


def opened(place: str | Path) -> RunFolder:
    """Return a run folder to read, wherever it lies.

    Raises:
        UserError: There is none at an address.
        StorageError: The store does not let it, or does not answer.
    """
    return reader_folder(written(place)) if is_address(place) else RunFolder(Path(place))


@functools.lru_cache(maxsize=64)
def worker_folder(uri: str, begun: str, role: str) -> RunFolder:
    """Return a worker's folder of a run; one and the same in a process.

    Args:
        uri: Where the run lies.
        begun: When it was begun.
        role: Tells the processes of a machine that work on one trial from each other.

    Raises:
        UserError: The address is none.
    """
    copy = Copy(open_store(uri), copy_path(uri, role, begun))
    return RunFolder(copy.path, copy)


def bring_run(folder: RunFolder) -> None:
    """Bring what a worker needs of a run beside its trial; in a folder it is there already.

    Raises:
        StorageError: The store does not let it, or does not answer.
    """
    if folder.copy is not None:  # another trial's worker may have the same copy
        folder.copy.bring(*RUN_FILES, wanted=lambda key: True, is_exact=False)


@contextmanager
def at_work(folder: RunFolder, trial: str, *, base_key: str, is_main: bool) -> Iterator[None]:
    """Begin an attempt of a trial with what is published, and keep in touch with the run for as long as it lasts.

    Brings the base model's measurements once they are there and the request to stop; a trial's main worker publishes
    its rows and events. For a run in a folder there is nothing to do.

    Raises:
        StorageError: The store does not let it, or does not answer.
    """
    copy = folder.copy
    if copy is None:
        yield
        return
    bring_run(folder)
    copy.bring(f"trials/{trial}/", "trials/000/failure.txt", ".stop", wanted=lambda key: True)

    own = (f"trials/{trial}/metrics.jsonl", f"trials/{trial}/events.jsonl")

    def look() -> None:
        if base_key and not (folder.base_dir / base_key / "base.json").is_file():
            copy.bring(f"base/{base_key}/", "trials/000/failure.txt", wanted=lambda key: True, is_exact=False)
        copy.bring(".stop")
        if is_main:
            copy.publish(*own)

    try:
        with _often(look, LOOK_S):
            yield
    finally:
        if is_main:
            with suppress(RltuneError):
                copy.publish(*own)


def _often(action: Callable[[], None], every_s: float) -> AbstractContextManager[None]:
    """Do something again and again while a block runs; what fails is tried again the next time."""

    def loop(over: threading.Event) -> None:
        while not over.wait(every_s):
            try:
                action()
            except Exception:  # who needs it in time meets the fault himself, and says so
                logger.debug("the run's storage could not be looked at", exc_info=True)

    return beside(loop)
