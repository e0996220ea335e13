"""``events.jsonl`` of a trial: what happened to it that its numbers do not show, in one line each."""

import json
from datetime import UTC, datetime
from pathlib import Path

from rltune.errors import writing
from rltune.training.reporter import read_json_lines

EVENTS_FILE = "events.jsonl"


def note_event(trial_dir: Path, text: str) -> None:
    """Append what happened to a trial, unless that is what it says last: a restart may meet it again.

    Raises:
        StorageError: There is no room, or the file cannot be written.
    """
    path = trial_dir / EVENTS_FILE
    if read_events(trial_dir)[-1:] == [text]:
        return
    row = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "text": text}
    with writing(path):
        trial_dir.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_events(trial_dir: Path) -> list[str]:
    """Return what happened to a trial, in order; [] where nothing did."""
    return [str(row["text"]) for row in read_json_lines(trial_dir / EVENTS_FILE)]
