"""Ray starts where its files have no room of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_ray_starts_with_a_long_temporary_folder_and_without_a_home(tmp_path: Path) -> None:
    script = (
        "from rltune.orchestration.cluster import connect\n"
        "with connect(None, num_cpus=1) as cluster:\n"
        "    print(cluster.is_own, len(cluster.nodes))\n"
    )
    folder = tmp_path / ("x" * (92 - len(str(tmp_path)) - 1))
    folder.mkdir()
    variables = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    variables |= {"TMPDIR": str(folder), "HOME": "/proc/nope"}
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=variables, timeout=300
    )
    assert finished.stdout == "True 1\n", finished.stderr
