"""Text beside pictures: in a font that has its characters, in lines that fit."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ImageFont

SIZE_PX = 13
MORE = "..."


@dataclass(frozen=True)
class Lettering:
    """A font, and what is written in it of a text: characters that it has not stand as Python escapes them."""

    font: Any
    characters: Collection[int]

    def spell(self, text: str) -> str:
        """Return a line of text as it can be written."""
        return "".join(
            letter if ord(letter) in self.characters else letter.encode("ascii", "backslashreplace").decode()
            for letter in text
        )

    def width(self, text: str) -> float:
        """Return the pixels that a line takes, as it can be written."""
        return float(self.font.getlength(self.spell(text)))

    def wrap(self, text: str, width_px: int, max_lines: int) -> list[str]:
        """Return lines of at most ``width_px``; what is beyond ``max_lines`` is left out, and dots say so."""
        lines = [line for part in text.splitlines() or [""] for line in self._wrap_line(part, width_px)]
        if len(lines) > max_lines:
            lines = lines[:max_lines]
            lines[-1] = self.cut(lines[-1] + " " + MORE, width_px)
        return [self.spell(line) for line in lines]

    def cut(self, text: str, width_px: int) -> str:
        """Return text that takes at most ``width_px``, with dots for an end that is left out."""
        if self.width(text) <= width_px:
            return text
        kept = text.removesuffix(MORE).rstrip()
        while kept and self.width(kept + MORE) > width_px:
            kept = kept[:-1]
        return kept + MORE

    def _wrap_line(self, text: str, width_px: int) -> list[str]:
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if self.width(longer) <= width_px:
                lines[-1] = longer
                continue
            lines += [""] if lines[-1] else []
            for letter in word:  # of a word that is longer than a line, and of scripts without spaces
                if lines[-1] and self.width(lines[-1] + letter) > width_px:
                    lines.append("")
                lines[-1] += letter
        return lines


def lettering(texts: Sequence[str]) -> Lettering:
    """Return Pillow's own font if it has every character, else the font of this machine that has the most of them."""
    wanted = {ord(letter) for text in texts for letter in text if letter.isprintable()}
    own = ImageFont.load_default(SIZE_PX)
    best = Lettering(own, range(0x20, 0x7F))
    if wanted <= set(best.characters):
        return best
    for path in _fonts():
        characters = _characters(path)
        if len(wanted.intersection(characters)) > len(wanted.intersection(best.characters)):
            try:
                best = Lettering(ImageFont.truetype(str(path), SIZE_PX), characters)
            except OSError:  # a font of pictures, of one size alone
                continue
        if wanted <= set(best.characters):
            break
    return best


def _fonts() -> list[Path]:
    """Return the font that comes with matplotlib, which has the letters of Europe, then those of the machine."""
    import matplotlib as mpl
    from matplotlib.font_manager import findSystemFonts

    return [Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", *map(Path, sorted(findSystemFonts()))]


def _characters(path: Path) -> Collection[int]:
    from matplotlib.ft2font import FT2Font

    read: Callable[[str], Any] = FT2Font
    try:
        return frozenset(read(str(path)).get_charmap())
    except (OSError, RuntimeError):  # no font, whatever its ending says
        return frozenset()
