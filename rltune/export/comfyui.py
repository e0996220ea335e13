"""One file that ComfyUI, A1111 and Forge load: kohya's names for UNets, diffusers' own for transformers.

ComfyUI passes over names that it does not know with a line in its log, so that a LoRA in diffusers' names changes
nothing in a UNet: of those, ``comfy/lora.py`` knows the attention layers of an older diffusers alone. For the
transformers in ``OF_TRANSFORMERS`` it maps diffusers' names itself.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import ADAPTABLE
from rltune.errors import RunError, UserError
from rltune.export.base import EXPORT_FORMATS, Adapter
from rltune.export.header import header_of

FILE = "comfyui.safetensors"
NUM_NAMED = 3
OF_TRANSFORMERS = (
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "Flux2Pipeline",
    "Flux2KleinPipeline",
    "QwenImagePipeline",
    "ZImagePipeline",
    "ChromaPipeline",
    "AuraFlowPipeline",
)
"""Pipelines whose layers ``model_lora_keys_unet`` of ComfyUI knows by diffusers' names behind ``transformer.``."""


@dataclass(frozen=True)
class Place:
    """What one layer's tensors are called."""

    down: str
    up: str
    alpha: str | None


@EXPORT_FORMATS.register("comfyui")
@dataclass(frozen=True)
class ComfyUI:
    """``comfyui.safetensors``: put it into ``models/loras``, under a name of your own; strength 1 is as trained."""

    reader: ClassVar[str] = "ComfyUI's rule"

    def write(self, model: ModelFamily, adapter: Adapter, folder: Path) -> tuple[Path, ...]:
        """Write the file, with alpha as the rank where names have one.

        Raises:
            RunError: ComfyUI knows no names for the model's layers, or computes the adapter otherwise.
        """
        if adapter.use_dora:
            raise RunError(
                "ComfyUI computes DoRA with other norms, and its versions differ, so that it would give other images; "
                "export it for diffusers or peft"
            )
        state = adapter.folded()
        layers = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
        tensors: dict[str, Tensor] = {}
        for layer in layers:
            place = place_of(model, layer)
            down, up = (state[f"{layer}.lora_{factor}.weight"] for factor in "AB")
            tensors |= {place.down: down, place.up: up}
            if place.alpha is not None:
                tensors[place.alpha] = torch.tensor(float(down.shape[0]))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / FILE, metadata=header_of(model, adapter))
        return (folder / FILE,)

    def load(self, model: ModelFamily, folder: Path) -> Iterable[tuple[str, Tensor]]:
        """Add the file's updates to the weights, as ComfyUI does; what it would pass over is refused."""
        file = folder / FILE
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read as safetensors ({error})") from error
        updates = _updates(model, tensors, file)
        for layer, (up, down, scale) in updates.items():
            weight = _weight(model.network, layer)
            weight += _merged(up, down, scale, weight)
        return _listed(model.network, updates)

    def how_to_load(self, model: ModelFamily, folder: Path) -> str:
        """Return a call of the pipeline, which reads these names too."""
        return f"pipeline.load_lora_weights({str(folder)!r}, weight_name={FILE!r})"


Update = tuple[Tensor, Tensor, float]
"""Up, down, and what their product is multiplied by."""


def place_of(model: ModelFamily, layer: str) -> Place:
    """Return what ComfyUI calls the tensors of a layer.

    Raises:
        RunError: It has no names for layers of this model.
    """
    if model.lora_prefix == "unet":
        name = f"lora_unet_{layer.replace('.', '_')}"
        return Place(f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha")
    kind = type(model.pipeline).__name__
    if kind not in OF_TRANSFORMERS:
        raise RunError(f"ComfyUI has no names for the layers of {kind}; export it for diffusers or peft")
    name = f"transformer.{layer}"
    return Place(f"{name}.lora_A.weight", f"{name}.lora_B.weight", None)


def _updates(model: ModelFamily, tensors: Mapping[str, Tensor], file: Path) -> dict[str, Update]:
    """Find the tensors of every layer by its names, as ``load_lora`` does, and refuse what is left."""
    left, updates = set(tensors), {}
    for layer, module in model.network.named_modules():
        if not isinstance(module, ADAPTABLE):
            continue
        place = place_of(model, layer)
        if place.up not in tensors:
            continue
        if place.down not in tensors:
            raise UserError(f"{file}: a part is missing, {place.down}")
        up, down = tensors[place.up], tensors[place.down]
        alpha = tensors.get(place.alpha or "")
        updates[layer] = (up, down, 1.0 if alpha is None else float(alpha) / down.shape[0])
        left -= {place.up, place.down, place.alpha or ""}
        shape = (up.shape[0], *down.shape[1:])
        if up.shape[1] != down.shape[0] or shape != tuple(module.weight.shape):
            raise UserError(f"{file}: {place.up} and {place.down} are of another layer than {layer} of this base model")
    if left:
        raise UserError(
            f"{file}: {len(left)} of its {len(tensors)} tensors have no place in this base model "
            f"({', '.join(sorted(left)[:NUM_NAMED])}); ComfyUI would pass over them"
        )
    return updates


def _listed(network: nn.Module, updates: Mapping[str, Update]) -> Iterator[tuple[str, Tensor]]:
    for layer, (up, down, scale) in updates.items():
        yield layer, _merged(up, down, scale, _weight(network, layer))


def _merged(up: Tensor, down: Tensor, scale: float, weight: Tensor) -> Tensor:
    """Return what is added to a weight at strength 1: the product in float32, then in the weight's number format."""
    product = up.float().flatten(1) @ down.float().flatten(1)
    return (scale * product).reshape(weight.shape).to(weight)


def _weight(network: nn.Module, layer: str) -> Tensor:
    return cast(Tensor, cast(Any, network.get_submodule(layer)).weight.data)
