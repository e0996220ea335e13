"""From what a user names (``builtin``, a folder, a Hugging Face id) to a loaded model family."""

import inspect
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch

from rltune.assets import BUILTIN_PIPELINE_DIR
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.outline import (
    UNREAD,
    classes_of,
    find_pipeline,
    find_variant,
    kind_of,
    left_out,
    network_kinds,
    read_index,
    remedy,
    short,
)
from rltune.diffusion.quantise import Kind, quantise
from rltune.diffusion.single_file import load_parts
from rltune.errors import UserError, gated_remedy


def load_model(
    base: str,
    *,
    revision: str | None = None,
    config: str | None = None,
    drop: Sequence[str] = (),
    dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
    device: torch.device | None = None,
    quantised: Kind | None = None,
) -> ModelFamily:
    """Load a text-to-image model and wrap it by its family; frozen, in eval mode.

    Args:
        base: ``builtin``, a folder with a ``model_index.json``, a ``.safetensors`` checkpoint of a whole model or its
            denoiser, or a Hugging Face id.
        revision: Branch, tag or commit of a Hugging Face id.
        config: Folder or Hugging Face id of the pipeline that has the settings of a checkpoint in one file, its
            tokenizers, and what the file lacks.
        drop: Components to do without.
        dtype: Of the frozen weights; by component, such as ``vae``, with that of the others as ``default``.
        device: Where network and decoder go; the CPU by default.
        quantised: How the network's weights are rounded before they go there; left out, not at all.

    Raises:
        UserError: The weights are not there, or are of a family that rltune does not know, or a component cannot be
            done without, or the library that quantises is not installed, or finds nothing to round.
    """
    source, folder = resolve_base(base), find_pipeline(base, revision, config)
    is_file = Path(base).is_file()
    if folder is None:
        class_name, variant = _hub_class_name(base, revision), None
    else:
        class_name, variant = _look_into(folder, base, drop)
    family, pipeline_class = classes_of(class_name, base=base)
    takes = inspect.signature(pipeline_class.__init__).parameters
    extra = left_out(family, takes, drop)
    try:
        if is_file and folder is not None:
            kinds = network_kinds(read_index(folder, base=base)[1])
            extra |= load_parts(Path(base), folder, {name: kinds[name] for name in kinds.keys() - extra.keys()}, dtype)
            source = str(folder)
        pipeline = pipeline_class.from_pretrained(source, revision=revision, variant=variant, dtype=dtype, **extra)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, UserError) as error:
        raise UserError(f"model.base: {base!r} could not be loaded ({short(error)}); {remedy(base, error)}") from error
    model = family(pipeline)
    if quantised is not None:
        quantise(model.network, quantised)
    model.to(device or torch.device("cpu"))
    return model


def resolve_base(base: str) -> str:
    """Return the folder of ``builtin``; anything else unchanged."""
    return str(BUILTIN_PIPELINE_DIR) if base == "builtin" else base


def _look_into(folder: Path, base: str, drop: Sequence[str]) -> tuple[str, str | None]:
    """Return the class name of a folder's pipeline and the variant of its weights, once all its parts are found.

    diffusers loads an absent tokenizer as an empty one.

    Raises:
        UserError: The index is not whole, or a part is missing.
    """
    class_name, index = read_index(folder, base=base)
    for name in index.keys() - {*UNREAD, *drop, *(name.replace("text_encoder", "tokenizer") for name in drop)}:
        if kind_of(index[name])[1] is not None and not (folder / name).is_dir():
            raise UserError(f"model.base: {base!r} has no folder {name}, which its index names; {remedy(base)}")
    return class_name, find_variant(folder, index)


def _hub_class_name(base: str, revision: str | None) -> str:
    try:
        return str(diffusers.DiffusionPipeline.load_config(base, revision=revision)["_class_name"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = remedy(base, error)
        if what == gated_remedy(base):
            raise UserError(f"model.base: {base!r} is given to those who have asked for it; {what}") from error
        raise UserError(
            f"model.base: {base!r} is neither a folder here nor a model that could be read from the Hugging Face "
            f"cache or hub; download it once with 'rltune models fetch {base}', or name a local folder or 'builtin'"
        ) from error
