"""Stable Diffusion's and SDXL's inpainting pipelines: networks that are told the mask and the latents of what is given.

B: images. C, H, W: latent channels, rows, columns.
"""

from typing import Any

import torch
from torch import Tensor

from rltune.diffusion.families.base import FAMILIES, Conditioning, TextBatch
from rltune.diffusion.families.sdxl import StableDiffusionXL
from rltune.diffusion.families.stable_diffusion import StableDiffusion
from rltune.diffusion.inpaint import Encodes, Given

TOLD = "given"
"""Name of mask and latents among what a prompt tells the network."""


def reads_given(pipeline: Any) -> bool:
    """Return whether a network has channels beside the latents', nine in all; one of four is blended."""
    return int(pipeline.unet.config.in_channels) > int(pipeline.vae.config.latent_channels)


def tell(model: Encodes, given: Given, height: int, width: int) -> list[Conditioning]:
    """Return the mask at the latents' size and the latents of the image without what is to be drawn, (1 + C, H, W)."""
    mask_B1HW = given.mask_at(height, width)
    return [{TOLD: row} for row in torch.cat([mask_B1HW, model.encode(given.masked_B3HW)], dim=1)]


def with_told(x_BCHW: Tensor, text: TextBatch) -> Tensor:
    """Return the network's input: latents, mask, and latents of what is given."""
    if TOLD not in text:
        return x_BCHW
    return torch.cat([x_BCHW, text[TOLD].to(x_BCHW.dtype)], dim=1)


@FAMILIES.register("StableDiffusionInpaintPipeline")
class StableDiffusionInpaint(StableDiffusion):
    """Stable Diffusion's inpainting models, of nine channels or of four.

    Images begin at pure noise (``strength`` 1.0, the pipeline's default) and are decoded as a whole: as in the
    pipeline, what is given comes back through the autoencoder, and is not pasted over the result.
    """

    @property
    def reads_given(self) -> bool:
        """Whether the network is told what is given."""
        return reads_given(self.pipeline)

    def tell(self, given: Given) -> list[Conditioning]:
        """Return mask and latents of what is given, of each image."""
        _, height, width = self.latent_shape(*given.image_B3HW.shape[-2:])
        return tell(self, given, height, width)

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """Return (C, H, W) of what is drawn.

        Raises:
            ValueError: A side is not a multiple of the autoencoder's downsampling.
        """
        _, height, width = super().latent_shape(height_px, width_px)
        return int(self.pipeline.vae.config.latent_channels), height, width

    def predict(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        """Run the UNet on latents and on what it is told -> (B, C, H, W)."""
        rest = {name: value for name, value in text.items() if name != TOLD}
        return super().predict(with_told(x_BCHW, text), t, rest)


@FAMILIES.register("StableDiffusionXLInpaintPipeline")
class StableDiffusionXLInpaint(StableDiffusionXL):
    """SDXL's inpainting models, likewise; the pipeline's own default ``strength`` is 0.9999, ours is 1."""

    def __init__(self, pipeline: Any) -> None:
        if pipeline.config.requires_aesthetics_score:
            raise ValueError("a refiner, which is told an aesthetic score, is no model that images begin with")
        super().__init__(pipeline)

    @property
    def reads_given(self) -> bool:
        """Whether the network is told what is given."""
        return reads_given(self.pipeline)

    @property
    def num_channels(self) -> int:
        """C, of what is drawn."""
        return int(self.pipeline.vae.config.latent_channels)

    def tell(self, given: Given) -> list[Conditioning]:
        """Return mask and latents of what is given, of each image."""
        _, height, width = self.latent_shape(*given.image_B3HW.shape[-2:])
        return tell(self, given, height, width)

    def _run(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        return super()._run(with_told(x_BCHW, text), t, text)

    def _native_size(self) -> tuple[int, int]:
        side = int(self.pipeline.unet.config.sample_size) * int(self.pipeline.vae_scale_factor)
        return side, side
