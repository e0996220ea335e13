"""Bind prompts and guidance to a model: the denoiser the chain runs, and the prompt embeddings it needs.

B: images. L, D: text tokens and width. C, H, W: latent channels, rows, columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rltune.diffusion.chain import Denoiser
from rltune.diffusion.families.base import ModelFamily


class PromptEmbeddings:
    """Embeddings of prompts, each computed once and kept on the CPU."""

    def __init__(self, model: ModelFamily) -> None:
        self._model = model
        self._cache: dict[str, Tensor] = {}

    def add(self, prompts: Sequence[str]) -> None:
        """Embed the prompts that are new, in one stay of the text encoder on the device."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        if missing:
            self._cache.update(zip(missing, self._model.encode_prompts(missing), strict=True))

    def get(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """Return ``(B, L, D)`` float32 on ``device``."""
        self.add(prompts)
        return torch.stack([self._cache[prompt] for prompt in prompts]).to(device)


def guided_denoiser(model: ModelFamily, text_BLD: Tensor, negative_1LD: Tensor, *, guidance_scale: float) -> Denoiser:
    """Return the network with classifier-free guidance (arXiv:2207.12598): f_neg + g (f_text - f_neg).

    Gradient flows through both branches. At ``guidance_scale`` 1 the negative branch cancels and is not run.
    """
    if guidance_scale == 1.0:
        return lambda x_BCHW, t: model.predict(x_BCHW, t, text_BLD)
    both_2BLD = torch.cat([negative_1LD.expand_as(text_BLD), text_BLD])

    def denoise(x_BCHW: Tensor, t: Tensor) -> Tensor:
        negative_BCHW, text_BCHW = model.predict(torch.cat([x_BCHW, x_BCHW]), t, both_2BLD).chunk(2)
        return negative_BCHW + guidance_scale * (text_BCHW - negative_BCHW)

    return denoise


def decode_images(model: ModelFamily, x_BCHW: Tensor, *, use_checkpoint: bool) -> Tensor:
    """Decode x_0 -> RGB in [0, 1] (B, 3, height, width); with checkpointing nothing but x_0 is stored for backward."""
    if use_checkpoint and x_BCHW.requires_grad:
        decoded: Tensor = checkpoint(model.decode, x_BCHW, use_reentrant=False, preserve_rng_state=False)
        return decoded
    return model.decode(x_BCHW)
