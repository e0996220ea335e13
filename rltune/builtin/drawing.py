"""Draws pictures from the networks while they are still in memory, before any file is written."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from rltune.builtin.denoiser import Denoiser
from rltune.builtin.networks import LATENT_CHANNELS, LATENT_SIZE, make_scheduler
from rltune.builtin.tokenizer import encode

BATCH = 32


@torch.no_grad()
def sample(
    autoencoder: AutoencoderKL,
    denoiser: Denoiser,
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    *,
    generator: torch.Generator,
    device: torch.device,
    num_steps: int = 20,
    guidance_scale: float = 3.0,
) -> Tensor:
    """DDIM samples of ``prompts``, ``(B, 3, 64, 64)`` uint8 RGB on the CPU."""
    scheduler = make_scheduler()
    scheduler.set_timesteps(num_steps)
    images = []
    for first in range(0, len(prompts), BATCH):
        batch = list(prompts[first : first + BATCH])
        text_2BLD = denoiser.text_encoder(encode(tokenizer, [""] * len(batch) + batch).to(device))[0]
        shape = (len(batch), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
        x_BCHW = torch.randn(shape, generator=generator).to(device)
        for t in scheduler.timesteps:
            free_BCHW, text_BCHW = denoiser.unet(torch.cat([x_BCHW, x_BCHW]), t, text_2BLD).sample.chunk(2)
            velocity_BCHW = free_BCHW + guidance_scale * (text_BCHW - free_BCHW)
            x_BCHW = scheduler.step(velocity_BCHW, t, x_BCHW).prev_sample
        images.append(to_bytes(autoencoder.decode(x_BCHW).sample))
    return torch.cat(images)


def to_bytes(images_B3HW: Tensor) -> Tensor:
    """[-1, 1] -> uint8 on the CPU."""
    return ((images_B3HW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
