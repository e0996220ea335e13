"""A whole pipeline folder with the LoRA in its weights, for tools that load no LoRA."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import adapter_updates, remove_lora
from rltune.errors import UserError
from rltune.export.base import EXPORT_FORMATS, Adapter

FOLDER = "fused"
"""Of the pipeline, in an export's."""


@EXPORT_FORMATS.register("fused")
@dataclass(frozen=True)
class Fused:
    """What ``DiffusionPipeline.from_pretrained`` loads, in float32: in half precision small updates would be lost.

    While it is written the network is in memory twice. An update that is so small that float32 weights cannot take it
    up is refused by the proof, since it would be another LoRA.
    """

    reader: ClassVar[str] = "diffusers, as a pipeline"

    def write(self, model: ModelFamily, adapter: Adapter, folder: Path) -> tuple[Path, ...]:
        """Write every part of the pipeline, the network with the updates added to its weights."""
        place, pipeline, own = folder / FOLDER, model.pipeline, model.network
        merged: Any = copy.deepcopy(own)
        remove_lora(merged)
        with torch.no_grad():
            for name, update in adapter_updates(own):
                merged.get_submodule(name).weight += update
        setattr(pipeline, model.lora_prefix, merged)
        try:
            pipeline.save_pretrained(place, safe_serialization=True)
        finally:
            setattr(pipeline, model.lora_prefix, own)
        return tuple(sorted(file for file in place.rglob("*") if file.is_file()))

    def load(self, model: ModelFamily, folder: Path) -> Iterable[tuple[str, Tensor]]:
        """Load the network by its own class, and put its weights into the model's; none may be missing or left over.

        Returns:
            Of every layer whose weight is another, what was added to it.

        Raises:
            UserError: The folder is not there or damaged, or is of another network.
        """
        place, network = folder / FOLDER / model.lora_prefix, model.network
        kind: Any = type(network)
        own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        try:
            loaded, told = kind.from_pretrained(
                place,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                torch_dtype=next(network.parameters()).dtype,
                use_safetensors=True,
            )
            network.load_state_dict(loaded.state_dict())
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{place}: not a network that this base model can load ({first})") from error
        odd = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in told[kind]]
        if odd:
            raise UserError(f"{place}: {len(odd)} tensors are missing or have no place, such as {odd[0]}")
        return _changes(own, network.state_dict())

    def how_to_load(self, model: ModelFamily, folder: Path) -> str:
        """Return a call that loads the whole pipeline."""
        call = f"pipeline = DiffusionPipeline.from_pretrained({str(folder / FOLDER)!r})"
        return f"from diffusers import DiffusionPipeline\n{call}"


def _changes(own: dict[str, Tensor], now: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in now.items():
        if not torch.equal(tensor, own[name]):
            yield name.removesuffix(".weight"), tensor - own[name]
