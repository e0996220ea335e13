"""A trained adapter as a LoRA file that diffusers loads at the right strength, proved by loading it again.

B: images. C, H, W: latent channels, rows, columns.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import adapter_updates, fold_scale, target_modules
from rltune.diffusion.lora_files import WEIGHT_FILE, load_lora_file
from rltune.errors import RunError, UserError

CARD_FILE = "rltune.json"
TOLERANCE = 2e-3
"""Greatest difference of a reloaded image, RGB in [0, 1], half of 1/255: what 8 bits can show."""
EFFECT_TOLERANCE = 0.05
"""Greatest root mean square difference of reloaded images, as a share of what the adapter does to the base model's."""
ROUNDING = 2e-5
"""Root mean square difference of float32 images, RGB in [0, 1], below which nothing is said of an effect: a chain and a
decoder whose sums are taken in another order differ by up to a tenth of it. The weights say it then."""
UPDATE_TOLERANCE = 1e-4
"""Greatest difference of a layer's update, as a share of it: float32 products of up to a few thousand terms."""
UNFIT = "the file is not fit for use"


@dataclass(frozen=True)
class Reload:
    """What a file that was loaded again gives, in float32. Images are RGB in [0, 1]."""

    difference: float
    """Greatest difference of an image from the trained adapter's."""
    effect: float
    """Greatest difference of the trained adapter's images from the base model's."""


def write_lora(
    model: ModelFamily, state: Mapping[str, Tensor], *, rank: int, alpha: float, targets: Any, folder: Path
) -> Path:
    """Write an adapter in diffusers' format, its scale alpha / rank folded into the weights, and return the file.

    Readers that ignore alpha (ComfyUI), those that take it as the rank, and those that read the metadata then agree.

    Args:
        model: A model of the adapter's family; only its class is used.
        state: Adapter weights, peft's key names.
        rank: Of the adapter.
        alpha: It was trained with.
        targets: Layers it was attached to, as in ``add_lora``.
        folder: Receives ``pytorch_lora_weights.safetensors``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefix = model.lora_prefix
    metadata = {"r": rank, "lora_alpha": rank, "target_modules": target_modules(targets), "init_lora_weights": True}
    model.pipeline.save_lora_weights(
        folder,
        **{
            f"{prefix}_lora_layers": {
                name: tensor.contiguous() for name, tensor in fold_scale(dict(state), scale=alpha / rank).items()
            },
            f"{prefix}_lora_adapter_metadata": metadata,
        },
    )
    path = folder / WEIGHT_FILE
    path.chmod(0o644)  # safetensors writes 0600, which another user cannot read
    return path


def check_adapter(state: Mapping[str, Tensor]) -> None:
    """Check that an adapter does something at all.

    Raises:
        RunError: Its update is exactly zero, or not finite.
    """
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise RunError(f"the adapter's {name} is not finite; lower the learning rate")
    if not any(tensor.any() for name, tensor in state.items() if ".lora_B." in name):
        raise RunError("the adapter is exactly zero, so that the LoRA would be the base model; was it trained?")


def check_reload(
    path: Path,
    fresh: ModelFamily,
    draw: Callable[[ModelFamily], Tensor],
    *,
    state: Mapping[str, Tensor],
    scale: float,
    base_B3HW: Tensor,
    expected_B3HW: Tensor,
) -> Reload:
    """Load the file into a fresh float32 pipeline and compare layers and images with the trained adapter's.

    Every tensor of the file must be taken and every layer filled; each layer's update must be the trained one; images
    must agree, and differ from the base model's as the trained adapter's do. So a file that binds to nothing, or to a
    part, fails however small its effect is.

    Args:
        path: The file.
        fresh: The base model in float32, without adapters; it has them afterwards.
        draw: Images of a model, the same prompts and noise each time.
        state: The trained adapter's weights, peft's key names.
        scale: alpha / rank of the trained adapter.
        base_B3HW: The base model's images.
        expected_B3HW: The trained adapter's.

    Raises:
        RunError: It is not the trained adapter.
    """
    try:
        load_lora_file(fresh, path)
    except UserError as error:
        raise RunError(f"{error}; {UNFIT}") from error
    _check_updates(path, fresh.network, state, scale)
    with torch.no_grad():
        change_B3HW = draw(fresh) - expected_B3HW
    effect_B3HW = expected_B3HW - base_B3HW
    difference, effect = float(change_B3HW.abs().max()), float(effect_B3HW.abs().max())
    if not difference <= TOLERANCE:
        raise RunError(
            f"{path}: reloaded with diffusers it gives other images than the trained adapter, by {difference:.3g} "
            f"where {TOLERANCE:g} is allowed; {UNFIT}"
        )
    error_rms, effect_rms = (float(images.square().mean().sqrt()) for images in (change_B3HW, effect_B3HW))
    if error_rms > EFFECT_TOLERANCE * effect_rms + ROUNDING:
        raise RunError(
            f"{path}: reloaded with diffusers its images differ from the trained adapter's by {error_rms:.2g}, and "
            f"those from the base model's by no more than {effect_rms:.2g}; {UNFIT}"
        )
    return Reload(difference, effect)


@torch.no_grad()
def _check_updates(path: Path, network: nn.Module, state: Mapping[str, Tensor], scale: float) -> None:
    layers = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
    for name, update in adapter_updates(network):  # one at a time: together they may be as large as the network
        if name not in layers:
            raise RunError(f"{path}: reloaded with diffusers it adapts {name}, which was not trained; {UNFIT}")
        layers.remove(name)
        a, b = (state[f"{name}.lora_{factor}.weight"].to(update) for factor in "AB")
        trained = scale * (b.flatten(1) @ a.flatten(1)).reshape(update.shape)  # of convolutions, B is 1 x 1
        error = float((update - trained).norm())
        if not error <= UPDATE_TOLERANCE * float(trained.norm()):
            raise RunError(
                f"{path}: reloaded with diffusers its update of {name} is another than the trained one, by {error:.2g} "
                f"of {float(trained.norm()):.2g}; {UNFIT}"
            )
    if layers:
        raise RunError(f"{path}: reloaded with diffusers it leaves out {', '.join(sorted(layers)[:3])}; {UNFIT}")


def rounding_of(path: Path, fresh: ModelFamily, draw: Callable[[ModelFamily], Tensor], expected_B3HW: Tensor) -> float:
    """Load the file into a pipeline of another number format and return how far its images are from float32's.

    The greatest difference, RGB in [0, 1]; NaN where an image is not finite. That is the format's doing.
    """
    load_lora_file(fresh, path)
    with torch.no_grad():
        return float((draw(fresh).float() - expected_B3HW).abs().max())


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write ``rltune.json``: where the LoRA comes from and what it scored."""
    (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")
