"""Records that one version writes and another reads: each carries its schema, and what a reader does not know is left.

A field is added without a new schema, with a default for records that lack it. A schema that is counted up says that
older versions would misread the record.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from rltune.errors import RunError, UserError

T = TypeVar("T")
SCHEMA = 1
"""Of everything in a run folder."""
KEY = "schema"


def from_record(kind: type[T], record: Mapping[str, Any], where: Path | str) -> T:
    """Return the dataclass ``kind`` from a record, without the fields that this version does not know.

    Args:
        kind: A dataclass.
        record: A JSON object; one without a schema is of a version before there was one.
        where: What messages call it.

    Raises:
        UserError: A newer version wrote it, and says that this one would misread it.
        RunError: A field is missing that this version cannot do without.
    """
    check_schema(record, where)
    known = fields(kind)  # type: ignore[arg-type]  # a dataclass
    needed = {field.name for field in known if field.default is MISSING and field.default_factory is MISSING}
    if lacking := sorted(needed - record.keys()):
        raise RunError(f"{where}: the record lacks {', '.join(lacking)}; it was altered, or is of another version")
    return kind(**{field.name: record[field.name] for field in known if field.name in record})


def check_schema(record: Mapping[str, Any], where: Path | str) -> None:
    """Check that this version reads a record as it was meant.

    Raises:
        UserError: A newer version wrote it.
    """
    found = record.get(KEY, SCHEMA)
    if not isinstance(found, int) or found > SCHEMA:
        raise UserError(
            f"{where}: was written by a newer rltune, got schema {found!r} where this version reads up to {SCHEMA}; "
            "update rltune"
        )


def to_record(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's content with its schema in front."""
    return {KEY: SCHEMA, **content}
