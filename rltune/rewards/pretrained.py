"""Networks that transformers loads: from a folder, or under their id on the Hugging Face hub from the local cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rltune.errors import RunError, UserError
from rltune.rewards.weights import WeightsFile, format_size, is_offline

Loaded = TypeVar("Loaded")
CONFIG = "config.json"
NETWORK = "model.safetensors"
TOKENIZERS = (("vocab.json", "merges.txt"), ("tokenizer.json",))
"""A tokenizer of CLIP's is in these files, as published and as transformers 5 saves it."""
NAMED_KEYS = 3
"""How many offending keys a message names."""


def find_folder(reward: str, model: str, files: tuple[WeightsFile, ...]) -> Path:
    """Return the folder that holds a model in the layout of transformers, fetching the published one if it can.

    Args:
        reward: Name of the reward, for messages.
        model: A folder, or an id on the hub.
        files: The published files, all of one repository; under another id, files of the same names are looked for.

    Raises:
        UserError: ``model`` is not a name.
        RunError: Files are not on this machine; the message names them and says how to put them there.
    """
    if not isinstance(model, str) or not model:
        raise UserError(f"reward {reward!r}: model must be an id on the Hugging Face hub or a folder, got {model!r}")
    folder = Path(model).expanduser()
    if folder.is_dir():
        # Only these two: a tokenizer comes in one file or in several.
        lacking = [name for name in (CONFIG, NETWORK) if not (folder / name).is_file()]
        if lacking:
            raise RunError(f"reward {reward!r}: {folder} has no {' and no '.join(lacking)}; model must be a folder of "
                           f"{files[0].repo} or of a model like it")  # fmt: skip
        return folder
    if model != files[0].repo:
        return _cached_folder(reward, model, files)
    missing = [file for file in files if file.find() is None]
    try:
        if missing and is_offline():
            raise RunError("HF_HUB_OFFLINE is set")
        paths = [file.fetch() for file in files]
    except RunError as error:
        size = format_size(sum(file.size_mb for file in missing))
        raise RunError(
            f"reward {reward!r}: {', '.join(file.file for file in missing)} of https://huggingface.co/{model} ({size}, "
            f"{files[0].licence}) not on this machine ({error}); run 'rltune models fetch {reward}' where there is a "
            "network, or put the files into a folder here and give it as the option 'model'"
        ) from error
    return paths[0].parent  # files of one snapshot lie beside each other


def _cached_folder(reward: str, model: str, files: tuple[WeightsFile, ...]) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = {file.file: try_to_load_from_cache(model, file.file) for file in files}
    except HFValidationError as error:
        raise UserError(
            f"reward {reward!r}: model must be a folder or an id on the Hugging Face hub, got {model!r}"
        ) from error
    missing = [name for name, path in found.items() if not isinstance(path, str)]
    if missing:
        raise RunError(
            f"reward {reward!r}: {model!r} is no folder, and as a model on the Hugging Face hub it is not on this "
            f"machine, missing are {', '.join(missing)}; run 'hf download {model}' where there is a network"
        )
    return Path(str(found[NETWORK])).parent


def load_network(reward: str, kind: Any, folder: Path) -> Any:
    """Return the network of class ``kind`` (of transformers) in ``folder``, every weight of it from the file.

    Keys of the file that the network has no place for are left: older files hold buffers that are now computed.

    Raises:
        UserError: The files are not such a model, or not whole.
    """
    expected = kind.config_class.model_type
    found = _loading(reward, folder, lambda: json.loads((folder / CONFIG).read_text())["model_type"])
    if found != expected:  # transformers would build one of its own, full size, with random weights
        raise UserError(f"reward {reward!r}: model must be of type {expected!r}, and that of {folder} is {found!r}")
    # transformers fills missing weights with random ones, and leaves those of another shape out, with a warning alone.
    network, info = _loading(
        reward,
        folder,
        lambda: kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        ),
    )
    bad = [f"no {key}" for key in sorted(info["missing_keys"])]
    bad += [f"{key} of another shape" for key in sorted(str(entry[0]) for entry in info["mismatched_keys"])]
    if bad:
        more = f" and {len(bad) - NAMED_KEYS} more" if len(bad) > NAMED_KEYS else ""
        raise UserError(
            f"reward {reward!r}: {folder / NETWORK} is not a {kind.__name__} of its {CONFIG}: it has "
            f"{', '.join(bad[:NAMED_KEYS])}{more}"
        )
    return network


def load_tokenizer(reward: str, kind: Any, folder: Path) -> Any:
    """Return the tokenizer of class ``kind`` (of transformers) in ``folder``.

    Raises:
        UserError: There is none, or it is not whole.
    """
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):  # else it has no words at all
        raise UserError(f"reward {reward!r}: {folder} has no tokenizer; it must hold vocab.json and merges.txt")
    return _loading(reward, folder, lambda: kind.from_pretrained(folder, local_files_only=True))


def _loading(reward: str, folder: Path, load: Callable[[], Loaded]) -> Loaded:
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"reward {reward!r}: {folder} does not load ({reason}); are its files whole?") from error
