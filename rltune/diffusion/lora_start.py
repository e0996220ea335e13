"""A LoRA file of any origin as the values that training starts from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import ADAPTER, layer_ending, row_norms
from rltune.diffusion.lora_files import find_lora_file, load_lora_file, unload_lora_file
from rltune.errors import UserError


@dataclass(frozen=True)
class Factors:
    """What a file adds to a layer: B A, and DoRA's magnitudes if it has any."""

    a: Tensor
    """(rank, ..)."""
    b: Tensor
    """(rows, rank, ..), the file's scale in it."""
    magnitude: Tensor | None

    @property
    def rank(self) -> int:
        """Of both."""
        return len(self.a)


def read_lora(model: ModelFamily, path: Path) -> dict[str, Factors]:
    """Return layer -> what a LoRA adds to it at weight 1; the model is without adapters before and afterwards.

    In a network without values, the names and shapes of the file are checked alone, and its factors have no values.

    Args:
        model: Of the family that the LoRA is for, in float32 to have the file's own values, else rounded to its format.
        path: A file, or a folder with one: rltune's, diffusers', kohya's or peft's.

    Raises:
        UserError: There is no such file, not all of it fits, or it changes more than the denoising network.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; name an exported folder or a .safetensors file")
    try:
        parts = load_lora_file(model, find_lora_file(path))
        if others := sorted(parts - {model.lora_prefix}):
            raise UserError(
                f"{path}: it changes the {', '.join(others)} too, which stays frozen here, so that a part of it would "
                f"be lost; give one that was trained on the {model.lora_prefix} alone"
            )
        layers = _lora_layers(model.network)
        if biased := [name for name, layer in layers.items() if layer.lora_bias.get(ADAPTER)]:
            raise UserError(f"{path}: {biased[0]} has a bias in its adapter, which rltune cannot train; give another")
        return attached_factors(model.network)
    finally:
        unload_lora_file(model)


def attached_factors(network: nn.Module) -> dict[str, Factors]:
    """Return layer -> what its adapter adds to it."""
    return {name: _factors(layer) for name, layer in _lora_layers(network).items()}


def _lora_layers(network: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}


def _factors(layer: Any) -> Factors:
    norms = layer.lora_magnitude_vector
    return Factors(
        layer.lora_A[ADAPTER].weight.data.float(),
        layer.lora_B[ADAPTER].weight.data.float() * layer.scaling[ADAPTER],
        norms[ADAPTER].weight.data.float() if ADAPTER in norms else None,
    )


def check_start(factors: Mapping[str, Factors], path: Path, *, layers: list[str], rank: int, use_dora: bool) -> None:
    """Check that adapters of these settings can start as a LoRA, the whole of it.

    Args:
        factors: As ``read_lora`` returns them.
        path: Where they are from, for messages.
        layers: Endings of the names of the layers that get adapters.
        rank: Of all of them.
        use_dora: Whether they have magnitudes.

    Raises:
        UserError: It has another rank, layers that get no adapter, or magnitudes that have no place.
    """
    ranks = sorted({each.rank for each in factors.values()})
    if len(ranks) > 1:
        raise UserError(f"{path}: its layers have ranks from {ranks[0]} to {ranks[-1]}; one of a single rank is needed")
    if ranks != [rank]:
        own = ranks[0]
        raise UserError(f"{path}: has rank {own}, and model.lora.rank is {rank}; write model.lora.rank: {own}")
    stray = [name for name in factors if not any(f".{name}".endswith(f".{layer}") for layer in layers)]
    if stray:
        wanted = ", ".join(dict.fromkeys(layer_ending(name) for name in factors))
        raise UserError(
            f"{path}: has {stray[0]}, which is not among model.lora.targets; write all, or "
            f"model.lora.targets: [{wanted}]"
        )
    if not use_dora and any(each.magnitude is not None for each in factors.values()):
        raise UserError(f"{path}: is a DoRA; write model.lora.dora: true")


@torch.no_grad()
def start_from(network: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Put a LoRA into fresh adapters, so that together they do what it does; they scale as they are attached.

    Layers that the LoRA leaves alone keep their fresh adapters, which change nothing. DoRA's magnitudes are those of a
    plain LoRA's own weights.

    Raises:
        KeyError: A layer has no adapter.
    """
    for name, each in factors.items():
        layer: Any = network.get_submodule(name)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        a.copy_(each.a)
        b.copy_(each.b / layer.scaling[ADAPTER])
        if ADAPTER not in layer.lora_magnitude_vector:
            continue
        norms = layer.lora_magnitude_vector[ADAPTER].weight
        weight = layer.get_base_layer().weight
        own = row_norms(weight.float() + (each.b.flatten(1) @ each.a.flatten(1)).reshape(weight.shape))
        norms.copy_((own if each.magnitude is None else each.magnitude).reshape(norms.shape))
