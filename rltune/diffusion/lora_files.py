"""LoRA files of any origin into a loaded model, with proof that all of a file was taken.

diffusers and peft warn of tensors that they have no place for, and of places that they have no tensor for, and go on:
the base model, or half a LoRA, is then drawn under the LoRA's name. Here either is an error.
"""

import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rltune.diffusion.conditioning import MIX_FILE
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import ADAPTER
from rltune.errors import UserError

logger = logging.getLogger(__name__)

WEIGHT_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls it."""
PEFT_WEIGHT_FILE = "adapter_model.safetensors"
PEFT_SETTINGS_FILE = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
NUM_NAMED = 3
REMEDY = "take one that was trained on this model, or name the model that it was trained on"


def find_lora_file(path: Path) -> Path:
    """Return the LoRA of a folder, as diffusers or peft names it or the only one there; a file is itself.

    Raises:
        UserError: There is none, or more than one.
    """
    if not path.is_dir():
        found = [path] if path.is_file() and path.suffix == ".safetensors" else []
    else:
        named = [file for name in (WEIGHT_FILE, PEFT_WEIGHT_FILE) if (file := path / name).is_file()]
        found = named[:1] or sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path}: holds {_few([file.name for file in found])}; name one of these files")
    if path.name == MIX_FILE or (path / MIX_FILE).is_file():
        raise UserError(f"{path}: holds numbers that mix prompts ({MIX_FILE}), where a LoRA is needed; name a LoRA")
    raise UserError(f"{path}: holds no LoRA; name an exported folder or a .safetensors file")


def load_lora_file(model: ModelFamily, file: Path) -> frozenset[str]:
    """Attach a LoRA file at weight 1 and return the parts of the pipeline it reaches: ``unet``, ``text_encoder``.

    Reads what diffusers reads (its own format with and without ``unet.``, kohya's), and peft's.

    Args:
        model: Without adapters; where the file is refused, some may be left on it. In one whose network has no values,
            names and shapes are looked at alone.
        file: A safetensors file.

    Raises:
        UserError: The file is damaged, holds values that are not finite, or not all of it and nothing else was taken.
    """
    tensors = _read_tensors(file)
    try:
        with warnings.catch_warnings(record=True) as caught:  # peft's, of what the proof below finds
            warnings.simplefilter("always")
            _load(model, file, tensors)
    except (ValueError, RuntimeError, KeyError, OSError, TypeError, AttributeError, IndexError) as error:
        first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        why = " ".join([first, *more[:1]])  # torch names every tensor of another shape, hundreds of them
        raise UserError(f"{file}: not a LoRA that this base model can load ({why}); {REMEDY}") from error
    attached = {part: _adapter_values(network) for part, network in _networks(model).items()}
    _check_taken(file, tensors, {name: value for values in attached.values() for name, value in values.items()})
    for warning in [] if next(model.network.parameters()).is_meta else caught:  # of values that have no place there
        logger.warning("%s: %s", file, warning.message)
    return frozenset(part for part, values in attached.items() if values)


def unload_lora_file(model: ModelFamily) -> None:
    """Take off what ``load_lora_file`` attached; nothing is fine too."""
    model.pipeline.unload_lora_weights()


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a LoRA, it cannot be read as safetensors ({error})") from error
    if not tensors:
        raise UserError(f"{file}: not a LoRA, it holds no tensors")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{file}: {name} holds values that are not finite; the LoRA is damaged")
    return tensors


def _load(model: ModelFamily, file: Path, tensors: Mapping[str, Tensor]) -> None:
    network = cast(Any, model.network)
    if all(name.startswith(PEFT_PREFIX) for name in tensors):
        own = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        network.load_lora_adapter(own, prefix=None, adapter_name=ADAPTER, metadata=_peft_settings(file))
    elif {name.partition(".")[0] for name in tensors} <= {name for name, _ in model.network.named_children()}:
        # as the network's own save_lora_adapter writes it
        place = {"weight_name": file.name, "use_safetensors": True}
        network.load_lora_adapter(file.parent, prefix=None, adapter_name=ADAPTER, **place)
    else:
        model.pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=ADAPTER, use_safetensors=True)


def _peft_settings(file: Path) -> dict[str, Any]:
    """Return what peft keeps beside its weights, without which their strength is not known."""
    path = file.with_name(PEFT_SETTINGS_FILE)
    if not path.is_file():
        raise ValueError(f"it is peft's, and {PEFT_SETTINGS_FILE}, which says its strength, is not beside it")
    known = LoraConfig.__dataclass_fields__
    settings = json.loads(path.read_text())
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{PEFT_SETTINGS_FILE} is of {settings.get('peft_type')}, which is no LoRA")
    return {name: value for name, value in settings.items() if name in known}


def _networks(model: ModelFamily) -> dict[str, nn.Module]:
    parts = {name: part for name, part in model.pipeline.components.items() if name.startswith("text_encoder")}
    return {name: part for name, part in parts.items() if part is not None} | {model.lora_prefix: model.network}


def _adapter_values(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in network.named_parameters() if "lora_" in name}


def _check_taken(file: Path, tensors: Mapping[str, Tensor], attached: Mapping[str, Tensor]) -> None:
    """Check that the values attached are those of the file, each once: names differ between formats, values do not."""
    held = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    has_values = any(not value.is_meta for value in attached.values())  # else of a network without any: shapes alone
    filled = {name: value for name, value in attached.items() if not value.is_meta or not has_values}
    dtypes = {value.dtype for value in filled.values()}
    mark: Callable[[Tensor], Hashable] = _fingerprint if has_values else lambda tensor: tuple(tensor.shape)
    taken = Counter(mark(value) for value in filled.values())
    stray = []
    for name, tensor in held.items():
        match = next((key for dtype in dtypes if taken[key := mark(tensor.to(dtype))] > 0), None)
        if match is None:
            stray.append(name)
        else:
            taken[match] -= 1
    if len(stray) == len(held):
        raise UserError(
            f"{file}: not a LoRA that this base model can load: it has a place for none of its {len(held)} tensors "
            f"({_few(stray)}); {REMEDY}"
        )
    if stray:
        raise UserError(
            f"{file}: a part would be missing: of its {len(held)} tensors, {len(stray)} have no place in this base "
            f"model or are in a form that diffusers does not read ({_few(stray)}); {REMEDY}"
        )
    bare = [name for name, value in attached.items() if name not in filled or taken[mark(value)] > 0]
    if bare:
        raise UserError(f"{file}: a part is missing: it names layers that it has no values for ({_few(bare)})")
    updates = [value for name, value in filled.items() if "lora_B" in name or "lora_embedding_B" in name]
    if has_values and not any(value.any() for value in updates):
        logger.warning("%s: its update is exactly zero, so that it draws the base model's images", file)


def _fingerprint(tensor: Tensor) -> Hashable:
    return (tuple(tensor.shape), tensor.float().cpu().numpy().tobytes())


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more
