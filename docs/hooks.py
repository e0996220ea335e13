"""Files of the repository that pages link to, brought into the site where the links expect them.

A page in ``docs/`` links to ``../experiments/mix.yaml``, which is right on a disk and in a repository browser. The site
has ``docs/`` as its root, so that such a link loses its ``../`` here, and the file is added to the site.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
BROUGHT = (
    "experiments/**/*.yaml",
    "experiments/**/*.txt",
    "experiments/*.py",
    "experiments/images/*",
    "experiments/README.md",
    "cluster/**/*",
    "rltune/builtin/MODEL_CARD.md",
    "rltune/builtin/samples.jpg",
    "*.md",
    "CITATION.cff",
    "LICENSE",
)
"""What pages may link to, and with them what those link to."""


def _brought() -> Iterator[str]:
    for pattern in BROUGHT:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path != ROOT / "README.md":  # docs/index.md is the site's first page
                yield path.relative_to(ROOT).as_posix()


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the repository's files to the site's."""
    for name in _brought():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links out of ``docs/``, and links of other pages into it, into links within the site."""
    name = page.file.src_uri
    if (ROOT / name).is_file():
        up = "../" * name.count("/")
        return re.sub(rf"\]\({up}docs/", f"]({up}", markdown)
    return markdown.replace("](../", "](")
