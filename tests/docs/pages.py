"""What the pages say, taken apart: links, headings, code blocks, code in the text, and commands."""

import re
import shlex
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import takewhile
from pathlib import Path

from rltune.config.rules import Known
from rltune.orchestration.known import known_names

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Page:
    """A page of Markdown."""

    path: Path

    @property
    def name(self) -> str:
        """Path from the root of the repository."""
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def prose(self) -> str:
        """The text without its code blocks."""
        return BLOCK.sub("", self.text)

    def blocks(self, language: str) -> list[str]:
        """Code blocks of a language."""
        return [code for kind, code in BLOCK.findall(self.text) if kind == language]

    def spans(self) -> list[str]:
        """Code in the text; a ``|`` of a table cell is escaped there."""
        return [" ".join(code.replace("\\|", "|").split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", self.prose)]

    def links(self) -> list[str]:
        """Targets of links and pictures."""
        return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]+`", "", self.prose))

    def anchors(self) -> dict[str, str]:
        """Anchor of each heading in a repository's browser -> that on the site; a test wants them equal."""
        headings = re.findall(r"^#+ (.+)$", self.prose, flags=re.MULTILINE)
        plain = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).strip() for heading in headings]
        return {_browser_slug(heading): _site_slug(heading) for heading in plain}


def _browser_slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _site_slug(heading: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def commands_of(page: Page) -> Iterator[list[str]]:
    """Yield every command that a page shows, as words: those of shell blocks, and those of rltune in the text."""
    for block in page.blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words = words[1:]
                if words:
                    yield list(takewhile(lambda word: word != ">", words))
    for span in page.spans():
        if re.match(r"(\.venv/bin/)?rltune ", span):
            yield shlex.split(span)


FILES = [
    *ROOT.glob("*.md"),
    ROOT / "experiments" / "README.md",
    *(ROOT / "docs").glob("*.md"),
    ROOT / "rltune" / "builtin" / "MODEL_CARD.md",
]
PAGES = [Page(path) for path in sorted(FILES)]
README = Page(ROOT / "README.md")


def page_named(name: str) -> Page:
    """Return a page of ``docs/``."""
    return Page(ROOT / "docs" / f"{name}.md")


@cache
def known() -> Known:
    """Return every name that an experiment may use, once: it takes a tenth of a second, and there are many snippets."""
    return known_names()
