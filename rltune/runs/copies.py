"""A run on object storage as a folder on this machine: what code reads and writes, brought down and published.

The store holds the run; a copy is what one process works in, and may be deleted at any time. Nobody shares one: the
driver has its own, every worker has its own, and whoever only reads has another. A file is written by one process at a
time, and files of lines by several: those are published line by line, so that nobody's are lost.

The order of publication is what makes a kill harmless: what a file stands for is there before it.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from rltune.runs.objects import SEGMENTS, Entry, ObjectStore, copied
from rltune.runs.store import write_atomically

LOGS = ("results.jsonl", "confirmed.jsonl", "mixtures.jsonl", "events.jsonl")
"""Names of files of lines that several processes add to, one after another or at once."""
LAST = ("base.json", "checkpoint.json", "rltune.json", "experiment.yaml")
"""Names of files that say that what is beside them is whole: written last, deleted first."""
PRIVATE = ("*.partial", "*.lock", "*.unproved", "*.db-journal", "*.db-wal", "mlflow*", "wandb", ".[!s]*")
"""Names of files and folders that stay on the machine that has them; ``.stop`` is none."""
HEAVY = ("trainer.pt", "*.safetensors", "*.bin", "*.npy", "study.db", "study_artifacts", "tensorboard")
"""What a reader of a run does not ask for: weights, images as numbers, and what can be made again."""
AT_A_TIME = 16

Wanted = Callable[[str], bool]


def is_light(key: str) -> bool:
    """Return whether a key is what a reader of a run asks for."""
    return not _has(key, HEAVY)


def is_light_or_handed_on(key: str) -> bool:
    """Return the same, with the adapters of checkpoints: what a trial is, but not what it would train on with."""
    return is_light(key) or (key.endswith(".safetensors") and "/checkpoints/" in key)


class Copy:
    """One process's folder of a run.

    Args:
        store: Where the run lies.
        path: The folder.
        check: Called before anything is written to the store; raises where that may no longer be done.
    """

    def __init__(self, store: ObjectStore, path: Path, *, check: Callable[[], None] = lambda: None) -> None:
        self.store, self.path, self._check = store, path, check
        self._published: dict[str, tuple[int, int]] = {}
        """Key -> size and time of the file when it was last the same as the object."""
        self._lines: dict[str, set[str]] = {}
        """Key of a file of lines -> those that are known to be published."""
        self._lock = threading.RLock()

    def bring(self, *prefixes: str, wanted: Wanted = is_light, is_exact: bool = True) -> None:
        """Make files the same as the objects.

        Args:
            prefixes: Folders, with a slash at their end, or single files; everything, if none is given.
            wanted: Keys that this is about.
            is_exact: Whether files without an object go, too. Else those are left alone, and lines are only added to.

        Raises:
            StorageError: The store does not let it, or does not answer.
            OSError: The folder cannot be written.
        """
        with self._lock:
            there: dict[str, tuple[str, Entry]] = {}
            for prefix in prefixes or ("",):
                for key, entry in self._objects(prefix).items():
                    if not is_private(key) and wanted(_file_of(key)):
                        there[_place_of(key)] = key, entry
            changed = {place: found for place, found in there.items() if not self._is_same(place, found[1])}
            with ThreadPoolExecutor(AT_A_TIME) as pool:
                list(pool.map(lambda place: self._copy(place, *changed[place]), changed))
            logs = {log for log in map(_file_of, there) if is_log(log)}
            if is_exact:
                gone = {key for prefix in prefixes or ("",) for key in self._files(prefix, with_segments=True)}
                for key in gone - there.keys() - logs:
                    if wanted(_file_of(key)):
                        (self.path / key).unlink(missing_ok=True)
            for log in logs if is_exact else logs & {*map(_file_of, changed)}:
                self._compose(log, is_exact=is_exact)
            self._published |= {place: stamp for place in there if (stamp := _stamp(self.path / place))}

    def publish(self, *prefixes: str) -> None:
        """Write what has changed since it was last the same as the store: first what is not in ``LAST``.

        Args:
            prefixes: As of ``bring``; everything that the driver of a run writes, if none is given.

        Raises:
            StorageError: The store does not let it, or does not answer.
        """
        with self._lock:
            keys = {key for prefix in prefixes for key in self._files(prefix)}
            keys |= set() if prefixes else set(filter(_is_of_driver, self._files("")))
            for key in sorted(keys, key=lambda key: (_rank(key), key)):
                try:
                    self._publish_lines(key) if is_log(key) else self._publish_file(key)
                except FileNotFoundError:  # deleted meanwhile, as old checkpoints are
                    continue

    def prune(self, prefix: str) -> None:
        """Delete the objects below a folder that has no such file here: what says that others are whole goes first."""
        with self._lock:
            gone = [key for key in self.store.list(prefix) if not (self.path / key).is_file()]
            for key in sorted(gone, key=lambda key: (-_rank(key), key)):
                self._check()
                self.store.delete(key)
                self._published.pop(key, None)

    def remove(self, key: str) -> None:
        """Delete a file and its object."""
        with self._lock:
            (self.path / key).unlink(missing_ok=True)
            self._check()
            self.store.delete(key)
            self._published.pop(key, None)

    def _objects(self, prefix: str) -> dict[str, Entry]:
        if prefix and not prefix.endswith("/") and is_log(prefix):
            return self.store.list(prefix) | self.store.list(f"{prefix}{SEGMENTS}")
        return self.store.list(prefix)

    def _files(self, prefix: str, *, with_segments: bool = False) -> Iterator[str]:
        """Yield the keys of the files here that are not private, those of the objects of files of lines if asked to."""
        start = self.path / prefix
        if prefix and not prefix.endswith("/"):
            if start.is_file() and not is_private(prefix):
                yield prefix
            if with_segments and is_log(prefix):
                yield from self._files(f"{prefix}{SEGMENTS}", with_segments=True)
            return
        for folder, folders, names in os.walk(start):
            at = os.path.relpath(folder, self.path)
            keys = [name if at == "." else f"{at}/{name}" for name in names]
            folders[:] = [name for name in folders if not _has(name, PRIVATE)]
            yield from (key for key in keys if not is_private(key) and (with_segments or _file_of(key) == key))

    def _copy(self, place: str, key: str, entry: Entry) -> None:
        copied(self.store, key, self.path / place, entry)

    def _is_same(self, key: str, entry: Entry) -> bool:
        stamp = _stamp(self.path / key)
        if stamp is None or stamp[0] != entry.size:
            return False
        # a checkpoint's files are written once, under a name of their own, and so are appended lines
        return stamp[1] == entry.modified_ns or "/checkpoints/" in key or _file_of(key) != key

    def _publish_file(self, key: str) -> None:
        stamp = _stamp(self.path / key)
        if stamp is None or self._published.get(key) == stamp:
            return
        content = (self.path / key).read_bytes()
        self._check()
        self.store.write(key, content)
        self._published[key] = stamp

    def _publish_lines(self, key: str) -> None:
        known = self._lines.setdefault(key, set())
        new = [line for line in _whole_lines(self.path / key) if line not in known]
        self._check()
        self.store.append(key, new)
        known.update(new)

    def _compose(self, key: str, *, is_exact: bool) -> None:
        """Make a file of lines, or add to it, from the objects that have been brought: every line once."""
        file = self.path / key
        parts = sorted((self.path / f"{key}{SEGMENTS}").glob("*.jsonl"))
        lines = list(dict.fromkeys(line for part in parts for line in _whole_lines(part)))
        here = dict.fromkeys(_whole_lines(file)) if file.is_file() else {}
        more = [line for line in lines if line not in here]
        if is_exact and list(here) != lines:
            write_atomically(file, "".join(f"{line}\n" for line in lines))
        elif more:
            with file.open("ab") as out:
                out.write("".join(f"{line}\n" for line in more).encode())
        self._lines.setdefault(key, set()).update(lines)


def is_log(key: str) -> bool:
    """Return whether a key is of a file of lines that several processes add to."""
    return key.rpartition("/")[2] in LOGS


def is_private(key: str) -> bool:
    """Return whether a file stays on the machine that has it."""
    return _has(key, PRIVATE)


def _is_of_driver(key: str) -> bool:
    """Return whether a file is one that a run's driver writes, and no worker."""
    top, _, rest = key.partition("/")
    if top == "trials":
        return rest.rpartition("/")[2] in ("trial.json", "events.jsonl")
    return top not in ("base", "tensorboard", "confirmed.jsonl", "mixtures.jsonl")


def _has(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for name in key.split("/") for pattern in patterns)


def _file_of(key: str) -> str:
    """Return the file that an object is of: an appended one is of the file of lines that it adds to."""
    file, mark, _ = key.rpartition(SEGMENTS)
    return file if mark and is_log(file) else key


def _place_of(key: str) -> str:
    """Return where an object is kept here: a file of lines itself, of a folder that was copied there, is its first."""
    return f"{key}{SEGMENTS}{0:020d}.jsonl" if is_log(key) else key


def _rank(key: str) -> int:
    """Return when a file is published: what stands for a folder after what is in it, the experiment at the end."""
    name = key.rpartition("/")[2]
    return 0 if name not in LAST else 2 if key == "experiment.yaml" else 1


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _whole_lines(file: Path) -> list[str]:
    """Return a file's lines, without a last one that was cut short."""
    return [line[:-1] for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
