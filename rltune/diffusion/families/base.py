"""What a family of diffusion models must offer; one file a family registers itself here by its pipeline's class name.

B: images. P: prompts. L, D: text tokens and width. C, H, W: latent channels, rows, columns.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rltune.diffusion.table import ChainTable
from rltune.registry import Registry

ENCODE_BATCH = 64
"""Prompts that a text encoder embeds at a time."""


class ModelFamily(Protocol):
    """A loaded text-to-image pipeline, seen as the four things the chain needs."""

    pipeline: Any
    """The diffusers pipeline itself, for saving adapters."""
    lora_prefix: str
    """Component the adapters belong to in a LoRA file: ``unet`` or ``transformer``."""
    size_px: tuple[int, int]
    """Height and width the model was trained for."""

    @property
    def network(self) -> nn.Module:
        """The denoising network that adapters are attached to."""
        ...

    def read_table(self, *, num_steps: int, eta: float) -> ChainTable:
        """Return the coefficient table of this pipeline's sampler."""
        ...

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents of an image; raises ``ValueError`` for a size the autoencoder cannot make."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts -> ``(P, L, D)`` on the CPU, in the text encoder's own dtype, no gradient.

        Moves the text encoder as needed, and runs it on ``ENCODE_BATCH`` prompts at a time, in order.
        """
        ...

    def cut_off(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return prompt -> the end of it that the text encoder does not read, for those that are too long."""
        ...

    def predict(self, x_BCHW: Tensor, t: Tensor, text_BLD: Tensor) -> Tensor:
        """Run the network once -> its raw output (B, C, H, W), float32. Differentiable."""
        ...

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """Decode clean latents -> RGB in [0, 1], (B, 3, height, width), float32. Differentiable where not clamped."""
        ...

    def to(self, device: torch.device) -> None:
        """Move the network and the image decoder to ``device``."""
        ...


FAMILIES: Registry[ModelFamily] = Registry("pipeline class", "rltune.diffusion.families")
"""Built from a pipeline of the class they are registered under."""
