"""Every command that a page shows is one: the real parser takes it, and the files and extras that it names are there.

Nothing is executed.
"""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main

from rltune.cli.main import app
from rltune.config.load import load_experiment
from tests.docs.pages import PAGES, README, ROOT, Page, commands_of, known, page_named

ROOT_COMMAND: Any = typer.main.get_command(app)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OTHERS = {
    "ray",
    "ssh",
    "source",
    "tensorboard",
    "mlflow",
    "optuna-dashboard",
    "mkdocs",
    "ruff",
    "mypy",
    "git",
    "bash",
    "pre-commit",
}
"""Programs that are not ours, whose options are not looked at."""


def commands_under(command: Any, words: str) -> list[str]:
    inside = getattr(command, "commands", {})
    return [words, *(found for name in inside for found in commands_under(inside[name], f"{words} {name}"))]


COMMANDS = commands_under(ROOT_COMMAND, "rltune")


def parsed(words: Sequence[str], command: Any = ROOT_COMMAND, parent: Any = None) -> tuple[str, dict[str, Any]]:
    """Return the command that ``words`` come to and its values; raises typer's usage error for a wrong one."""
    context = command.make_context(command.name or "rltune", list(words), parent=parent)
    rest = [*getattr(context, "_protected_args", ()), *context.args] if hasattr(command, "commands") else []
    if not rest:
        return context.command_path, context.params
    _, inner, rest = command.resolve_command(context, rest)
    return parsed(rest, inner, context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one(page: Page) -> None:
    for words in commands_of(page):
        program = Path(words[0]).name
        if " ".join(words) in COMMANDS:  # named, not shown
            continue
        if program == "rltune":
            check_rltune(words[1:])
        elif program in ("python", "python3"):
            check_python(words[1:])
        elif program == "pip":
            check_pip(words[1:])
        else:
            assert program in OTHERS, f"{page.name}: what is {words}?"


def check_rltune(words: Sequence[str]) -> None:
    path, values = parsed(words)
    file = values.get("experiment")
    if file is not None and file.parts[0] == "experiments":
        experiment = load_experiment(ROOT / file, values["overrides"] or [], known(), must_find_files=False)
        is_right = path.endswith("submit") or experiment.is_searched == path.endswith("sweep")
        assert is_right, f"{words}: not a file for {path}"


def check_python(words: Sequence[str]) -> None:
    if words[0] == "-m":
        assert words[1] in ("pytest", "venv", "build"), words
        return
    code = (ROOT / words[0]).read_text()
    for option in words[1:]:
        assert not option.startswith("-") or f'"{option}"' in code, f"{words[0]} has no {option}"


def check_pip(words: Sequence[str]) -> None:
    assert words[0] == "install"
    for extras in re.findall(r"\[(.*)\]", " ".join(words)):
        assert set(extras.split(",")) <= EXTRAS.keys(), words


def test_every_command_has_a_row() -> None:
    rows = [line for line in page_named("commands").text.splitlines() if line.startswith("|")]
    for command in COMMANDS:
        assert command in ("rltune", "rltune builtin") or any(
            f"`{command} " in row or f"`{command}`" in row for row in rows
        ), command


@pytest.mark.parametrize("line", ["sweep", "sweep a.yaml --wrong", "rewards prove x", "sample --steps many", "trane a"])
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)missing|no such|valid integer"):
        parsed(line.split())


def test_commands_are_found_in_blocks_and_in_the_text() -> None:
    found = [words for words in commands_of(README) if Path(words[0]).name == "rltune"]
    assert [".venv/bin/rltune", "sweep", "experiments/mix.yaml"] in found
    assert ["rltune", "models", "fetch", "NAME"] in found


def test_every_extra_is_told_of() -> None:
    text = page_named("quick-start").text
    assert [extra for extra in EXTRAS if f'`".[{extra}]"`' not in text] == []
