"""The denoiser and its text encoder, trained together by velocity prediction."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from rltune.builtin.networks import make_scheduler, make_text_encoder, make_unet
from rltune.builtin.tokenizer import encode
from rltune.builtin.workshop import Workshop, autocast, train

STAGE = "denoiser"
CYCLES = (9_000, 15_000)
"""Steps of each cycle of the learning rate; the second starts warm from the first's decayed end (arXiv:1608.03983)."""
BATCH = 32
PEAK_LR = 1e-3
TEXT_LR_FACTOR = 0.5
DECAY_FRACTION = 0.25
DROPPED_PROMPTS = 0.1
"""Share of empty prompts, for classifier-free guidance (arXiv:2207.12598, Algorithm 1)."""
EMA_DECAY = 0.9995


@dataclass(frozen=True)
class Denoiser:
    """The averaged weights, in eval mode."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel


def make_denoiser(shop: Workshop, vocab_size: int) -> Denoiser:
    """Untrained, seeded."""
    with shop.seeded(STAGE):
        return Denoiser(make_unet().to(shop.device), make_text_encoder(vocab_size).to(shop.device))


def train_denoiser(
    shop: Workshop,
    tokenizer: CLIPTokenizer,
    *,
    latents_NCHW: Tensor,
    token_ids_NKL: Tensor,
    heldout_latents_NCHW: Tensor,
    heldout_token_ids_NKL: Tensor,
) -> Denoiser:
    """Train for the steps of all ``CYCLES``, of ``BATCH`` each."""
    live = make_denoiser(shop, len(tokenizer))
    average = Denoiser(copy.deepcopy(live.unet), copy.deepcopy(live.text_encoder))
    _use_plain_attention(live)
    scheduler = make_scheduler()
    empty_L = encode(tokenizer, [""])[0]
    cycles = tuple(shop.scaled(steps, at_least=2) for steps in CYCLES)
    num_steps = sum(cycles)
    groups = [
        {"name": "unet", "params": list(live.unet.parameters())},
        {"name": "text", "params": list(live.text_encoder.parameters())},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        return draw_loss(live, scheduler, latents_NCHW, token_ids_NKL, empty_L, generator, shop.device)

    def after_step(step: int) -> None:
        decay = min(EMA_DECAY, (step + 1) / (step + 12))  # forgets the random start quickly
        _blend(average.unet, live.unet, 1 - decay)
        _blend(average.text_encoder, live.text_encoder, 1 - decay)

    def validate() -> dict[str, float]:
        return _measure(shop, average, scheduler, heldout_latents_NCHW, heldout_token_ids_NKL)

    train(
        shop,
        STAGE,
        modules={
            "unet": live.unet,
            "text_encoder": live.text_encoder,
            "average_unet": average.unet,
            "average_text_encoder": average.text_encoder,
        },
        optimizer=optimizer,
        num_steps=num_steps,
        loss_of=loss_of,
        learning_rate_of=lambda step, group: (
            PEAK_LR * cyclic_rate(step, cycles) * (TEXT_LR_FACTOR if group == "text" else 1.0)
        ),
        after_step=after_step,
        validate=validate,
    )
    average.unet.eval()
    average.text_encoder.eval()
    if shop.load_figures(STAGE) is None:
        shop.save_figures(STAGE, {**validate(), "num_samples": float(num_steps * BATCH)})
    return average


def cyclic_rate(step: int, cycles: Sequence[int]) -> float:
    """Factor of the peak learning rate: in each cycle a short rise, a plateau, and a cosine decay at the end."""
    for length in cycles[:-1]:
        if step < length:
            break
        step -= length
    else:
        length = cycles[-1]
    left = (length - step) / (DECAY_FRACTION * length)
    decay = 0.02 + 0.98 * 0.5 * (1 - math.cos(math.pi * min(1.0, left)))
    return min(1.0, (step + 1) / 200) * decay


def draw_loss(
    denoiser: Denoiser,
    scheduler: DDIMScheduler,
    latents_NCHW: Tensor,
    token_ids_NKL: Tensor,
    empty_L: Tensor,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """The training loss of one random batch, a scalar with gradient; some of its prompts are dropped."""
    picks = torch.randint(len(latents_NCHW), (BATCH,), generator=generator)
    which = torch.randint(token_ids_NKL.shape[1], (BATCH,), generator=generator)
    token_ids_BL = token_ids_NKL[picks, which]
    token_ids_BL[torch.rand(BATCH, generator=generator) < DROPPED_PROMPTS] = empty_L
    # One timestep from each of B equal slices: same law, less variance.
    num_train = scheduler.config.num_train_timesteps
    t_B = ((torch.rand(BATCH, generator=generator) + torch.arange(BATCH)) * num_train / BATCH).long()
    x0_BCHW = latents_NCHW[picks].float()
    noise_BCHW = torch.randn(x0_BCHW.shape, generator=generator)
    batch = (tensor.to(device) for tensor in (x0_BCHW, noise_BCHW, t_B.clamp(max=num_train - 1), token_ids_BL))
    with autocast(device):
        return velocity_error(denoiser, scheduler, *batch).mean()


def velocity_error(
    denoiser: Denoiser,
    scheduler: DDIMScheduler,
    x0_BCHW: Tensor,
    noise_BCHW: Tensor,
    t_B: Tensor,
    token_ids_BL: Tensor,
) -> Tensor:
    """Squared error of the predicted velocity (arXiv:2202.00512, Appendix D), ``(B,)``, mean over a latent."""
    noisy_BCHW = scheduler.add_noise(x0_BCHW, noise_BCHW, t_B)
    target_BCHW = scheduler.get_velocity(x0_BCHW, noise_BCHW, t_B)
    text_BLD = denoiser.text_encoder(token_ids_BL)[0]
    predicted_BCHW = denoiser.unet(noisy_BCHW, t_B, text_BLD).sample
    error_B: Tensor = (predicted_BCHW.float() - target_BCHW).square().mean(dim=(1, 2, 3))
    return error_B


def _use_plain_attention(denoiser: Denoiser) -> None:
    """Matrix products instead of torch's fused kernel, whose bfloat16 backward on the CPU takes half of a step.

    Measured on one core with AMX, forward and backward: 7.0 ms a sample, against 10.9 with the fused kernel in
    bfloat16 and 11.5 in float32.
    """
    denoiser.unet.set_attn_processor(AttnProcessor())
    denoiser.text_encoder.set_attn_implementation("eager")


@torch.no_grad()
def _blend(average: nn.Module, live: nn.Module, weight: float) -> None:
    for mean, value in zip(average.parameters(), live.parameters(), strict=True):
        mean.lerp_(value, weight)


@torch.no_grad()
def _measure(
    shop: Workshop, denoiser: Denoiser, scheduler: DDIMScheduler, latents_NCHW: Tensor, token_ids_NKL: Tensor
) -> dict[str, float]:
    """Loss on held-out scenes, with fixed noise and timesteps spread evenly; lower is better, 1 is no skill."""
    generator = shop.generator(STAGE, "val")
    num_train = scheduler.config.num_train_timesteps
    t_N = torch.arange(len(latents_NCHW)) * num_train // len(latents_NCHW)
    errors = []
    for first in range(0, len(latents_NCHW), 128):
        part = slice(first, first + 128)
        x0_BCHW = latents_NCHW[part].float()
        noise_BCHW = torch.randn(x0_BCHW.shape, generator=generator)
        batch = (tensor.to(shop.device) for tensor in (x0_BCHW, noise_BCHW, t_N[part], token_ids_NKL[part, 0]))
        errors.append(velocity_error(denoiser, scheduler, *batch))
    return {"val_loss": torch.cat(errors).mean().item()}
