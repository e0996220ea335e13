"""Bytes of a run: files that appear whole, and lines that stay whole. Every write of a record goes through here."""

import json
import os
from pathlib import Path
from typing import Any

from rltune.redaction import redact


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new, never a part."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, secrets masked, and wait until it is on disk.

    A line that a kill had cut short is dropped first.
    """
    with path.open("ab+") as file:
        _drop_torn_line(file.fileno(), path)
        file.write(f"{redact(line)}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; a last line without its newline is one that a kill cut short."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _drop_torn_line(descriptor: int, path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.ftruncate(descriptor, whole)
