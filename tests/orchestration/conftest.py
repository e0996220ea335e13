"""Experiments on the tiny pipeline, and rltune in a process of its own."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.orchestration.processes import rltune, write_experiment


@pytest.fixture
def write(tmp_path: Path, tiny_pipeline: Path) -> Callable[..., Path]:
    """Write an experiment on the tiny pipeline."""
    return partial(write_experiment, tmp_path, tiny_pipeline)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start rltune in a process of its own; whatever still runs at the end is killed."""
    with ExitStack() as stack:

        def run(*arguments: str, pause_s: float = 0.0) -> subprocess.Popen[str]:
            return stack.enter_context(rltune(*arguments, storage=tmp_path / "runs", pause_s=pause_s))

        yield run
