"""``results.jsonl``: one line per trial that ended, appended and flushed to disk. The source of truth of a run."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rltune.records import from_record, to_record
from rltune.runs.store import append_line, read_json_lines


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended."""

    trial: str
    state: Literal["ok", "stopped", "failed"]
    """``stopped``: ended before its last step, for ``reason``; what it was by then is a result like any other."""
    values: Mapping[str, Any]
    """Knobs, by dotted path in the experiment."""
    params: Mapping[str, Any]
    """The searcher's own parameters."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the last evaluation: ``eval/NAME``, ``eval/NAME_se``, ``step``, ``images_seen``."""
    constraints: Mapping[str, float] = field(default_factory=dict)
    """Constraint -> by how much it is broken; at most 0 where it holds."""
    reason: str = ""
    """Why it was stopped or failed."""
    checkpoint: str = ""
    """Folder of the last checkpoint, relative to the run folder; empty for the base model."""
    duration_s: float = 0.0
    ended_at: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether it ended with a result, its own last step or an earlier one."""
        return self.state != "failed"

    @property
    def is_feasible(self) -> bool:
        """Whether every constraint holds."""
        return all(violation <= 0 for violation in self.constraints.values())


def read_results(path: Path) -> list[TrialResult]:
    """Return the results in the order in which trials ended; [] where there are none yet."""
    return [from_record(TrialResult, row, path) for row in read_json_lines(path)]


def append_result(path: Path, result: TrialResult) -> None:
    """Append one line and wait until it is on disk."""
    append_line(path, json.dumps(to_record(asdict(result)), allow_nan=False))
