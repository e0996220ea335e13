"""Training runs on the tiny pipeline, in this process and in several, and what they leave."""

import functools
import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.diffusion.lora import add_lora
from rltune.runs.rows import read_metrics
from rltune.training.checkpoint import load_adapter
from rltune.training.loop import train_run
from rltune.training.reporter import FolderReporter
from rltune.training.setup import Run, build_run

Make = Callable[..., RunConfig]


def train(
    config: RunConfig, root: Path, *, base_dir: Path | None = None, resume_from: Path | None = None
) -> FolderReporter:
    """Train in this process; the base model is measured in ``root`` unless a folder is shared."""
    reporter = FolderReporter(root / "checkpoints", num_to_keep=10)
    places = {"trial_dir": root / "trial", "base_dir": base_dir or root / "base"}
    train_run(config, reporter=reporter, resume_from=resume_from, **places)
    return reporter


def adapters(root: Path, step: int) -> dict[str, Tensor]:
    """The adapters that ``root``'s checkpoint of a step gives to evaluation and export."""
    return load_adapter(root / "checkpoints" / f"step-{step:06d}")


def metrics(root: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``."""
    return read_metrics(root / "trial" / "metrics.jsonl")


def adapted_run(config: RunConfig) -> Run:
    """A run with fresh adapters attached, as far as the loop has it before its first round."""
    run = build_run(config)
    lora = config.model.lora
    add_lora(run.model.network, rank=lora.rank, alpha=lora.alpha_value, targets=lora.targets, seed=0)
    return run


Trainer = Callable[..., Any]
"""Called as ``train``, in every one of several processes."""


def _work(variables: Mapping[str, str], trainer: Trainer, root: Path, resume_from: Path | None) -> None:
    """Be one of several processes; what goes wrong is left in ``root`` for the one that waits."""
    os.environ.update(variables)
    try:
        for name, raw in json.loads((root / "configs.json").read_text()).items():
            trainer(RunConfig.model_validate(raw), root / name, base_dir=root / "base", resume_from=resume_from)
    except BaseException:
        (root / f"fault-{variables['RANK']}.txt").write_text(traceback.format_exc())
        raise


@functools.cache
def _forks() -> Any:
    """Return what starts processes that have torch and diffusers loaded: to import them takes eight seconds each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.runs", "tests.tiny", "rltune.training.loop"])
    return context


def train_in_processes(
    configs: Mapping[str, RunConfig],
    root: Path,
    count: int,
    *,
    resume_from: Path | None = None,
    trainer: Trainer = train,
) -> None:
    """Train one after the other with ``count`` processes and a gloo group, as Ray Train and torchrun start them."""
    root.mkdir()
    raw = {name: config.model_dump(mode="json") for name, config in configs.items()}
    (root / "configs.json").write_text(json.dumps(raw))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    processes = [
        _forks().Process(
            target=_work, args=(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, trainer, root, resume_from)
        )
        for rank in range(count)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        faults = [path.read_text() for path in sorted(root.glob("fault-*.txt"))]
        assert [process.exitcode for process in processes] == [0] * count, "\n".join(faults)
    finally:
        for process in processes:
            process.kill()
