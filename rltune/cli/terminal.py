"""The two consoles: results go to standard output, everything else to standard error.

Prompts, paths, names and reasons are users' text, and are printed as they stand. Rich would read ``[red]`` in them as a
style, end at ``[/x]``, and make a picture of ``:smile:``; so here markup and emoji codes are off, for strings in tables
too, and a style is given by ``style=`` or as ``rich.text.Text``. Control characters, which a terminal would obey, are
left out.
"""

import codecs
import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

STAND_INS = {"\N{PLUS-MINUS SIGN}": "+-", "\N{HORIZONTAL ELLIPSIS}": "~"}
"""What is written where an encoding has no such character; others are written as Python escapes them."""
_CONTROL = dict.fromkeys(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t")


class PlainConsole(Console):
    """A console that prints strings as they stand, and whose broken pipe ends nothing but the printing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield what rich would, without the control characters that are not rich's own."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(segment.text.translate(_CONTROL), segment.style)

    def on_broken_pipe(self) -> None:
        """Print into the void from now on: ``| head -1`` must not end a training before its export."""
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self.file.fileno())
        os.close(devnull)


console = PlainConsole()
errors = PlainConsole(stderr=True)


def marked(mark: str, style: str, text: str) -> Text:
    """Return a line: a word in a style, and text as it stands."""
    return Text.assemble((mark, style), " ", text)


def take_any_text() -> None:
    """Have both streams take every character: what an encoding has not must not end a run, nor be lost."""
    codecs.register_error("rltune", _stand_in)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="rltune")


def _stand_in(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start]
    known = STAND_INS.get(lost)
    if known is not None:
        return known, error.start + 1
    error.end = error.start + 1
    return codecs.backslashreplace_errors(error)


def told(value: float, half: float | None, *, sign: str = "") -> str:
    """Return a mean with its interval."""
    return f"{value:{sign}.4g}" if half is None else f"{value:{sign}.4g} ±{half:.2g}"
