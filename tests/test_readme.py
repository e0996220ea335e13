"""What README.md and experiments/README.md name is there."""

import re
from pathlib import Path

import pytest

from rltune.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md"]
COMMANDS = {command.callback.__name__ for command in app.registered_commands if command.callback}
GROUPS = {
    str(group.name): {str(command.name) for command in group.typer_instance.registered_commands}
    for group in app.registered_groups
    if group.typer_instance
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_files_and_links_exist(page: Path) -> None:
    text = page.read_text()
    commands = re.findall(r"(?:^|[`/ ])rltune ([a-z]+)(?: ([a-z]+))?(?=[ `\n])", text, flags=re.MULTILINE)
    prose = ("is", "starts", "itself", "with", "and", "runs", "in")
    named = {command for command in commands if command[0] not in prose}
    assert named
    assert {command for command, _ in named} <= COMMANDS | GROUPS.keys()
    for group, command in named:
        assert not command or group not in GROUPS or command in GROUPS[group], (group, command)
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
