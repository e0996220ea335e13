"""What README.md and experiments/README.md name is there."""

import re
from pathlib import Path

import pytest

from rltune.cli.main import app, builtin

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md"]
COMMANDS = {command.callback.__name__ for command in app.registered_commands if command.callback}
BUILTIN_COMMANDS = {str(command.name) for command in builtin.registered_commands}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_files_and_links_exist(page: Path) -> None:
    text = page.read_text()
    commands = re.findall(r"(?:^|[`/ ])rltune ((?:builtin )?[a-z]+)(?=[ `\n])", text, flags=re.MULTILINE)
    named = {command for command in commands if command not in ("is", "starts", "itself", "with", "and", "runs")}
    assert named
    assert {command.split()[-1] for command in named if command.startswith("builtin ")} <= BUILTIN_COMMANDS
    assert {command for command in named if not command.startswith("builtin ")} <= COMMANDS
    for file in re.findall(r"experiments/[\w./-]+\.(?:yaml|txt|md)", text):
        assert (ROOT / file).is_file(), file
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link


def test_every_experiment_is_in_the_index() -> None:
    index = (ROOT / "experiments" / "README.md").read_text()
    for path in (ROOT / "experiments").rglob("*.yaml"):
        assert f"]({path.relative_to(ROOT / 'experiments')})" in index


def test_no_figure_is_left_to_fill_in() -> None:
    for page in PAGES:
        assert "@@" not in page.read_text()
