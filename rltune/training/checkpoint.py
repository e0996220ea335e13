"""What a run needs to go on as if it had never stopped: adapters, optimiser, random state and step, in one folder."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rltune.diffusion.lora import load_lora_state, lora_state
from rltune.errors import RunError

ADAPTER_FILE = "adapter.safetensors"
TRAINER_FILE = "trainer.pt"
META_FILE = "checkpoint.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    """Optimiser steps done."""
    images_seen: int


def save_checkpoint(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write a checkpoint; ``folder`` appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(lora_state(network), partial / ADAPTER_FILE)
    trainer = {
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(trainer, partial / TRAINER_FILE)
    (partial / META_FILE).write_text(json.dumps({"step": progress.step, "images_seen": progress.images_seen}))
    for path in partial.iterdir():
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _flush(folder.parent)


def load_checkpoint(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint's state into freshly built objects of the same shapes, and return how far it had come.

    Raises:
        RunError: The checkpoint cannot be read, or belongs to another adapter.
    """
    try:
        meta = json.loads((folder / META_FILE).read_text())
        load_lora_state(network, load_file(folder / ADAPTER_FILE))
        trainer = torch.load(folder / TRAINER_FILE, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(trainer["optimizer"])
    except Exception as error:  # a truncated file fails in as many ways as it has readers
        raise RunError(f"checkpoint {folder}: cannot be resumed from ({error}); delete this folder to go on") from error
    torch.set_rng_state(trainer["torch_rng"])
    if trainer["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(trainer["cuda_rng"])
    return Progress(step=meta["step"], images_seen=meta["images_seen"])


def load_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Return the adapters of a checkpoint, peft's key names."""
    return load_file(folder / ADAPTER_FILE)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
