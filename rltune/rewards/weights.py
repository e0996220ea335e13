"""Published files of weights: where they come from, whether they are on this machine, and how they get here."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltune.errors import RunError, UserError

CACHE_VARIABLE = "RLTUNE_CACHE"
"""Folder of the files that are not on the Hugging Face hub; ``~/.cache/rltune`` if not set."""


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
            RunError: It cannot be fetched.
            UserError: What was fetched is not the published file.
        """
        path = self.find()
        if path is None:
            try:
                path = self._download()
            except Exception as error:  # the hub, its transport and the disk raise their own kinds
                raise RunError(f"{self.file} could not be fetched: {_first_line(error)}") from error
        self.check(path)
        return path

    def check(self, path: Path) -> None:
        """Compare the file at ``path`` with the pinned digest, if there is one.

        Raises:
            UserError: It has other contents than the published file.
        """
        if not self.sha256:
            return
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != self.sha256:
            raise UserError(
                f"{path} is not the published {self.file}, its sha256 is {digest} and should be {self.sha256}; "
                f"fetch it again from {self.source}"
            )

    def _download(self) -> Path:
        if self.repo:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(self.repo, self.file))
        import requests

        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{self.file}.{os.getpid()}.part"  # moved into place whole: a reader never sees half a file
        try:
            with requests.get(self.url, stream=True, timeout=30) as answer, part.open("wb") as stream:
                answer.raise_for_status()
                for chunk in answer.iter_content(1 << 20):
                    stream.write(chunk)
            self.check(part)
            part.replace(folder / self.file)
        finally:
            part.unlink(missing_ok=True)
        return folder / self.file


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


def is_offline() -> bool:
    """Return whether the user has said that the Hugging Face hub is out of reach."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def cache_dir() -> Path:
    """Return the folder of the files that are not on the hub."""
    return Path(os.environ.get(CACHE_VARIABLE, Path.home() / ".cache" / "rltune")).expanduser()


def format_size(size_mb: float) -> str:
    """Return megabytes (10^6) for people: ``4 MB``, ``3.9 GB``."""
    return f"{size_mb / 1000:.1f} GB" if size_mb >= 1000 else f"{size_mb:.0f} MB" if size_mb >= 1 else "< 1 MB"


def _described(weights: WeightsFile) -> str:
    return f"{weights.file} ({weights.size}, {weights.licence}) of {weights.source}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
