"""The Python API on a Ray cluster: the example of experiments/ as a user runs it, from another folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rltune
from tests.orchestration.processes import PATIENCE_S

pytestmark = [pytest.mark.ray, pytest.mark.long]

EXAMPLE = Path(__file__).parents[2] / "experiments" / "python_api.py"


def test_the_example_runs_and_leaves_a_run_that_is_read_as_plain_data(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, str(EXAMPLE)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "3 trials, " in done.stdout
    assert "3 of 3 trials have ended, hypervolume " in done.stdout
    run = rltune.open_run(tmp_path / "runs" / "from-python")
    assert [row["state"] for row in run.trials] == ["ok"] * 4
    assert {row["step"] for row in run.curves} == {1.0, 2.0, 3.0, 4.0}
    assert f"knee: trial {(run.front or {})['knee']}" in done.stdout
    exported = dict(re.findall(r"^trial (\d+): (/.*)$", done.stdout, flags=re.MULTILINE))
    assert exported == {trial: str(folder) for trial, folder in run.exports.items()}
    assert run.exports
