"""Experiments on the tiny pipeline, and rltune in a process of its own."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.orchestration.processes import MAIN


@pytest.fixture
def write(tmp_path: Path, tiny_pipeline: Path) -> Callable[..., Path]:
    """Write an experiment on the tiny pipeline; sections replace those below."""

    def build(**sections: Any) -> Path:
        raw: dict[str, Any] = {
            "name": "tiny",
            "model": {"base": str(tiny_pipeline), "lora": {"rank": 2, "alpha": 4}},
            "prompts": {"train": ["a cat", "a dog", "two red birds"], "eval": ["a snail", "an octopus"]},
            "sampler": {"steps": 4, "guidance": 2.0},
            "estimator": {"k": 3, "draw": "uniform"},
            "rewards": {"brightness": {"weight": 0.5}, "smoothness": {"weight": 0.5}},
            "optim": {"lr": 0.005, "steps": 6, "batch": 4},
            "evaluate": {"every": 3, "prompts": 2, "images_per_prompt": 2},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(json.dumps(raw | sections))  # JSON is YAML
        return path

    return build


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start rltune in a process of its own; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        env.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-c", MAIN, *arguments, "--storage", str(tmp_path / "runs")]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # a shell's background job ignores Ctrl-C, and so would everything that these tests start from one
        hears = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, env=env, preexec_fn=hears, **pipes)
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
