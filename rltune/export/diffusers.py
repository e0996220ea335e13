"""A trained adapter as a LoRA file that diffusers loads at the right strength, proved by loading it again.

B: images. C, H, W: latent channels, rows, columns.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import ADAPTER, fold_scale, target_modules
from rltune.errors import RunError

WEIGHT_FILE = "pytorch_lora_weights.safetensors"
CARD_FILE = "rltune.json"
TOLERANCE = 2e-3
"""Greatest difference of a reloaded image, RGB in [0, 1], half of 1/255: what 8 bits can show."""


def write_lora(
    model: ModelFamily, state: Mapping[str, Tensor], *, rank: int, alpha: float, targets: Any, folder: Path
) -> Path:
    """Write an adapter in diffusers' format, its scale alpha / rank folded into the weights, and return the file.

    Readers that ignore alpha (ComfyUI), those that take it as the rank, and those that read the metadata then agree.

    Args:
        model: A model of the adapter's family; only its class is used.
        state: Adapter weights, peft's key names.
        rank: Of the adapter.
        alpha: It was trained with.
        targets: Layers it was attached to, as in ``add_lora``.
        folder: Receives ``pytorch_lora_weights.safetensors``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefix = model.lora_prefix
    metadata = {"r": rank, "lora_alpha": rank, "target_modules": target_modules(targets), "init_lora_weights": True}
    model.pipeline.save_lora_weights(
        folder,
        **{
            f"{prefix}_lora_layers": {
                name: tensor.contiguous() for name, tensor in fold_scale(dict(state), scale=alpha / rank).items()
            },
            f"{prefix}_lora_adapter_metadata": metadata,
        },
    )
    path = folder / WEIGHT_FILE
    path.chmod(0o644)  # safetensors writes 0600, which another user cannot read
    return path


def check_reload(path: Path, fresh: ModelFamily, draw: Callable[[ModelFamily], Tensor], expected_B3HW: Tensor) -> float:
    """Load the file into a fresh pipeline, draw the same images, and return the greatest difference.

    Raises:
        RunError: They differ by more than ``TOLERANCE``.
    """
    fresh.pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=ADAPTER)
    with torch.no_grad():
        difference = float((draw(fresh) - expected_B3HW).abs().max())
    if not difference <= TOLERANCE:
        raise RunError(
            f"{path}: reloaded with diffusers it gives other images than the trained adapter, by {difference:.3g} "
            f"where {TOLERANCE:g} is allowed; the file is not fit for use"
        )
    return difference


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write ``rltune.json``: where the LoRA comes from and what it scored."""
    (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")
