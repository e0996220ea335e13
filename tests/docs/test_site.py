"""The site builds without a warning, holds what the code says today, and asks nobody else for anything."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """``docs/generate.py``."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["reference.md", "commands.md"])
def test_generated_pages_are_up_to_date(generate: ModuleType, name: str) -> None:
    page = ROOT / "docs" / name
    assert page.read_text() == generate.rendered(page), "run: python docs/generate.py"


def test_every_setting_and_option_has_a_text() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    listed = re.findall(r"^- \*\*`([\w.]+)`\*\*.*\n(.*)$", page, flags=re.MULTILINE)
    assert len(listed) > 130
    assert [name for name, text in listed if not re.match(r"  \S", text)] == []


@pytest.mark.long
def test_the_site_builds_strictly_and_asks_nobody_else_for_anything(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    pytest.importorskip("material", reason="mkdocs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        html = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?([^\"' >]+)", html)
        assert fetched
        assert [link for link in fetched if re.match(r"(?:https?:)?//", link)] == [], page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text(encoding="utf-8")), style
