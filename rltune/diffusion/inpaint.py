"""What is given of an image, and how a chain keeps to it: the network is told, or it is blended in after each step.

B: images. C, H, W: latent channels, rows, columns; of images, three channels and rows and columns of pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rltune.canvas import Canvas
from rltune.diffusion.families.base import Conditioning
from rltune.diffusion.table import ChainTable
from rltune.errors import UserError


@dataclass(frozen=True)
class Given:
    """Images of which a part is to be drawn."""

    image_B3HW: Tensor
    """RGB in [0, 1], float32."""
    mask_B1HW: Tensor
    """1 where they are drawn, 0 where they are given, float32."""

    @property
    def masked_B3HW(self) -> Tensor:
        """The images with mid-grey where they are drawn, which is 0 in the range of an autoencoder."""
        return self.image_B3HW * (1 - self.mask_B1HW) + 0.5 * self.mask_B1HW

    def mask_at(self, height: int, width: int) -> Tensor:
        """Return the mask at the size of latents: of each place the first pixel counts, as in diffusers.

        Raises:
            UserError: Nothing is left to draw.
        """
        mask_B1HW = interpolate(self.mask_B1HW, size=(height, width))
        if bool((mask_B1HW.flatten(1).sum(1) == 0).any()):
            raise UserError(
                f"prompts: a mask is so thin that nothing of it is left at the {height} x {width} places of a latent; "
                "draw it wider"
            )
        return mask_B1HW


@runtime_checkable
class Encodes(Protocol):
    """A family whose autoencoder makes latents of images."""

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Encode RGB in [0, 1] -> clean latents (B, C, H, W) in the images' dtype, what ``decode`` takes.

        The mode of the autoencoder's distribution: a draw from it, which pipelines take, would be fresh noise each
        time. No gradient.
        """
        ...


@runtime_checkable
class Fills(Protocol):
    """A family whose network can be told what is given."""

    reads_given: bool
    """Whether this very network is; one of four channels is not."""

    def tell(self, given: Given) -> list[Conditioning]:
        """Return what the network is told of each image besides its prompt."""
        ...


def given_of(prompts: Sequence[str], size_px: tuple[int, int] | None, device: torch.device) -> Given | None:
    """Return what is given of images, None where prompts come without pictures.

    Raises:
        UserError: A file is gone, or is not what it was.
    """
    canvases = [prompt for prompt in prompts if isinstance(prompt, Canvas)]
    if not canvases:
        return None
    assert size_px is not None
    assert len(canvases) == len(prompts)
    images, masks = zip(*(canvas.read(*size_px) for canvas in canvases), strict=True)
    image_B3HW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device).float() / 255
    return Given(image_B3HW, torch.from_numpy(np.stack(masks))[:, None].to(device).float())


def told(model: object, given: Given) -> list[Conditioning] | None:
    """Return what the network is told of each image, None where it is one that cannot be."""
    return model.tell(given) if isinstance(model, Fills) and model.reads_given else None


@dataclass(frozen=True)
class Blend:
    """The given part of latents, put in after each step as a state of the forward process with one and the same noise.

    x' = m x + (1 - m) (signal clean + noise n), Blended Latent Diffusion (arXiv:2206.02779) as diffusers' inpainting
    pipelines have it for networks of four channels: affine in x, so that what is known of the chain holds of the part
    that is drawn. What the last step leaves is given clean.
    """

    mask_B1HW: Tensor
    clean_BCHW: Tensor
    noise_BCHW: Tensor
    levels: tuple[tuple[float, float], ...]
    """Signal and noise of what each step leaves."""

    def after(self, step: int, x_BCHW: Tensor) -> Tensor:
        """Return what a step leaves, with the given part in it."""
        signal, noise = self.levels[step]
        return self._with(signal * self.clean_BCHW + noise * self.noise_BCHW, x_BCHW)

    def clean(self, x_BCHW: Tensor) -> Tensor:
        """Return a clean prediction with the given part in it."""
        return self._with(self.clean_BCHW, x_BCHW)

    def starting(self, step: int) -> "Blend":
        """Return that of the steps ``step`` and later."""
        return replace(self, levels=self.levels[step:])

    def _with(self, given_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        return (1 - self.mask_B1HW) * given_BCHW + self.mask_B1HW * x_BCHW


@torch.no_grad()
def blend_of(model: object, given: Given, noise_BCHW: Tensor, table: ChainTable) -> Blend:
    """Return how a chain that starts from ``noise_BCHW``, standard normal, keeps to what is given.

    Raises:
        UserError: The model's autoencoder makes no latents of images.
    """
    check_encodes(model)
    assert isinstance(model, Encodes)
    clean_BCHW = model.encode(given.image_B3HW.to(noise_BCHW)).to(noise_BCHW)
    levels = [(float(table.signal_U[k]), float(table.noise_U[k])) for k in range(1, table.num_steps)]
    mask_B1HW = given.mask_at(*noise_BCHW.shape[-2:]).to(noise_BCHW)
    return Blend(mask_B1HW, clean_BCHW, noise_BCHW.detach(), (*levels, (1.0, 0.0)))


def check_encodes(model: object) -> None:
    """Refuse a model that cannot take a given part.

    Raises:
        UserError: Its autoencoder makes no latents of images.
    """
    if not isinstance(model, Encodes) and not (isinstance(model, Fills) and model.reads_given):
        kind = type(getattr(model, "pipeline", model)).__name__
        raise UserError(
            f"task: inpaint needs a base model whose images can be encoded, which rltune does not know of {kind}; take "
            "one of another family, or task: text_to_image"
        )
