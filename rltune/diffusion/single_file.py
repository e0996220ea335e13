"""Checkpoints in one file, in the layout of the model's authors: what they hold, and how their parts are loaded.

Such a file has weights alone. Settings and tokenizers are those of a pipeline of the same kind, in a folder.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
    fetch_diffusers_config,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from rltune.errors import UserError

ENDING = ".safetensors"
DENOISERS = ("unet", "transformer")
DECODER = "vae"
DECODER_PREFIXES = ("first_stage_model.", "vae.")


def read_header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file without their values, by name; reads its head alone.

    Raises:
        ValueError: It is no such file, or shorter or longer than its head says.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = file.stat().st_size
        if not 2 <= length <= size - 8:
            raise ValueError(f"{file.name} is no safetensors file, or a part of one: it has {size} bytes")
        try:
            head = json.loads(stream.read(length))
            rows = {name: row for name, row in head.items() if name != "__metadata__"}
            whole = 8 + length + max((int(row["data_offsets"][1]) for row in rows.values()), default=0)
            tensors = {name: torch.empty(row["shape"], device="meta") for name, row in rows.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{file.name} is no safetensors file, its head cannot be read") from error
    if whole != size:
        raise ValueError(f"{file.name} is not whole, it has {size} of {whole} bytes")
    return tensors


def published_config(tensors: Mapping[str, Tensor]) -> str:
    """Return the name on the Hugging Face hub of a pipeline with the settings that diffusers takes for such a file."""
    return str(fetch_diffusers_config(tensors)["pretrained_model_name_or_path"])


def holds(tensors: Mapping[str, Tensor], name: str, kind: type) -> bool:
    """Return whether a file has the weights of a pipeline's component, which is of class ``kind``."""
    if name in DENOISERS:
        return True
    if name == DECODER:
        return any(key.startswith(DECODER_PREFIXES) for key in tensors)
    if kind.__name__ == "T5EncoderModel":
        return bool(is_t5_in_single_file(tensors))
    return bool(is_clip_model_in_single_file(kind, tensors))


def load_parts(
    file: Path, config: Path, kinds: Mapping[str, Any], dtypes: torch.dtype | Mapping[str, torch.dtype]
) -> dict[str, nn.Module]:
    """Return the components whose weights are in a file, loaded from it.

    Args:
        file: The checkpoint.
        config: Folder of a pipeline with their settings.
        kinds: Name -> class of the components that are networks.
        dtypes: Of the weights; by component, with that of the others as ``default``.

    Raises:
        UserError: A component is not whole, or is another one than the settings say.
    """
    tensors = load_file(file)
    loaded: dict[str, nn.Module] = {}
    for name, kind in kinds.items():
        if not holds(tensors, name, kind):
            continue
        place: dict[str, Any] = {"config": str(config), "subfolder": name, "local_files_only": True}
        dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes.get(name, dtypes["default"])
        own = dict(tensors)  # some conversions take out what they have read
        if name in DENOISERS or name == DECODER:
            try:
                part = kind.from_single_file(own, dtype=dtype, **place)
            except NotImplementedError as error:  # torch's, of what diffusers has left without values
                raise UserError(f"it lacks a part of the {name}") from error
        elif kind.__name__ == "T5EncoderModel":
            part = create_diffusers_t5_model_from_checkpoint(kind, own, torch_dtype=dtype, **place)
            part.tie_weights()  # its embedding may be there once, as shared
        else:
            part = create_diffusers_clip_model_from_ldm(kind, own, torch_dtype=dtype, **place)
        if any(value.is_meta for value in part.state_dict().values()):
            raise UserError(f"it lacks a part of the {name}")
        loaded[name] = part
    return loaded
