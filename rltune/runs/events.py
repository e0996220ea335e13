"""``events.jsonl``: when something happened to a trial or a run, and what its user should be told of it.

A trial's file has ``suggested`` and ``ended`` from the sweep, ``worker_started``, ``loaded``, ``first_step``,
``reported`` and ``trained`` from its main worker, and ``notice`` with a ``text`` from anyone. A run's own file has
``driver_started`` and ``driver_ended``.
"""

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltune.redaction import redact

logger = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"
NOTICE = "notice"
RENAMED = {"dealt": "suggested"}
"""What runs of before call an event -> its name now."""


@dataclass(frozen=True)
class Event:
    """Something that happened."""

    time: float
    """Seconds since the epoch."""
    event: str
    fields: dict[str, Any]
    """What else is known of it: ``step``, ``text``."""


def append_event(path: Path, event: str, **fields: Any) -> None:
    """Append one event, now. A disk that does not take it costs the line, never the trial."""
    line = redact(json.dumps({"time": round(time.time(), 3), "event": event, **fields})) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            if _is_torn(file.fileno()):
                line = "\n" + line
            file.write(line.encode())  # a single write at the end: lines of several processes do not mix
    except OSError as error:
        logger.debug("%s: the event %s was not written: %s", path, event, error)


def _is_torn(descriptor: int) -> bool:
    """Whether a kill or a full disk cut the last line short."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def read_events(path: Path) -> list[Event]:
    """Return a file's events, oldest first, leaving out lines that were cut short; [] where there is none."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            name = str(row.pop("event"))
            events.append(Event(float(row.pop("time")), RENAMED.get(name, name), row))
        except (ValueError, KeyError, AttributeError, TypeError):  # cut short, or not of ours
            continue
    return sorted(events, key=lambda event: event.time)


def note_event(trial_dir: Path, text: str) -> None:
    """Append a notice for the trial's user, unless it is the last one there: a restart may meet the same again."""
    path = trial_dir / EVENTS_FILE
    if read_notices(trial_dir)[-1:] != [text]:
        append_event(path, NOTICE, text=text)


def read_notices(trial_dir: Path) -> list[str]:
    """Return the texts of a trial's notices, oldest first."""
    return [str(event.fields["text"]) for event in read_events(trial_dir / EVENTS_FILE) if event.event == NOTICE]
