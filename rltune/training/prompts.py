"""Prompt sets: shipped by name, from a text file with one prompt a line, or written out."""

from collections.abc import Sequence
from pathlib import Path

from rltune.assets import BUILTIN_PROMPTS
from rltune.errors import UserError


def read_prompts(source: str | Sequence[str], *, where: str) -> tuple[str, ...]:
    """Return the prompts of a set, in order; empty lines and lines that start with ``#`` are left out.

    Args:
        source: ``builtin``, ``builtin-heldout``, the path of a UTF-8 text file, or the prompts themselves.
        where: Path of the setting in the experiment, for messages.

    Raises:
        UserError: The file cannot be read, or there is no prompt.
    """
    if isinstance(source, str):
        path = BUILTIN_PROMPTS.get(source, Path(source))
        try:
            lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{where}: prompts {source!r} cannot be read ({error}); "
                f"give {', '.join(BUILTIN_PROMPTS)}, a UTF-8 text file with one prompt a line, or a list"
            ) from error
    else:
        lines = source
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not prompts:
        raise UserError(f"{where}: {source!r} holds no prompt; give at least one")
    return prompts
