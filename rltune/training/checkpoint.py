"""What a run needs to go on as if it had never stopped: adapters, optimiser, random state, progress; one folder."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rltune.diffusion.lora import load_lora_state
from rltune.errors import RunError

ADAPTER_FILE = "adapter.safetensors"
TRAINER_FILE = "trainer.pt"
META_FILE = "checkpoint.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    """Rounds done."""
    images_seen: int
    queries: int = 0
    """Reward queries made, over all workers."""
    calls: int = 0
    """Passes of an image through the network, over all workers; see ``Tally``."""


class Part(Protocol):
    """Something that a checkpoint holds: an optimiser, a moving average, what an estimator learns."""

    def state_dict(self) -> Any:
        """Return its state."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Take over a state."""
        ...


def save_checkpoint(
    folder: Path, adapter: Mapping[str, torch.Tensor], parts: Mapping[str, Part], progress: Progress
) -> None:
    """Write a checkpoint; ``folder`` appears whole or not at all.

    Args:
        folder: Where to.
        adapter: What was evaluated and is exported, peft's key names.
        parts: What training goes on with. The network's own adapters are ``parts`` too where they are not ``adapter``.
        progress: How far the run has come.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(dict(adapter), partial / ADAPTER_FILE)
    trainer = {
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(trainer, partial / TRAINER_FILE)
    (partial / META_FILE).write_text(json.dumps(asdict(progress)))
    for path in partial.iterdir():
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _flush(folder.parent)


def load_checkpoint(folder: Path, network: nn.Module, parts: Mapping[str, Part]) -> Progress:
    """Put a checkpoint's state into freshly built objects of the same shapes, and return how far it had come.

    The adapters are loaded first, then ``parts`` in their order.

    Raises:
        RunError: The checkpoint cannot be read, or belongs to another adapter.
    """
    try:
        meta = json.loads((folder / META_FILE).read_text())
        load_lora_state(network, load_file(folder / ADAPTER_FILE))
        trainer = torch.load(folder / TRAINER_FILE, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(trainer["parts"][name])
        progress = Progress(**meta)
    except Exception as error:  # a truncated file fails in as many ways as it has readers
        raise RunError(f"checkpoint {folder}: cannot be resumed from ({error}); delete this folder to go on") from error
    torch.set_rng_state(trainer["torch_rng"])
    if trainer["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(trainer["cuda_rng"])
    return progress


def keep_newest(checkpoint: Path, target: Path, *, count: int) -> None:
    """Move a checkpoint to ``target``, which appears whole or not at all, and delete all but the newest beside it.

    Args:
        checkpoint: What ``save_checkpoint`` wrote, perhaps on another file system.
        target: Its place; names beside it sort by age.
        count: How many stay.
    """
    partial = target.with_name(f"{target.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(checkpoint, partial)
    partial.rename(target)
    _flush(target.parent)
    for old in sorted(path for path in target.parent.glob("checkpoint_*") if path.suffix != ".partial")[:-count]:
        shutil.rmtree(old)


def load_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Return the adapters of a checkpoint, peft's key names."""
    return load_file(folder / ADAPTER_FILE)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
