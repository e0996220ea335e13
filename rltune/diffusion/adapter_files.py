"""Exported adapters as files, whatever their kind: LoRAs, and ``conditioning.json``, numbers that mix prompts."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rltune.diffusion.conditioning import MIX_FILE, PLACE, PromptMix, attach_mix, remove_mix
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora_files import find_lora_file, load_lora_file, unload_lora_file
from rltune.errors import UserError
from rltune.records import check_schema

REMEDY = "export it again"


def find_adapter_file(path: Path) -> Path:
    """Return the file of an exported folder; a file is itself.

    Raises:
        UserError: There is none, or more than one.
    """
    if path.is_file() and path.suffix == ".json":
        return path
    return file if (file := path / MIX_FILE).is_file() else find_lora_file(path)


def load_adapter_file(model: ModelFamily, file: Path) -> frozenset[str]:
    """Attach a file at strength 1 and return the parts of the pipeline it reaches: ``unet``, ``text_encoder``.

    Args:
        model: Without adapters; where a LoRA is refused, some may be left on it.
        file: As ``find_adapter_file`` returns it.

    Raises:
        UserError: The file is damaged, or not one of this model.
    """
    if file.suffix != ".json":
        return load_lora_file(model, file)
    attach_mix(model, read_mix_file(file))
    return frozenset((model.lora_prefix,))


def unload_adapter_file(model: ModelFamily) -> None:
    """Take off what ``load_adapter_file`` attached; nothing is fine too."""
    unload_lora_file(model)
    remove_mix(model.network)


def read_mix_file(file: Path) -> PromptMix:
    """Return the numbers of a ``conditioning.json``.

    Raises:
        UserError: It is damaged, or a newer version's.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); {REMEDY}") from error
    if not isinstance(content, dict) or content.get("kind") != "conditioning":
        raise UserError(f"{file}: is no {MIX_FILE}, which has kind: conditioning; name an exported folder")
    check_schema(content, file)
    return _mix_of(content, file)


def _mix_of(content: Mapping[str, Any], file: Path) -> PromptMix:
    template, timesteps, lambdas = (content.get(name) for name in ("styled", "timesteps", "lambdas"))
    if not isinstance(template, str) or template.count(PLACE) != 1:
        raise UserError(f"{file}: styled must hold {PLACE} once, got {template!r}; {REMEDY}")
    for name, values in (("timesteps", timesteps), ("lambdas", lambdas)):
        is_numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if not is_numbers or not values or not all(map(math.isfinite, values)):
            raise UserError(f"{file}: {name} must be a list of finite numbers, got {str(values)[:60]}; {REMEDY}")
    if len(timesteps) != len(lambdas) or len(set(timesteps)) != len(timesteps):  # type: ignore[arg-type]
        what = f"{len(lambdas)} lambdas for {len(set(timesteps))} timesteps"  # type: ignore[arg-type]
        raise UserError(f"{file}: must have a lambda for each timestep, got {what}; {REMEDY}")
    mix = PromptMix(template, torch.tensor(timesteps, dtype=torch.float64), torch.tensor(lambdas))
    return mix.requires_grad_(False)
