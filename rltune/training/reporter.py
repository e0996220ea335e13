"""Where a run's numbers and checkpoints go. The loop talks to this; Ray, a folder or a test stand behind it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rltune.errors import writing


class Reporter(Protocol):
    """Receives evaluation results and checkpoints. Every worker calls it, at the same points of the run."""

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Take the metrics of a point of the run and, from the main worker, the folder of its checkpoint.

        The folder may be moved or copied; the caller does not use it again. An exception ends the run here, as it is;
        a folder that is still there is then removed.
        """
        ...

    def is_stopping(self) -> bool:
        """Return whether the run should write a checkpoint and return. Asked on every worker once a step; one is
        enough.
        """
        ...


class RowWriter(Protocol):
    """Receives one row a step, from the main worker."""

    def write(self, row: Mapping[str, float]) -> None:
        """Take a row; ``step`` is its number."""
        ...

    def amend(self, step: int, more: Mapping[str, float]) -> None:
        """Add to the row of a step that was written before."""
        ...


class FolderReporter:
    """Keeps every report, and the newest checkpoints in a folder; for a run in this process."""

    def __init__(self, folder: Path, *, num_to_keep: int = 2) -> None:
        self._folder = folder
        self._num_to_keep = num_to_keep
        self.reports: list[dict[str, float]] = []

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        """Keep the metrics; move the checkpoint under its step."""
        self.reports.append(dict(metrics))
        if checkpoint is None:
            return
        target = self._folder / f"step-{int(metrics['step']):06d}"
        shutil.rmtree(target, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        checkpoint.rename(target)
        for old in self.checkpoints()[: -self._num_to_keep]:
            shutil.rmtree(old)

    def is_stopping(self) -> bool:
        """Never ask a run to stop."""
        return False

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints that are there, oldest first."""
        return sorted(self._folder.glob("step-??????"))

    def latest(self) -> Path | None:
        """Return the newest checkpoint."""
        found = self.checkpoints()
        return found[-1] if found else None


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


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; a last line without its newline is one that a kill cut short."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
