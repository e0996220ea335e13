"""A base model without its weights: all that its configuration files say, in a second and in little memory."""

import inspect
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from rltune.assets import BUILTIN_PIPELINE_DIR
from rltune.diffusion.families.base import FAMILIES, ModelFamily
from rltune.diffusion.single_file import ENDING, holds, published_config, read_header
from rltune.errors import RltuneError, UnknownNameError, UserError, gated_remedy

INDEX = "model_index.json"
WEIGHTS = ("*.safetensors", "*.bin")
UNREAD = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that no part of rltune reads."""
RENAMED = {"Lumina2Text2ImgPipeline": "Lumina2Pipeline"}
"""What published pipelines call their class -> what diffusers calls it now."""


def find_pipeline(base: str, revision: str | None = None, config: str | None = None) -> Path | None:
    """Return the folder of ``builtin``, of a pipeline here, or of one in the Hugging Face cache; asks no network.

    Of a checkpoint in one file, it is the folder of the pipeline that has its settings. None where ``base`` may be the
    name of a model on the hub that is not in the cache.

    Args:
        base: What the user calls it.
        revision: Of a model on the hub.
        config: What the user names for the settings of a checkpoint in one file.

    Raises:
        UserError: It is a path, and there is no pipeline at it, or the settings of a file are not on this machine.
    """
    folder = BUILTIN_PIPELINE_DIR if base == "builtin" else Path(base)
    if folder.is_file() and folder.suffix == ENDING:
        return _find_config(folder, config)
    if config is not None:
        what = "is for the settings of a checkpoint in one file, which model.base is not"
        raise UserError(f"model.config: {what}, got {config!r}; leave it out")
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise UserError(f"model.base: the folder has no {INDEX}, got {base!r}; give that of a diffusers pipeline")
        return folder
    if folder.exists() or not may_be_hub_id(base):
        what = "this is a file" if folder.exists() else "no such folder"
        raise UserError(
            f"model.base: {what}, got {base!r}; give a pipeline's folder, a {ENDING} checkpoint, builtin, or a hub's "
            "OWNER/NAME"
        )
    return _cached(base, revision)


def _cached(name: str, revision: str | None = None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, INDEX, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _find_config(file: Path, config: str | None) -> Path:
    """Return the folder with the settings of a checkpoint in one file: the one named, or what diffusers would take."""
    try:
        tensors = read_header(file)
    except ValueError as error:
        raise UserError(f"model.base: {error}; copy or fetch {str(file)!r} anew") from error
    where = config or published_config(tensors)
    if (Path(where) / INDEX).is_file():
        return Path(where)
    if config is not None and (Path(config).exists() or not may_be_hub_id(config)):
        raise UserError(f"model.config: no folder with a {INDEX}, got {config!r}; give that of a diffusers pipeline")
    found = _cached(where)
    if found is None:
        fetch = f"'rltune models fetch {config or shlex.quote(str(file))}'"
        raise UserError(
            f"model.{'config' if config else 'base'}: {str(file)!r} has weights alone, and its settings and "
            f"tokenizers, those of {where}, are not on this machine; run {fetch}, or name the folder of a pipeline of "
            "its kind as model.config"
        )
    return found


def may_be_hub_id(base: str) -> bool:
    """Return whether a text may be the name of a model on the Hugging Face hub, rather than a path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, and not in __all__

    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return base.count("/") == 1 and not base.startswith(".")


def load_outline(folder: Path, *, base: str, drop: Sequence[str] = ()) -> ModelFamily:
    """Return the family of the pipeline in ``folder`` with networks that have no values, and without text encoders.

    It knows sizes, layers, schedule and tokenizer, and draws nothing.

    Args:
        folder: As ``find_pipeline`` returns it.
        base: What the user calls it, for messages; of a checkpoint in one file, its path.
        drop: Components to do without.

    Raises:
        UserError: A file is missing or is not what it should be, or a component cannot be done without.
        UnknownNameError: The family is one that rltune does not know.
    """
    class_name, index = read_index(folder, base=base)
    family, pipeline_class = classes_of(class_name, base=base)
    takes = inspect.signature(pipeline_class.__init__).parameters
    parts = left_out(family, takes, drop)
    settings = {name: index[name] for name in takes.keys() & index.keys() - parts.keys()}
    parts |= {name: value for name, value in settings.items() if isinstance(value, bool | int | float | str)}
    held = read_header(Path(base)) if Path(base).is_file() else {}
    for name in takes.keys() - parts.keys():
        library, kind = kind_of(index.get(name))
        try:
            parts |= {name: _part(folder / name, library, kind, held)} if kind is not None else {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
            raise UserError(
                f"model.base: {name} of {base!r} cannot be read ({short(error)}); {remedy(base)}"
            ) from error
    try:
        return family(pipeline_class(**parts))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{base!r} is no whole {class_name} ({short(error)})"
        raise UserError(f"model.base: {what}; {remedy(base)}") from error


def left_out(family: Any, takes: Iterable[str], drop: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a pipeline's class is given in the place of components that are not loaded.

    Args:
        family: Of the model.
        takes: Names of the arguments of the pipeline's class.
        drop: Components that the user does without; their tokenizers go, too.

    Raises:
        UserError: The family cannot do without one.
    """
    parts: dict[str, Any] = {name: None for name in UNREAD if name in takes}
    parts |= {"requires_safety_checker": False} if "requires_safety_checker" in takes else {}
    able = family.droppable
    for name in drop:
        if name not in able:
            remedy = f"it can do without {', '.join(able)}" if able else "leave it out, this model needs all it has"
            raise UserError(f"model.drop: a {family.__name__} cannot do without its {name}, got {name!r}; {remedy}")
        parts |= {name: None, name.replace("text_encoder", "tokenizer"): None}
    return parts


def network_kinds(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return name -> class of the components of an index that have weights."""
    kinds: dict[str, Any] = {}
    for name, entry in index.items():
        library, kind = kind_of(entry)
        if kind is not None and library in ("diffusers", "transformers"):
            found = getattr(diffusers if library == "diffusers" else transformers, kind, None)
            kinds |= {name: found} if isinstance(found, type) and issubclass(found, nn.Module) else {}
    return kinds


def read_index(folder: Path, *, base: str) -> tuple[str, dict[str, Any]]:
    """Return the class name and the components that a pipeline's index names.

    Raises:
        UserError: It is cut, or not what it should be.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return str(index["_class_name"]), index
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"model.base: {INDEX} of {base!r} is not whole ({short(error)}); {remedy(base)}") from error


def classes_of(class_name: str, *, base: str) -> tuple[Callable[..., ModelFamily], Any]:
    """Return the family and diffusers' class of a pipeline that calls its class so, perhaps by an old name.

    Raises:
        UnknownNameError: There is no such family; the message lists those there are.
    """
    name = current_name(class_name)
    try:
        return FAMILIES.get(name), getattr(diffusers, name)
    except UnknownNameError as error:
        known = ", ".join(FAMILIES.names())
        raise UnknownNameError(
            f"model.base: {base!r} is a {class_name}, which rltune cannot train; give one of {known}"
        ) from error


def current_name(class_name: str) -> str:
    """Return what diffusers calls a pipeline's class that an index names."""
    return RENAMED.get(class_name, class_name)


def find_variant(folder: Path, index: dict[str, Any]) -> str | None:
    """Return the variant that weights are there in alone, such as ``fp16``; None where the usual files are.

    Files are named ``model.safetensors`` or, of a variant, ``model.fp16.safetensors``.
    """
    for name in index.keys() - set(UNREAD):
        files = [path for ending in WEIGHTS for path in (folder / name).glob(ending)]
        marks = {mark for path in files for mark in path.name.split(".")[1:-1] if "-of-" not in mark}
        if files and all(len(path.name.split(".")) > 2 for path in files) and len(marks) == 1:
            return marks.pop()
    return None


def kind_of(entry: Any) -> tuple[str, str | None]:
    """Read an entry of the index: library and class, None where there is no such component."""
    library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    return str(library), kind if isinstance(kind, str) and library else None


def _part(folder: Path, library: str, kind: str, held: Mapping[str, Tensor]) -> Any:
    if library not in ("diffusers", "transformers"):
        return None
    found: Any = getattr(diffusers if library == "diffusers" else transformers, kind)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    is_network = isinstance(found, type) and issubclass(found, nn.Module)
    if not is_network:
        return found.from_pretrained(str(folder))
    if not held or not holds(held, folder.name, found):
        check_weights(folder)
    if library == "transformers":
        return nn.Module()
    with torch.device("meta"):
        return found.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def check_weights(folder: Path) -> None:
    """Check that a component's weights are there and as long as they should be; reads no values.

    Raises:
        FileNotFoundError: There are none, or an index names a part that is not there.
        ValueError: A file is cut.
    """
    files = [path for ending in WEIGHTS for path in folder.glob(ending)]
    if not files:
        raise FileNotFoundError("it has no weights")
    for path in folder.glob("*.index.json"):
        for name in set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{name}, a part of its weights, is missing")
    for path in files:
        if path.suffix == ENDING:
            read_header(path)


def remedy(base: str, error: BaseException | None = None) -> str:
    """Return what to do about weights that are not whole or that the hub did not give; for a path, no download is."""
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        if isinstance(error, GatedRepoError):
            return gated_remedy(base)
        error = error.__cause__ or error.__context__
    if Path(base).is_file():
        return "copy the file anew, or name the folder of a pipeline of its kind as model.config"
    is_folder = Path(base).is_dir() or not may_be_hub_id(base)
    if is_folder:
        return "copy the folder anew, whole"
    return f"{'its download was broken off, ' if _is_incomplete(base) else ''}run 'rltune models fetch {base}'"


def _is_incomplete(base: str) -> bool:
    """Whether the hub's cache has part of a file of a model."""
    from huggingface_hub import constants

    blobs = Path(constants.HF_HUB_CACHE) / f"models--{base.replace('/', '--')}" / "blobs"
    return any(blobs.glob("*.incomplete"))


def short(error: Exception) -> str:
    """Return an error's kind and first line; of one of rltune's own, what it says."""
    if isinstance(error, RltuneError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
