"""Where a run's numbers and checkpoints go. The loop talks to this; Ray, a folder or a test stand behind it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


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
