"""Builds the built-in text-to-image model from nothing: pictures, autoencoder, image-text model, denoiser, files.

Every stage is counted in steps, seeded and kept in the work folder, so that the same call after a kill goes on where
it was. At scale 1 the stages took an hour and a half together, one thread each on two busy CPU cores.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from rltune.builtin import autoencoder as ae
from rltune.builtin import denoiser as dn
from rltune.builtin import export
from rltune.builtin import image_text as it
from rltune.builtin.corpus import Corpus, load_corpus
from rltune.builtin.measure import measure_samples
from rltune.builtin.networks import make_f8_autoencoder
from rltune.builtin.tokenizer import build_tokenizer
from rltune.builtin.workshop import OnProgress, Workshop, no_progress


def train_builtin(
    out_dir: Path,
    *,
    work_dir: Path,
    seed: int = 0,
    scale: float = 1.0,
    device: torch.device | None = None,
    on_progress: OnProgress = no_progress,
    checkpoint_every_s: float = 60.0,
) -> dict[str, dict[str, float]]:
    """Train every network and write ``weights/`` and ``prompts/`` into ``out_dir``; returns the measured figures.

    Args:
        out_dir: Gets the layout that ``rltune.assets`` names. Replaced only once everything is measured.
        work_dir: Pictures, checkpoints and figures; about 1 GB at scale 1. A second call goes on from there.
        seed: Of the pictures, the networks and every draw.
        scale: Multiplies the step counts and the number of pictures; 1 is the shipped model.
        device: Where the networks train; the CPU by default.
        on_progress: Called with stage, step, total and figures.
        checkpoint_every_s: Seconds between checkpoints, the most a kill can lose.

    Raises:
        UserError: If ``work_dir`` holds a build with another seed or scale.
        NonFiniteError: If a loss is not finite.
    """
    shop = Workshop(work_dir, seed, scale, device or torch.device("cpu"), on_progress, checkpoint_every_s)
    shop.claim()
    corpus = load_corpus(shop, is_heldout=False)
    heldout = load_corpus(shop, is_heldout=True)
    tokenizer = build_tokenizer(caption for captions in corpus.captions for caption in captions)

    token_ids_NKL = it.encode_captions(tokenizer, corpus)
    image_text = it.train_image_text(shop, tokenizer, token_ids_NKL, corpus, heldout)
    autoencoder = build_autoencoder(shop, corpus, heldout)
    denoiser = dn.train_denoiser(
        shop,
        tokenizer,
        latents_NCHW=ae.encode_all(shop, autoencoder, corpus, "latents"),
        token_ids_NKL=token_ids_NKL,
        heldout_latents_NCHW=ae.encode_all(shop, autoencoder, heldout, "latents-heldout"),
        heldout_token_ids_NKL=it.encode_captions(tokenizer, heldout),
    )
    return finish(shop, out_dir, tokenizer, image_text, autoencoder, denoiser)


def build_autoencoder(shop: Workshop, corpus: Corpus, heldout: Corpus) -> AutoencoderKL:
    """The shipped autoencoder: 4x, 8x, whitened; in eval mode, without gradient."""
    model = make_f8_autoencoder().to(shop.device).eval()
    state = shop.load("autoencoder")
    if state is None:
        f4 = ae.train_f4(shop, corpus, heldout)
        trained = ae.train_f8(shop, f4, corpus, heldout)
        ae.whiten(trained, corpus.images_N3HW[: ae.WHITENING_PICTURES], shop.device)
        psnr = ae.psnr(trained, heldout.images_N3HW[:512], shop.device)
        shop.save_figures("autoencoder", {"val_psnr_db": psnr})
        state = trained.state_dict()
        shop.save("autoencoder", state)
    model.load_state_dict(state)
    return model.requires_grad_(False)


def finish(
    shop: Workshop,
    out_dir: Path,
    tokenizer: CLIPTokenizer,
    image_text: it.ImageText,
    autoencoder: AutoencoderKL,
    denoiser: dn.Denoiser,
) -> dict[str, dict[str, float]]:
    """Measure the samples and write the files, next to ``out_dir`` first so that no reader meets a half-written set."""
    figures = {stage: shop.load_figures(stage) or {} for stage in STAGES}
    figures["judged"] = measure_samples(shop, tokenizer, image_text, autoencoder, denoiser)
    partial = out_dir / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    weights = partial / "weights"
    weights.mkdir(parents=True)
    export.export_pipeline(weights / "pipeline", autoencoder=autoencoder, denoiser=denoiser, tokenizer=tokenizer)
    export.export_image_text(weights / "clip", model=image_text, tokenizer=tokenizer)
    export.export_head(weights / "aesthetic_head.safetensors", image_text.head)
    export.write_figures(weights / "figures.json", figures)
    export.export_prompts(partial / "prompts", shop.seed)
    _swap_in(partial, out_dir, ("weights", "prompts"))
    return figures


STAGES = ("autoencoder-f4", "autoencoder-f8", "autoencoder", "image-text", "denoiser")
"""The stages that leave figures, in the order in which the card quotes them."""


def _swap_in(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        old = source / f"{name}.old"
        if (target / name).exists():
            os.replace(target / name, old)
        os.replace(source / name, target / name)
    shutil.rmtree(source)
