"""How much a LoRA does, as two figures that compare across ranks and models.

Users work them out by hand when a LoRA seems to do nothing: the norm of B A says how far the weights move, and the
images whether it shows.

B: images. H, W: rows and columns of an image.
"""

from dataclasses import dataclass
from math import sqrt

from torch import Tensor, nn

from rltune.diffusion.lora import adapted_weights, adapter_updates


@dataclass(frozen=True)
class Effect:
    """What a LoRA changes at strength 1."""

    update: float | None
    """Root mean square of what it adds to the weights of its layers, as a share of theirs; None where it adds nothing
    to any."""
    image: float
    """Mean change of a pixel's colour, RGB in [0, 1], of the sample images against the base model's."""

    def __str__(self) -> str:
        if self.update is None:
            return f"it moves pixels by {self.image:.2g}"
        return (
            f"its update is {self.update:.2g} of the weights (root mean square), and moves pixels by {self.image:.2g}"
        )


def effect_of(network: nn.Module, base_B3HW: Tensor, images_B3HW: Tensor) -> Effect:
    """Return what the active adapters of a network do.

    Args:
        network: With its adapters attached, in float32.
        base_B3HW: The base model's images, RGB in [0, 1].
        images_B3HW: Those with the adapters, from the same prompts and noise.
    """
    added = sum(float(update.double().square().sum()) for _, update in adapter_updates(network))
    held = sum(float(weight.double().square().sum()) for weight in adapted_weights(network))
    return Effect(sqrt(added / held) if held else None, float((images_B3HW - base_B3HW).abs().mean()))
