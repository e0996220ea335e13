"""Published architectures as families without values: configurations in ``full_size/``, one file a model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from rltune.diffusion.families.base import FAMILIES, ModelFamily

FOLDER = Path(__file__).parent / "full_size"


class _Tokenizer:
    model_max_length = 77


@dataclass(frozen=True)
class Architecture:
    """A published model's networks, and how it is sampled."""

    name: str
    pipeline: str
    network: tuple[str, dict[str, Any]]
    vae: tuple[str, dict[str, Any]]
    guidance: float
    px: tuple[int, ...]

    def family(self, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> ModelFamily:
        """Build it with networks that are random, or on the device ``meta`` have no values, and no text encoders."""
        family, pipeline_class = FAMILIES.get(self.pipeline), getattr(diffusers, self.pipeline)
        network, vae = (_built(kind, config, device, dtype) for kind, config in (self.network, self.vae))
        takes: dict[str, Any] = dict.fromkeys(_components(pipeline_class))
        if self.pipeline == "StableDiffusionPipeline":  # its family reads the encoder, and asks the tokenizer for 77
            takes |= {"text_encoder": torch.nn.Module(), "tokenizer": _Tokenizer()}
        named = "unet" if "unet" in takes else "transformer"
        extra = {"requires_safety_checker": False} if "safety_checker" in takes else {}
        scheduler = EulerDiscreteScheduler(steps_offset=1) if named == "unet" else FlowMatchEulerDiscreteScheduler()
        pipeline = pipeline_class(**takes | {named: network, "vae": vae, "scheduler": scheduler} | extra)
        return family(pipeline)


def _built(kind: str, config: dict[str, Any], device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Return a network without values, or with small random ones; drawn by its own rules they would take minutes."""
    with torch.device("meta"):
        network = torch.nn.Module.to(getattr(diffusers, kind)(**config), dtype=dtype)
    if device == "meta":
        return network
    if any(buffer.is_meta for buffer in network.buffers()):  # what is worked out at the start, such as places
        network = torch.nn.Module.to(getattr(diffusers, kind)(**config), dtype=dtype)
    network = network.to_empty(device=device) if any(p.is_meta for p in network.parameters()) else network.to(device)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.02 if parameter.dim() > 1 else 1.0)
    return network


def _components(pipeline_class: Any) -> set[str]:
    return set(pipeline_class._get_signature_keys(pipeline_class)[0])


def architectures() -> dict[str, Architecture]:
    """Return all of them by file name."""
    found = {}
    for path in sorted(FOLDER.glob("*.json")):
        raw = json.loads(path.read_text())
        found[path.stem] = Architecture(**raw | {"px": tuple(raw["px"])})
    return found
