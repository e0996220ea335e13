"""From what a user names (``builtin``, a folder, a Hugging Face id) to a loaded model family."""

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import torch

from rltune.assets import BUILTIN_PIPELINE_DIR
from rltune.diffusion.families.base import FAMILIES, ModelFamily
from rltune.errors import UserError

logger = logging.getLogger(__name__)


def load_model(
    base: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> ModelFamily:
    """Load a text-to-image model and wrap it by its family; frozen, in eval mode.

    Args:
        base: ``builtin``, a folder with a ``model_index.json``, or a Hugging Face id.
        revision: Branch, tag or commit of a Hugging Face id.
        dtype: Of the frozen weights.
        device: Where network and decoder go; the CPU by default.

    Raises:
        UserError: The weights are not there, or are of a family that rltune does not know.
    """
    source = resolve_base(base)
    class_name = _pipeline_class_name(base, source, revision)
    family = FAMILIES.get(class_name)
    pipeline_class = getattr(diffusers, class_name)
    extra: dict[str, Any] = {}
    if class_name == "StableDiffusionPipeline":  # the safety checker has no part in training
        extra = {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = pipeline_class.from_pretrained(source, revision=revision, dtype=dtype, **extra)
    except (OSError, ValueError) as error:
        raise UserError(f"model.base: {base!r} could not be loaded: {error}; {_how_to_fetch(base)}") from error
    model = family(pipeline)
    model.to(device or torch.device("cpu"))
    return model


def resolve_base(base: str) -> str:
    """Return the folder of ``builtin``; anything else unchanged."""
    return str(BUILTIN_PIPELINE_DIR) if base == "builtin" else base


def _pipeline_class_name(base: str, source: str, revision: str | None) -> str:
    folder = Path(source)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise UserError(f"model.base: {base!r} has no model_index.json; give the folder of a diffusers pipeline")
        config = json.loads(index.read_text())
    else:
        try:
            config = diffusers.DiffusionPipeline.load_config(source, revision=revision)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.base: {base!r} is neither a folder here nor a model that could be read from the Hugging Face "
                f"cache or hub; {_how_to_fetch(base)}"
            ) from error
    return str(config["_class_name"])


def _how_to_fetch(base: str) -> str:
    return f"download it once with 'rltune models fetch {base}', or name a local folder or 'builtin'"
