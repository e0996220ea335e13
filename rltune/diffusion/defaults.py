"""What a base model is sampled with where an experiment does not say, from a few small files of it."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from rltune.diffusion.families.base import Defaults, Described, ModelFamily
from rltune.diffusion.outline import INDEX, classes_of, read_index, remedy, short
from rltune.errors import UserError

SCHEDULER = "scheduler/scheduler_config.json"


def read_defaults(folder: Path, *, base: str) -> Defaults:
    """Return the defaults of the pipeline in ``folder``, whose weights need not be there.

    Args:
        folder: As ``find_pipeline`` returns it.
        base: What the user calls it.

    Raises:
        UserError: A file is missing or is not what it should be.
        UnknownNameError: The family is one that rltune does not know.
    """
    class_name, index = read_index(folder, base=base)
    family = cast(type[ModelFamily], classes_of(class_name, base=base)[0])
    network = f"{family.lora_prefix}/config.json"
    return family.defaults_of(Described(base, index, _read(folder, SCHEDULER, base), _read(folder, network, base)))


def fetch_defaults(base: str, revision: str | None) -> Defaults:
    """Return the defaults of a model on the hub that is not on this machine, from a few kilobytes of it; keeps nothing.

    What is in the cache in part would be taken for the whole model.

    Raises:
        UserError: There is no way to the hub, or no such pipeline on it.
    """
    from huggingface_hub import hf_hub_download

    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            hf_hub_download(base, INDEX, revision=revision, local_dir=folder)
            class_name, _ = read_index(folder, base=base)
            family = cast(type[ModelFamily], classes_of(class_name, base=base)[0])
            for file in (SCHEDULER, f"{family.lora_prefix}/config.json"):
                hf_hub_download(base, file, revision=revision, local_dir=folder)
        except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
            raise UserError(f"model.base: {base!r} cannot be asked what it is sampled with ({short(error)})") from error
        return read_defaults(folder, base=base)


def _read(folder: Path, file: str, base: str) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"model.base: {file} of {base!r} cannot be read ({short(error)}); {remedy(base)}") from error
