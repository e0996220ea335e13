"""Where a run lies: in a folder, or at an address of object storage, which no path can hold."""

import re
from pathlib import Path
from shlex import quote

from rltune.errors import UserError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/]|$)")
"""``s3://bucket``, and ``s3:/bucket``, which is what a path makes of it; a single letter is no scheme."""


def is_address(place: str | Path) -> bool:
    """Return whether a place is an address such as ``s3://bucket/runs``, also where a path has swallowed a slash."""
    return _ADDRESS.match(str(place)) is not None


def as_folder(place: str | Path, what: str, *, is_read: bool = False) -> Path:
    """Return a place as a path.

    Args:
        place: As the user wrote it.
        what: What wants a folder there, for the message.
        is_read: Whether it is of a run or its exports, which ``rltune fetch`` could bring.

    Raises:
        UserError: It is an address, of which a path would make a local folder with a strange name.
    """
    if is_address(place):
        run = written(place).partition("/exports/")[0]
        remedy = f"; 'rltune fetch {quote(run)}' brings the run to this machine" if is_read else ""
        raise UserError(f"{what}: must be a local or a shared folder, got the address {written(place)!r}{remedy}")
    return Path(place)


def written(place: str | Path) -> str:
    """Return an address as its user wrote it: a path has made one slash of two, or of three, which ``file:`` has."""
    text = str(place)
    return (
        text if "://" in text else _ADDRESS.sub(lambda found: f"{found[1]}:/{'/' * (1 + (found[1] == 'file'))}", text)
    )
