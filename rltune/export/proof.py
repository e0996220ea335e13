"""Proof of an export: the files, loaded into a fresh base model, are the trained adapter. The same for every format.

B: images. H, W: rows and columns of an image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import layer_update
from rltune.errors import RunError, UserError
from rltune.export.base import MAGNITUDE, Adapter, ExportFormat
from rltune.export.conditioning import Mixed

TOLERANCE = 2e-3
"""Greatest difference of a reloaded image, RGB in [0, 1], half of 1/255: what 8 bits can show."""
EFFECT_TOLERANCE = 0.05
"""Greatest root mean square difference of reloaded images, as a share of what the adapter does to the base model's."""
ROUNDING = 2e-5
"""Root mean square difference of float32 images, RGB in [0, 1], below which nothing is said of an effect: a chain and a
decoder whose sums are taken in another order differ by up to a tenth of it. The weights say it then."""
UPDATE_TOLERANCE = 1e-4
"""Greatest difference of a layer's update, as a share of it: float32 products of up to a few thousand terms."""
UNFIT = "it is not fit for use"


@dataclass(frozen=True)
class Trained:
    """What an export has to be equal to. Images are float32, RGB in [0, 1]."""

    adapter: Adapter | Mixed
    draw: Callable[[ModelFamily], Tensor]
    """Images of a model, the same prompts and noise each time."""
    base_B3HW: Tensor
    """The base model's images."""
    images_B3HW: Tensor
    """The trained adapter's."""


@dataclass(frozen=True)
class Reload:
    """What files that were loaded again give, in float32. Images are RGB in [0, 1]."""

    difference: float
    """Greatest difference of an image from the trained adapter's."""
    effect: float
    """Greatest difference of the trained adapter's images from the base model's."""


def check_reload(form: ExportFormat[Any], folder: Path, fresh: ModelFamily, trained: Trained) -> Reload:
    """Load an export into a fresh float32 pipeline and compare layers and images with the trained adapter's.

    Every tensor of a file must be taken and every layer filled; each layer's update must be the trained one; images
    must agree, and differ from the base model's as the trained adapter's do. So a file that binds to nothing, or to a
    part, fails however small its effect is.

    Args:
        form: The format that wrote it.
        folder: Where it is.
        fresh: The base model in float32, without adapters; it has them afterwards.
        trained: What it has to be.

    Raises:
        RunError: It is not the trained adapter.
    """
    where = f"{folder}: reloaded with {form.reader}"
    try:
        if isinstance(trained.adapter, Mixed):
            _check_numbers(form, folder, fresh, trained.adapter, where)
        else:
            _check_updates(form, folder, fresh, trained.adapter, where)
    except UserError as error:
        raise RunError(f"{error}; {UNFIT}") from error
    with torch.no_grad():
        change_B3HW = trained.draw(fresh) - trained.images_B3HW
    effect_B3HW = trained.images_B3HW - trained.base_B3HW
    difference, effect = float(change_B3HW.abs().max()), float(effect_B3HW.abs().max())
    if not difference <= TOLERANCE:
        raise RunError(
            f"{where} it gives other images than the trained adapter, by {difference:.3g} where {TOLERANCE:g} is "
            f"allowed; {UNFIT}"
        )
    error_rms, effect_rms = (float(images.square().mean().sqrt()) for images in (change_B3HW, effect_B3HW))
    if error_rms > EFFECT_TOLERANCE * effect_rms + ROUNDING:
        raise RunError(
            f"{where} its images differ from the trained adapter's by {error_rms:.2g}, and those from the base "
            f"model's by no more than {effect_rms:.2g}; {UNFIT}"
        )
    return Reload(difference, effect)


@torch.no_grad()
def _check_updates(form: ExportFormat[Any], folder: Path, fresh: ModelFamily, adapter: Adapter, where: str) -> None:
    state = adapter.state
    layers = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
    # DoRA's update depends on the weight, which a format may put its own in the place of
    bases = {name: _weight(fresh, name).clone() for name in layers if f"{name}{MAGNITUDE}" in state}
    for name, update in form.load(fresh, folder):
        if name not in layers:
            raise RunError(f"{where} it changes {name}, which was not trained; {UNFIT}")
        layers.remove(name)
        a, b = (state[f"{name}.lora_{factor}.weight"].to(update) for factor in "AB")
        magnitude = state.get(f"{name}{MAGNITUDE}")
        trained = layer_update(bases.get(name, update), a, b, scale=adapter.scale, magnitude=magnitude)
        error = float((update - trained).norm())
        if not error <= UPDATE_TOLERANCE * float(trained.norm()):
            raise RunError(
                f"{where} its update of {name} is another than the trained one, by {error:.2g} of "
                f"{float(trained.norm()):.2g}; {UNFIT}"
            )
    if layers:
        raise RunError(f"{where} it leaves out {', '.join(sorted(layers)[:3])}; {UNFIT}")


def _check_numbers(form: ExportFormat[Any], folder: Path, fresh: ModelFamily, adapter: Mixed, where: str) -> None:
    for name, tensor in form.load(fresh, folder):
        if not torch.equal(tensor, adapter.values.state[name]):
            raise RunError(f"{where} its {name} are others than the trained ones; {UNFIT}")


def _weight(fresh: ModelFamily, name: str) -> Tensor:
    layer: Any = fresh.network.get_submodule(name)
    weight: Tensor = layer.weight
    return weight.data


def rounding_of(form: ExportFormat[Any], folder: Path, fresh: ModelFamily, trained: Trained) -> float:
    """Load an export into a pipeline of another number format and return how far its images are from float32's.

    The greatest difference, RGB in [0, 1]; NaN where an image is not finite. That is the number format's doing.
    """
    form.load(fresh, folder)
    with torch.no_grad():
        return float((trained.draw(fresh).float() - trained.images_B3HW).abs().max())
