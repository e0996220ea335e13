"""rltune in processes of its own: start it, watch what it leaves, kill parts of it."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MAIN = "from rltune.cli.main import main; main()"
REFERENCE = """
import json, sys
from pathlib import Path
from rltune.config.load import load_experiment
from rltune.training.loop import train_run
from rltune.training.reporter import FolderReporter
root = Path(sys.argv[2])
reporter = FolderReporter(root / "checkpoints")
experiment = load_experiment(sys.argv[1])
config = experiment.concrete(json.loads(sys.argv[3])) if len(sys.argv) > 3 else experiment.shared
train_run(config, trial_dir=root / "trial", base_dir=root / "base", reporter=reporter)
(root / "report.json").write_text(json.dumps(reporter.reports[-1]))
"""
PATIENCE_S = 240


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{what} never came; rltune printed:\n{process.communicate()[0]}")
        time.sleep(0.2)


def wait_for_end_of(pids: set[int]) -> None:
    """Wait until what a killed process has left behind is gone: it trains on for a moment."""
    deadline = time.monotonic() + PATIENCE_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"still there: {pids}"
        time.sleep(0.1)


def descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(after_name[1]), []).append(int(stat.parent.name))
    found, waiting = set(), [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child)
    return found


def listening_addresses(pids: set[int]) -> set[str]:
    """Return the local IP of every listening TCP socket of the processes, from /proc, IPv4 as hex."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A is LISTEN
                addresses.add(fields[1].split(":")[0])
    return addresses


LOOPBACK_HEX = {
    "0100007F",  # 127.0.0.1
    "00000000000000000000000001000000",  # ::1
    "0000000000000000FFFF00000100007F",  # ::ffff:127.0.0.1
}
