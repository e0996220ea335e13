"""``metrics.jsonl``: one row a step of a trial, written by its main worker."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rltune.errors import writing
from rltune.runs.store import read_json_lines


class RowWriter(Protocol):
    """Receives one row a step, from the main worker."""

    def write(self, row: Mapping[str, float]) -> None:
        """Take a row; ``step`` is its number."""
        ...

    def amend(self, step: int, more: Mapping[str, float]) -> None:
        """Add to the row of a step that was written before."""
        ...


class MetricsFile:
    """``metrics.jsonl``: one line a step. Opened for a resumed run, it forgets the steps that will be done again.

    Raises:
        StorageError: There is no room, or the file cannot be written; so does every method.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        self._path = path
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._rewrite(kept)
            self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, float]) -> None:
        """Append one line and flush it."""
        with writing(self._path):
            self._file.write(json.dumps(dict(row)) + "\n")
            self._file.flush()

    def amend(self, step: int, more: Mapping[str, float]) -> None:
        """Add to the line of a step, if it is there: to one that was stopped before its evaluation."""
        rows = [row | dict(more) if row["step"] == step else row for row in read_metrics(self._path)]
        with writing(self._path):
            self._file.close()
            self._rewrite(rows)
            self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        with writing(self._path):
            self._file.close()

    def _rewrite(self, rows: Sequence[Mapping[str, float]]) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(self._path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.jsonl``, leaving out a last line that a kill cut short; [] where there is none."""
    return read_json_lines(path)
