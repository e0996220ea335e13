"""A JSON-lines file that grows while it is read: each reading costs what has come since the last."""

import json
import os
from pathlib import Path
from typing import Any

TAIL = 64
"""Bytes before the place where a reading ended that must still be there for the next to go on from it."""


class Following:
    """Reads one file on; it may grow, be cut, be replaced, and come only later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset, self._tail = 0, 0, b""
        self.num_bytes = 0
        """Read so far, which is what following costs."""

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """Return whether the file begins anew, so that what was read of it before is void, and the rows that are new.

        A last line without its end is left for the next time, and a line that is no JSON object is passed over: a
        reader of a run must not fail for what a kill has left.
        """
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                is_same = found.st_ino == self._inode and found.st_size >= self._offset
                file.seek(self._offset - len(self._tail) if is_same else 0)
                text = file.read()
                if is_same and not text.startswith(self._tail):  # cut, and grown again beyond where we were
                    is_same = False
                    file.seek(0)
                    text = file.read()
        except FileNotFoundError:
            was_there = self._inode != 0
            self._inode, self._offset, self._tail = 0, 0, b""
            return was_there, []
        self.num_bytes += len(text)
        start = self._offset - len(self._tail) if is_same else 0
        skipped = len(self._tail) if is_same else 0
        end = text.rfind(b"\n") + 1
        whole = text[skipped:end] if end > skipped else b""
        if not is_same or whole:
            self._offset = start + max(end, skipped)
            self._tail = text[max(max(end, skipped) - TAIL, 0) : max(end, skipped)]
        self._inode = found.st_ino
        return not is_same, [row for line in whole.splitlines() if isinstance(row := _parsed(line), dict)]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
