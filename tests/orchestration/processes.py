"""rltune in processes of its own: start it, watch what it leaves, kill parts of it."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.orchestration.own_rewards import PAUSE

MAIN = "from rltune.cli.main import main; main()"
PATIENCE_S = 480


def write_experiment(folder: Path, base: Path, **sections: Any) -> Path:
    """Write an experiment on the pipeline at ``base``; sections replace those below."""
    raw: dict[str, Any] = {
        "name": "tiny",
        "model": {"base": str(base), "lora": {"rank": 2, "alpha": 4}},
        "prompts": {"train": ["a cat", "a dog", "two red birds"], "eval": ["a snail", "an octopus"]},
        "sampler": {"steps": 4, "guidance": 2.0},
        "estimator": {"k": 3, "draw": "uniform"},
        "rewards": {"brightness": {"weight": 0.5}, "smoothness": {"weight": 0.5}},
        "optim": {"lr": 0.005, "steps": 6, "batch": 4},
        "evaluate": {"every": 3, "prompts": 2, "images_per_prompt": 2},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(raw | sections))  # JSON is YAML
    return path


def environment(pause_s: float = 0.0) -> dict[str, str]:
    """Return what a process of a test is started with: the modules of this one, and rewards that wait ``pause_s``."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", PAUSE: str(pause_s)}
    variables |= {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])}
    variables.pop("RAY_ADDRESS", None)
    return variables


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a process that hears Ctrl-C; if it still runs at the end it is killed."""
    # a shell's background job ignores Ctrl-C, and so would everything that these tests start from one
    hears = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, text=True, preexec_fn=hears, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@contextmanager
def rltune(*arguments: str, storage: Path | str, pause_s: float = 0.0) -> Iterator[subprocess.Popen[str]]:
    """Start rltune in a process of its own."""
    command = [sys.executable, "-c", MAIN, *arguments, "--storage", str(storage)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with started(command, env=environment(pause_s), **pipes) as process:
        yield process


def trained_alone(path: Path, root: Path, values: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Train an experiment in this process, without Ray and without a break, and return its last report."""
    from rltune.config.load import load_experiment
    from rltune.training.loop import train_run
    from rltune.training.reporter import FolderReporter

    experiment = load_experiment(path)
    config = experiment.shared if values is None else experiment.concrete(values)
    reporter = FolderReporter(root / "checkpoints")
    train_run(config, trial_dir=root / "trial", base_dir=root.parent / "base", reporter=reporter)
    return reporter.reports[-1]


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


def age(folder: Path, seconds: float) -> None:
    """Make what was written into a folder now look as if it had been written earlier."""
    then = time.time() - seconds
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (then, then), follow_symlinks=False)


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


def name_of(pid: int) -> str:
    """Return what a process calls itself; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""


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
