"""``module:name`` of a user's own, and what is said when it is not to be had."""

import importlib
import math
import sys
from pathlib import Path

import pytest

from rltune.errors import UserError
from rltune.rewards.imports import load_object


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty and not on ``sys.path``; modules that a test imports from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    importlib.invalidate_caches()
    return tmp_path


def test_a_module_of_the_current_folder_is_found(folder: Path) -> None:
    (folder / "mine.py").write_text("class Scores:\n    @staticmethod\n    def two():\n        return 2\n")
    assert load_object("callable", "mine:Scores.two")() == 2
    assert load_object("callable", "mine:Scores").__name__ == "Scores"
    assert sys.path.count(str(folder)) == 1


def test_a_module_of_a_package_is_found(folder: Path) -> None:
    (folder / "box").mkdir()
    (folder / "box" / "inner.py").write_text("def one():\n    return 1\n")
    assert load_object("callable", "box.inner:one")() == 1
    assert load_object("callable", "math:sqrt") is math.sqrt


@pytest.mark.parametrize("path", ["mine", "mine:", ":score", "mine:a:b", "./mine:score", "", 3, None, []])
def test_what_is_no_path_is_refused(path: object) -> None:
    with pytest.raises(UserError, match=r"^reward 'callable': function must be 'module:name', as in .*, got "):
        load_object("callable", path)


@pytest.mark.parametrize(("path", "module"), [("nowhere:score", "nowhere"), ("nowhere.inner:score", "nowhere")])
def test_a_missing_module_is_named_with_where_it_was_looked_for(folder: Path, path: str, module: str) -> None:
    with pytest.raises(UserError, match=f"function '{path}': there is no module '{module}'; .*PYTHONPATH") as caught:
        load_object("callable", path)
    assert str(folder) in str(caught.value)


def test_a_file_name_for_a_module_is_a_missing_module(folder: Path) -> None:
    (folder / "mine.py").write_text("def score(): ...\n")
    with pytest.raises(UserError, match=r"'mine.py:score': there is no module 'mine.py'"):
        load_object("callable", "mine.py:score")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import what_it_needs", "ModuleNotFoundError: No module named 'what_it_needs'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_a_module_that_cannot_be_run_says_why(folder: Path, source: str, said: str) -> None:
    (folder / "broken.py").write_text(source)
    with pytest.raises(UserError, match=f"function 'broken:score': importing 'broken' failed with {said}") as caught:
        load_object("callable", "broken:score")
    assert caught.value.__cause__ is not None


def test_a_missing_name_and_one_that_cannot_be_called_are_refused(folder: Path) -> None:
    (folder / "mine.py").write_text("LEVEL = 3\n")
    with pytest.raises(UserError, match=r"'mine:score': module 'mine' \(.*mine.py\) has no 'score'; give the name"):
        load_object("callable", "mine:score")
    with pytest.raises(UserError, match="'mine:LEVEL': must be a function or a class, got int"):
        load_object("callable", "mine:LEVEL")
    with pytest.raises(UserError, match="reward 'other': model 'mine:LEVEL'"):
        load_object("other", "mine:LEVEL", option="model")
