"""Published architectures as families without values: configurations in ``full_size/``, one file a model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

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
        with torch.device(device):
            network, vae = (getattr(diffusers, kind)(**config).to(dtype) for kind, config in (self.network, self.vae))
        takes: dict[str, Any] = dict.fromkeys(_components(pipeline_class))
        if self.pipeline == "StableDiffusionPipeline":  # its family reads the encoder, and asks the tokenizer for 77
            takes |= {"text_encoder": torch.nn.Module(), "tokenizer": _Tokenizer()}
        named = "unet" if "unet" in takes else "transformer"
        extra = {"requires_safety_checker": False} if "safety_checker" in takes else {}
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipeline = pipeline_class(**takes | {named: network, "vae": vae, "scheduler": scheduler} | extra)
        return family(pipeline)


def _components(pipeline_class: Any) -> set[str]:
    return set(pipeline_class._get_signature_keys(pipeline_class)[0])


def architectures() -> dict[str, Architecture]:
    """Return all of them by file name."""
    found = {}
    for path in sorted(FOLDER.glob("*.json")):
        raw = json.loads(path.read_text())
        found[path.stem] = Architecture(**raw | {"px": tuple(raw["px"])})
    return found
