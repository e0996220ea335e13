"""A run on object storage: whole objects under an address, by pyarrow's file systems; what fails for a moment is tried
again, and what cannot be is said in one message that names the address.

Keys are relative to the address, with slashes. Writes are atomic: an object is there as it was, or as it is written.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit
from uuid import uuid4

from rltune.errors import StorageError, UserError
from rltune.redaction import holds_secret, redact

T = TypeVar("T")
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")
SEGMENTS = ".d/"
"""Ends the name of a JSON-lines file under which its lines lie, one object per append."""
WAITS_S = (0.5, 2.0, 5.0)
"""Before each further try; the file systems themselves try three times before."""
GCS_TRIES_S = 5.0
"""After which Google's own tries end; left alone, they go on for a quarter of an hour."""
TIMEOUT_S = 30.0
"""Of a request to S3 that says nothing."""
NO_BUCKET = "there is no such bucket; make it, or give another address"
_FINAL = (
    (
        ("ACCESS_DENIED", "PERMISSION_DENIED", "FORBIDDEN", "UNAUTHENTICATED", "HTTP STATUS 403", "HTTP STATUS 401"),
        "access is denied; give this machine credentials that may read, write, list and delete there",
    ),
    (
        ("INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN", "UNRECOGNIZED_CLIENT"),
        "its credentials are not known there; put them right",
    ),
    (("EXPIRED_TOKEN", "EXPIREDTOKEN", "TOKEN_REFRESH_REQUIRED"), "its credentials have expired; get new ones"),
    (("NO_SUCH_BUCKET", "BUCKET NOT FOUND"), NO_BUCKET),
    (
        ("HTTP STATUS 400", "HTTP STATUS 301", "AUTHORIZATIONHEADERMALFORMED"),
        "the request is refused: its credentials have expired, or the bucket is in another region (AWS_REGION)",
    ),
)
"""What a file system says of a fault that another try would meet again -> what to tell the user."""
_PASSING = (
    (
        ("SLOW_DOWN", "THROTTL", "TOO_MANY", "RESOURCE_EXHAUSTED", "HTTP STATUS 503", "HTTP STATUS 429"),
        "the store wants fewer requests, and went on to; wait, or lower resources.concurrent: the same command resumes",
    ),
    (
        ("INTERNAL_FAILURE", "HTTP STATUS 500", "HTTP STATUS 502", "HTTP STATUS 504"),
        "the store has a fault of its own; wait, the same command resumes",
    ),
)
"""The same of one that may pass, but did not."""
_UNANSWERED = "the store does not answer; see to the network, the same command resumes"


@dataclass(frozen=True)
class Entry:
    """An object as a listing has it."""

    size: int
    modified_ns: int
    """By the clock of the store."""


class ObjectStore:
    """Objects under an address. Safe for threads.

    Args:
        uri: The address.
        system: A ``pyarrow.fs.FileSystem``.
        root: Of the objects in it, without a slash at its end.
        waits_s: Before each further try of what failed for a moment.

    Every method raises ``StorageError`` where the store does not let it, or does not answer.
    """

    def __init__(self, uri: str, system: Any, root: str, *, waits_s: Sequence[float] = WAITS_S) -> None:
        self.uri = uri
        self._system, self._root, self._waits_s = system, root, waits_s
        self._last_ns = 0

    def read(self, key: str) -> bytes | None:
        """Return an object's content; None where there is none."""

        def action() -> bytes:
            with self._system.open_input_stream(self._path(key)) as stream:
                return bytes(stream.read())

        try:
            return self._try(key, action)
        except FileNotFoundError:
            return None

    def write(self, key: str, content: bytes) -> None:
        """Write an object whole."""

        def action() -> None:
            with self._system.open_output_stream(self._path(key)) as stream:
                stream.write(content)

        try:
            self._try(key, action)
        except FileNotFoundError as error:  # what Google's says of a bucket
            raise StorageError(f"{self.at(key)}: {NO_BUCKET}") from error

    def append(self, key: str, lines: Sequence[str]) -> None:
        """Add lines to a file of lines, as one more object: there is no append, and another writer may do the same.

        Objects are named by the time, so that lines come out in the order in which they went in; each writer's own
        always do, whatever its clock.
        """
        if lines:
            self._last_ns = max(time.time_ns(), self._last_ns + 1)
            name = f"{self._last_ns:020d}-{uuid4().hex[:8]}.jsonl"
            self.write(f"{key}{SEGMENTS}{name}", "".join(f"{line}\n" for line in lines).encode())

    def list(self, prefix: str = "") -> dict[str, Entry]:
        """Return every object whose key begins with a folder's, ``trials/001/``, or is just this; by key."""
        from pyarrow.fs import FileSelector, FileType

        def action() -> list[Any]:
            if prefix and not prefix.endswith("/"):
                return [self._system.get_file_info(self._path(prefix))]
            where = self._path(prefix).rstrip("/")
            found: list[Any] = self._system.get_file_info(FileSelector(where, recursive=True, allow_not_found=True))
            return found

        start = len(self._root) + 1
        rows = [row for row in self._try(prefix, action) if row.type == FileType.File]
        return {row.path[start:]: Entry(row.size, row.mtime_ns or 0) for row in sorted(rows, key=lambda row: row.path)}

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        try:
            self._try(key, lambda: self._system.delete_file(self._path(key)))
        except FileNotFoundError:
            return

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _try(self, key: str, action: Callable[[], T]) -> T:
        """Do something, again where it failed for a moment.

        Raises:
            FileNotFoundError: There is no such object.
            StorageError: It cannot be done.
        """
        for wait_s in (*self._waits_s, None):
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                fault = _words(error, _FINAL)
                if fault is None and wait_s is not None:
                    time.sleep(wait_s)
                    continue
                said = " ".join(str(error).split())[:300]
                what = fault or _words(error, _PASSING) or _UNANSWERED
                raise StorageError(f"{self.at(key)}: {what} ({redact(said)})") from error
        raise AssertionError

    def at(self, key: str) -> str:
        """Return the address of an object."""
        place, mark, query = self.uri.partition("?")
        return f"{place}/{key}{mark}{query}".rstrip("/") if key else self.uri


def open_store(uri: str) -> ObjectStore:
    """Return the store at an address, such as ``s3://bucket/runs/mix``; nothing is looked up there yet.

    S3 may be another than Amazon's: ``AWS_ENDPOINT_URL``, or ``?endpoint_override=HOST:PORT&scheme=http``. Google's
    takes that too, and ``anonymous=true``.

    Raises:
        UserError: It is none that can be used, or holds a secret.
    """
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem

    parts = check_address(uri)
    try:
        options, root = dict(parse_qsl(parts.query)), f"{parts.netloc}{parts.path}"
        if parts.scheme == "s3":
            system = _s3(parts.netloc, options)
        elif parts.scheme in ("gs", "gcs"):
            system = _gcs(options)
        else:
            system, root = FileSystem.from_uri(uri)
    except (ArrowInvalid, OSError, TypeError, NotImplementedError) as error:
        raise UserError(f"{uri}: cannot be used ({redact(' '.join(str(error).split()))})") from error
    return ObjectStore(uri, system, root.rstrip("/"))


def check_address(uri: str) -> SplitResult:
    """Return the parts of an address that a run may lie at, as far as its text can say.

    Raises:
        UserError: It is none, or holds a secret.
    """
    parts = urlsplit(uri)
    if holds_secret(uri):
        raise UserError(f"{redact(uri)}: an address may not hold a secret; the environment may, or a profile")
    if parts.scheme == "file":
        raise UserError(f"{uri}: write the folder itself, {parts.path}")
    if parts.scheme not in SCHEMES:
        raise UserError(f"{uri}: no run can lie there; write one of {', '.join(f'{name}://' for name in SCHEMES)}")
    if not parts.netloc:
        raise UserError(f"{uri}: names no bucket; write {parts.scheme}://BUCKET/FOLDER")
    return parts


def _s3(bucket: str, options: Mapping[str, str]) -> Any:
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    own = {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme} if endpoint.netloc else {}
    # delayed: an object that is no checkpoint is one request, and not the three of an upload in parts
    given = {"request_timeout": TIMEOUT_S, "connect_timeout": 10.0, "allow_delayed_open": True, **own, **options}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if "region" not in given:
        given["region"] = region or ("us-east-1" if "endpoint_override" in given else resolve_s3_region(bucket))
    return S3FileSystem(**given)


def _gcs(options: Mapping[str, str]) -> Any:
    from pyarrow.fs import GcsFileSystem

    is_anonymous = options.get("anonymous", "false").lower() == "true"
    rest = {name: value for name, value in options.items() if name != "anonymous"}
    return GcsFileSystem(**rest, anonymous=is_anonymous, retry_time_limit=timedelta(seconds=GCS_TRIES_S))


def _words(error: OSError, known: Sequence[tuple[Sequence[str], str]]) -> str | None:
    """Return what to tell of an error, if it is among those that are known."""
    said = str(error).upper()
    return next((words for signs, words in known if any(sign in said for sign in signs)), None)


def copied(store: ObjectStore, key: str, file: Path, entry: Entry) -> None:
    """Write an object to a file, which appears whole and has the time that the object has."""
    content = store.read(key)
    if content is None:
        return  # deleted meanwhile
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.{uuid4().hex[:6]}.partial")
    partial.write_bytes(content)
    os.utime(partial, ns=(entry.modified_ns, entry.modified_ns))
    partial.replace(file)
