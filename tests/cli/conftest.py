"""The command line, called in this process."""

import sys
from collections.abc import Callable

import pytest

from rltune.cli.main import main
from rltune.orchestration import campaign, cluster

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process -> exit code, standard output, standard error."""
    monkeypatch.setattr(cluster, "prepare", lambda address: None)  # it would set environment variables for good
    monkeypatch.setattr(cluster, "find_address", lambda address: None)
    monkeypatch.setattr(campaign, "find_address", lambda address: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rltune", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run
