"""The autoencoder, in four stages: 4x from scratch, 8x warm-started from it, whitened latents, a refined decoder.

The 8x autoencoder does not train from scratch in minutes (17 dB where the warm start has 22 dB at the same time). Its
latents come out strongly correlated (|corr| up to .96), which one ``scaling_factor`` cannot mend, so a full whitening
is folded into the two 1x1 convolutions around the latents. The decoder then trains on against fixed latents, as Stable
Diffusion's ``sd-vae-ft-mse`` did: pictures get sharper, and whatever learnt the latents stays valid.
"""

import math

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own documentation writes F)

from rltune.builtin.corpus import Corpus, to_network
from rltune.builtin.networks import make_f4_autoencoder, make_f8_autoencoder
from rltune.builtin.workshop import Workshop, autocast, cosine_rate, train

F4_STEPS = 1_400
F8_STEPS = 2_600
BATCH = 16
PEAK_LR = 2e-3
FROZEN_STEPS = 60
"""How long the warm-started tensors wait for the new ones to stop being noise."""
WHITENING_PICTURES = 4_096
DECODER_STEPS = 5_000
DECODER_PEAK_LR = 1e-3


def train_f4(shop: Workshop, corpus: Corpus, heldout: Corpus) -> AutoencoderKL:
    """The trained 4x autoencoder, in eval mode."""
    with shop.seeded("f4"):
        model = make_f4_autoencoder()
    return _train(shop, "autoencoder-f4", model, set(), shop.scaled(F4_STEPS, at_least=2), corpus, heldout)


def train_f8(shop: Workshop, f4: AutoencoderKL, corpus: Corpus, heldout: Corpus) -> AutoencoderKL:
    """The trained 8x autoencoder, latents not yet whitened, in eval mode."""
    with shop.seeded("f8"):
        model = make_f8_autoencoder()
    copied = warm_start(model, f4)
    return _train(shop, "autoencoder-f8", model, copied, shop.scaled(F8_STEPS, at_least=2), corpus, heldout)


def warm_start(f8: AutoencoderKL, f4: AutoencoderKL) -> set[str]:
    """Copy into ``f8`` what it shares with ``f4``, namely its outer levels; returns the names of what was copied."""
    source, target = f4.state_dict(), f8.state_dict()
    copied = set()
    for name in target:
        twin = _f4_name(name)
        if twin is not None and twin in source and source[twin].shape == target[name].shape:
            target[name] = source[twin]
            copied.add(name)
    f8.load_state_dict(target)
    return copied


def _f4_name(f8_name: str) -> str | None:
    """The tensor of the 4x net that does the same work: levels count from the picture inwards."""
    shared = ("encoder.conv_in", "encoder.down_blocks.0", "encoder.down_blocks.1", "encoder.down_blocks.2.resnets")
    if f8_name.startswith((*shared, "decoder.conv_norm_out", "decoder.conv_out")):
        return f8_name
    if f8_name.startswith("decoder.up_blocks."):
        level, rest = f8_name.removeprefix("decoder.up_blocks.").split(".", 1)
        return f"decoder.up_blocks.{int(level) - 1}.{rest}" if int(level) > 0 else None
    return None


def reconstruction_loss(difference_B3HW: Tensor) -> Tensor:
    """L1 + L2, plus L1 on gradients (edges) and on 2x and 4x means (hue, which collapses without them)."""
    d = difference_B3HW
    edges = d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
    coarse = F.avg_pool2d(d, 4).abs().mean() + F.avg_pool2d(d, 2).abs().mean()
    return d.abs().mean() + d.square().mean() + 0.3 * edges + 1.5 * coarse


def _train(
    shop: Workshop,
    stage: str,
    model: AutoencoderKL,
    copied: set[str],
    num_steps: int,
    corpus: Corpus,
    heldout: Corpus,
) -> AutoencoderKL:
    model.to(shop.device)
    groups = [
        {"name": "new", "params": [p for name, p in model.named_parameters() if name not in copied]},
        {"name": "copied", "params": [p for name, p in model.named_parameters() if name in copied]},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4
    )

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        picks = torch.randint(len(corpus), (BATCH,), generator=generator)
        images = to_network(corpus.images_N3HW[picks].to(shop.device))
        with autocast(shop.device):
            posterior = model.encode(images).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator).to(shop.device)
            decoded = model.decode(mean + (0.5 * logvar).exp() * noise).sample.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss: Tensor = reconstruction_loss(decoded - images) + 1e-4 * kl
        return loss

    def learning_rate_of(step: int, group: str) -> float:
        rate = PEAK_LR * cosine_rate(step, num_steps, warmup=50)
        if group == "copied":
            rate *= 0.0 if step < FROZEN_STEPS else 0.5 * min(1.0, (step - FROZEN_STEPS) / 100)
        return rate

    train(
        shop,
        stage,
        modules={"autoencoder": model},
        optimizer=optimizer,
        num_steps=num_steps,
        loss_of=loss_of,
        learning_rate_of=learning_rate_of,
    )
    model.eval()
    if shop.load_figures(stage) is None:
        shop.save_figures(stage, {"val_psnr_db": psnr(model, heldout.images_N3HW[:512], shop.device)})
    return model


def refine_decoder(
    shop: Workshop, model: AutoencoderKL, latents_NCHW: Tensor, corpus: Corpus, heldout: Corpus
) -> AutoencoderKL:
    """Train the decoder alone, on the latents that the finished encoder gave; returns ``model`` in eval mode."""
    stage = "decoder"
    decoder = {"decoder": model.decoder, "post_quant_conv": model.post_quant_conv}
    parameters = [parameter for module in decoder.values() for parameter in module.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(
        [{"name": "all", "params": parameters}], lr=DECODER_PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4
    )
    num_steps = shop.scaled(DECODER_STEPS, at_least=2)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        picks = torch.randint(len(corpus), (BATCH,), generator=generator)
        images = to_network(corpus.images_N3HW[picks].to(shop.device))
        with autocast(shop.device):
            decoded = model.decode(latents_NCHW[picks].float().to(shop.device)).sample.float()
        return reconstruction_loss(decoded - images)

    train(
        shop,
        stage,
        modules=decoder,
        optimizer=optimizer,
        num_steps=num_steps,
        loss_of=loss_of,
        learning_rate_of=lambda step, _: DECODER_PEAK_LR * cosine_rate(step, num_steps, warmup=100),
    )
    model.eval().requires_grad_(False)
    if shop.load_figures(stage) is None:
        shop.save_figures(stage, {"val_psnr_db": psnr(model, heldout.images_N3HW[:512], shop.device)})
    return model


@torch.no_grad()
def psnr(model: AutoencoderKL, images_uint8: Tensor, device: torch.device) -> float:
    """Peak signal-to-noise ratio of reconstructions from the posterior mean, in dB, over all pixels."""
    squared = []
    for batch in images_uint8.split(64):
        images = to_network(batch.to(device))
        decoded = model.decode(model.encode(images).latent_dist.mean).sample
        squared.append(((decoded.clamp(-1, 1) - images) / 2).square().mean(dim=(1, 2, 3)))
    return -10 * math.log10(torch.cat(squared).mean().item())


@torch.no_grad()
def whiten(model: AutoencoderKL, images_uint8: Tensor, device: torch.device) -> None:
    """Fold a ZCA whitening of the latents into the model: their covariance over ``images`` becomes the identity.

    With ``z' = W (z - mu)`` and ``W = C^(-1/2)``, W goes into ``quant_conv`` and its inverse into
    ``post_quant_conv``; both are 1x1, so decoding is unchanged. The posterior's variance becomes one constant a
    channel: the mean of ``W^2 var``, ignoring the correlations that W introduces.
    """
    posteriors = [model.encode(to_network(batch.to(device))).latent_dist for batch in images_uint8.split(64)]
    mean_CN = torch.cat([p.mean for p in posteriors]).transpose(0, 1).flatten(1).double()
    variance_C = torch.cat([p.var for p in posteriors]).mean(dim=(0, 2, 3)).double()
    mu_C = mean_CN.mean(1)
    eigenvalues, vectors = torch.linalg.eigh(torch.cov(mean_CN))
    # A direction that is almost constant would be blown up into noise.
    eigenvalues = eigenvalues.clamp(min=4e-4 * eigenvalues.mean())
    forward_CC = vectors @ torch.diag(eigenvalues.rsqrt()) @ vectors.T
    inverse_CC = vectors @ torch.diag(eigenvalues.sqrt()) @ vectors.T

    num_channels = len(mu_C)
    into, out_of = model.quant_conv, model.post_quant_conv
    weight, bias = into.weight.double()[:, :, 0, 0], into.bias.double()
    log_variance_C = (forward_CC.square() @ variance_C).log()
    _set(into.weight, torch.cat([forward_CC @ weight[:num_channels], torch.zeros_like(weight[num_channels:])]))
    _set(into.bias, torch.cat([forward_CC @ (bias[:num_channels] - mu_C), log_variance_C]))
    weight, bias = out_of.weight.double()[:, :, 0, 0], out_of.bias.double()
    _set(out_of.weight, weight @ inverse_CC)
    _set(out_of.bias, bias + weight @ mu_C)


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value.reshape(parameter.shape))


@torch.no_grad()
def encode_all(shop: Workshop, model: AutoencoderKL, corpus: Corpus, stage: str) -> Tensor:
    """Latents of every picture, ``(N, 16, 8, 8)`` float16, computed once and kept in the work folder."""
    latents: Tensor | None = shop.load(stage)
    if latents is None:
        batches = []
        for batch in corpus.images_N3HW.split(64):
            batches.append(model.encode(to_network(batch.to(shop.device))).latent_dist.mean.half().cpu())
            if len(batches) % 100 == 0:
                shop.on_progress(stage, 64 * len(batches), len(corpus), {})
        latents = torch.cat(batches)
        shop.save(stage, latents)
        shop.on_progress(stage, len(corpus), len(corpus), {})
    return latents
