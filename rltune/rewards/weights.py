"""Published files of weights: where they come from, whether they are on this machine, and how they get here."""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from rltune.errors import RltuneError, RunError, UserError, gated_remedy

CACHE_VARIABLE = "RLTUNE_CACHE"
"""Folder of the files that are not on the Hugging Face hub; ``~/.cache/rltune`` if not set."""
TIMEOUT_S = 10
"""For a connection, and for the hub to answer what it has of a file; the hub's own library waits as long."""
RETRY_S = 1.0
"""After which a hub that could not be reached is asked once more: name servers fail now and then."""


@dataclass(frozen=True)
class WeightsFile:
    """One published file, on the Hugging Face hub or at an address."""

    file: str
    """Its name, within ``repo`` if it is on the hub."""
    licence: str
    size_mb: float
    """10^6 bytes, as published."""
    repo: str = ""
    """Id on the hub; empty if the file is at ``url``."""
    url: str = ""
    sha256: str = ""
    """Of the whole file; empty where it is not pinned."""

    @property
    def source(self) -> str:
        """Where a browser finds it."""
        return f"https://huggingface.co/{self.repo}/blob/main/{self.file}" if self.repo else self.url

    @property
    def origin(self) -> str:
        """Its repository on the hub, or the host that has it: ``source`` for tables."""
        return self.repo or urlsplit(self.url).hostname or self.url

    @property
    def size(self) -> str:
        """The size for people: ``3.9 GB``."""
        return format_size(self.size_mb)

    def find(self) -> Path | None:
        """Return where the file is on this machine, None if it is not; asks no network."""
        if not self.repo:
            path = cache_dir() / self.file
            return path if path.is_file() else None
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, self.file)
        return Path(found) if isinstance(found, str) else None

    def fetch(self) -> Path:
        """Download the file unless it is here, and return where it is.

        Raises:
            RunError: It cannot be fetched, or what came is not the published file; nothing is left of it.
            UserError: The file that is here is not the published one.
        """
        path = self.find()
        if path is not None:
            self.check(path)
            return path
        try:
            return self._download()
        except Exception as error:  # the hub, its transport and the disk raise their own kinds
            raise RunError(f"{self.file} could not be fetched: {explain(error, self.repo)}") from error

    def check(self, path: Path) -> None:
        """Compare the file at ``path`` with the pinned digest, if there is one.

        Raises:
            UserError: It has other contents than the published file.
        """
        digest = self._wrong_digest(path)
        if digest:
            raise UserError(
                f"{path} is not the published {self.file}, its sha256 is {digest} and should be {self.sha256}; "
                f"delete it, and fetch it again from {self.source}"
            )

    def _wrong_digest(self, path: Path) -> str:
        if not self.sha256:
            return ""
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return "" if digest == self.sha256 else digest

    def _accept(self, path: Path) -> None:
        """Refuse a download with other contents than the published file, before anyone finds it."""
        digest = self._wrong_digest(path)
        if digest:
            raise RunError(f"what {self.source} gives has the sha256 {digest}, the published file {self.sha256}")

    def _download(self) -> Path:
        if self.repo:
            return self._download_from_hub()
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{self.file}.{uuid4().hex}.part"  # moved into place whole: a reader never sees half a file
        with _alone(folder):
            if (there := self.find()) is not None:  # another worker of this machine was first
                return there
            self._download_to(part, folder)
        return folder / self.file

    def _download_to(self, part: Path, folder: Path) -> None:
        import requests

        try:
            with requests.get(self.url, stream=True, timeout=(TIMEOUT_S, 30)) as answer, part.open("wb") as stream:
                answer.raise_for_status()
                for chunk in answer.iter_content(1 << 20):
                    stream.write(chunk)
            self._accept(part)
            part.replace(folder / self.file)
        finally:
            part.unlink(missing_ok=True)

    def _download_from_hub(self) -> Path:
        from huggingface_hub import hf_hub_download

        check_hub(self.repo, self.file)
        path = Path(hf_hub_download(self.repo, self.file))
        try:
            self._accept(path)
        except RunError:
            blob = path.resolve()  # the cache's snapshots are links to where the bytes are
            path.unlink()
            blob.unlink(missing_ok=True)
            raise
        return path


def locate(reward: str, weights: WeightsFile, given: Any = None, *, option: str = "weights") -> Path:
    """Return a file of weights: the one given, else the published one from the cache, else fetched.

    Args:
        reward: Name of the reward, for messages.
        weights: The published file.
        given: The user's own path, if any.
        option: Name of the reward's option that takes the path, for messages.

    Raises:
        UserError: ``given`` is not a path, or the file is not the published one.
        RunError: The file is not on this machine and cannot be fetched; the message says how to put it there.
    """
    if given is not None:
        if not isinstance(given, str | Path):
            raise UserError(f"reward {reward!r}: {option} must be the path of a file, got {given!r}")
        path = Path(given).expanduser()
        if not path.is_file():
            raise RunError(f"reward {reward!r}: there is no file {path}; {option} must be {_described(weights)}")
        return path
    found = weights.find()
    if found is not None:
        return found
    try:
        if is_offline():
            raise RunError("HF_HUB_OFFLINE is set")
        return weights.fetch()
    except RunError as error:
        raise RunError(
            f"reward {reward!r}: {_described(weights)} is not on this machine ({error}); run 'rltune models fetch "
            f"{reward}' where there is a network, or put the file here and give its path as the option {option!r}"
        ) from error


def check_hub(repo: str, file: str) -> Exception | None:
    """Ask the hub for a file's metadata, so that a machine without a network need not wait for retries.

    ``hf_hub_download`` retries a failed connection five times: on a machine without a network it gave up after 23 s,
    and open_clip, which asks for two file names in turn, after 46 s. This gives up after 1 s if there is no way to the
    hub: its name is unknown, or the connection is refused or has no route. A connection that is only slow (a timeout)
    or a hub that answers anything at all, an error too, is left to ``hf_hub_download`` and its patience.

    Returns:
        What the hub says where it does not give the repository: it is gated, private or not there. None otherwise.

    Raises:
        RunError: There is no way to the hub, or the user has said so.
    """
    if is_offline():
        raise RunError("HF_HUB_OFFLINE is set")
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import RepositoryNotFoundError

    url = hf_hub_url(repo, file)
    for is_last in (False, True):
        try:
            get_hf_file_metadata(url, timeout=TIMEOUT_S)
        except Exception as error:
            reason = _unreachable(error)
            if reason is None:
                return error if isinstance(error, RepositoryNotFoundError) else None
            if is_last:
                raise RunError(f"no way to {urlsplit(url).hostname}: {reason}") from error
            time.sleep(RETRY_S)
        else:
            return None
    return None


def is_offline() -> bool:
    """Return whether the user has said that the Hugging Face hub is out of reach, with either variable it knows."""
    variables = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in variables)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine that fetch into a folder waiting; the hub's own library does so itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: each fetches for itself
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """Return the folder of the files that are not on the hub."""
    # as the hub's library has it: Path.home() fails where a container's user has no home
    return Path(os.path.expanduser(os.environ.get(CACHE_VARIABLE) or "~/.cache/rltune"))


def format_size(size_mb: float) -> str:
    """Return megabytes (10^6) for people: ``4 MB``, ``3.9 GB``."""
    return f"{size_mb / 1000:.1f} GB" if size_mb >= 1000 else f"{size_mb:.0f} MB" if size_mb >= 1 else "< 1 MB"


def _described(weights: WeightsFile) -> str:
    return f"{weights.file} ({weights.size}, {weights.licence}) of {weights.source}"


def _unreachable(error: Exception) -> str | None:
    """Return why there was no connection, None if there was one or if it only took too long.

    The transport under the hub's library has its own exceptions, which changed with the transport; what the operating
    system said is beneath them.
    """
    from huggingface_hub.errors import HfHubHTTPError

    system = _system_error(error)
    if system is None or isinstance(system, HfHubHTTPError | TimeoutError):
        return None
    return system.strerror or str(system)


def _system_error(error: BaseException) -> OSError | None:
    found = None
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            found = seen
        seen = seen.__cause__ or seen.__context__
    return found


def explain(error: Exception, repo: str = "") -> str:
    """Return what went wrong, in asking the hub for ``repo`` if so, in one line; libraries say it in several."""
    import requests
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(error, RltuneError):
        return str(error)
    if isinstance(error, GatedRepoError):
        return f"its owner gives it to those who ask; {gated_remedy(repo)}"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository on the hub, or it is private: then run 'hf auth login'"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
        return "the repository has no such file"
    system = _system_error(error)
    if isinstance(system, HfHubHTTPError):
        return f"{system.response.url.host} answers {system.response.status_code}"
    if isinstance(error, requests.RequestException):
        where = urlsplit(str(error.request.url)).hostname if error.request is not None else "the server"
        if isinstance(error, requests.HTTPError) and error.response is not None:
            return f"{where} answers {error.response.status_code}"
        if isinstance(error, requests.Timeout):
            return f"{where} took too long to answer"
        if system is None or isinstance(system, requests.RequestException):
            return "the connection broke off"
        return f"no way to {where}: {system.strerror or system}"
    if isinstance(system, TimeoutError):
        return "the hub took too long to answer"
    if system is not None and system.strerror:
        return system.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
