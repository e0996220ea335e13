"""Builds the built-in model from nothing: pictures, judge, counter, image-text model, autoencoder, denoiser, files.

Every stage is counted in steps, seeded and kept in the work folder, so that the same call after a kill goes on where
it was. At scale 1 the stages took 3.9 hours together, one thread each, on two CPU cores that other jobs kept busy.
"""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from rltune.builtin import autoencoder as ae
from rltune.builtin import denoiser as dn
from rltune.builtin import image_text as it
from rltune.builtin import shipping as export
from rltune.builtin.corpus import Corpus, load_corpus
from rltune.builtin.counter import Counter, train_counter
from rltune.builtin.drawing import sample
from rltune.builtin.judge import Judge, train_judge
from rltune.builtin.measure import measure_samples, reconstruct
from rltune.builtin.networks import make_f8_autoencoder
from rltune.builtin.pictures import COLUMNS, save_pictures
from rltune.builtin.tokenizer import build_tokenizer, encode
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
    networks = Networks(
        judge=train_judge(shop),
        counter=train_counter(shop, corpus, heldout),
        image_text=it.train_image_text(shop, tokenizer, token_ids_NKL, corpus, heldout),
        autoencoder=(autoencoder := build_autoencoder(shop, corpus, heldout)),
        denoiser=dn.train_denoiser(
            shop,
            tokenizer,
            latents_NCHW=ae.encode_all(shop, autoencoder, corpus, "latents"),
            token_ids_NKL=token_ids_NKL,
            heldout_latents_NCHW=ae.encode_all(shop, autoencoder, heldout, "latents-heldout"),
            heldout_token_ids_NKL=it.encode_captions(tokenizer, heldout),
        ),
    )
    return finish(shop, out_dir, tokenizer, networks, heldout)


@dataclass(frozen=True)
class Networks:
    """Everything a build trains, in eval mode."""

    judge: Judge
    counter: Counter
    image_text: it.ImageText
    autoencoder: AutoencoderKL
    denoiser: dn.Denoiser


def build_autoencoder(shop: Workshop, corpus: Corpus, heldout: Corpus) -> AutoencoderKL:
    """The shipped autoencoder: 4x, 8x, whitened, decoder refined; in eval mode, without gradient."""
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
    latents_NCHW = ae.encode_all(shop, model.requires_grad_(False), corpus, "latents")
    return ae.refine_decoder(shop, model, latents_NCHW, corpus, heldout)


def finish(
    shop: Workshop, out_dir: Path, tokenizer: CLIPTokenizer, networks: Networks, heldout: Corpus
) -> dict[str, dict[str, float]]:
    """Measure the samples and write the files, next to ``out_dir`` first so that no reader meets a half-written set."""
    judge, image_text, autoencoder, denoiser = (
        networks.judge, networks.image_text, networks.autoencoder, networks.denoiser
    )  # fmt: skip
    figures = {stage: shop.load_figures(stage) or {} for stage in STAGES}
    figures |= measure_samples(shop, tokenizer, judge, image_text, autoencoder, denoiser)
    _show(shop, tokenizer, networks, heldout)
    partial = out_dir / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    weights = partial / "weights"
    weights.mkdir(parents=True)
    export.export_pipeline(weights / "pipeline", autoencoder=autoencoder, denoiser=denoiser, tokenizer=tokenizer)
    export.export_image_text(weights / "clip", model=image_text, tokenizer=tokenizer)
    export.export_head(weights / "aesthetic_head.safetensors", image_text.head)
    export.export_reader(weights / "counter.safetensors", networks.counter)
    export.export_reader(weights / "judge.safetensors", judge)
    export.write_figures(weights / "figures.json", figures)
    export.export_prompts(partial / "prompts", shop.seed)
    _swap_in(partial, out_dir, ("weights", "prompts"))
    return figures


STAGES = ("judge", "counter", "image-text", "autoencoder-f4", "autoencoder-f8", "autoencoder", "decoder", "denoiser")
"""The stages that leave figures, in the order in which the card quotes them."""


def _show(shop: Workshop, tokenizer: CLIPTokenizer, networks: Networks, heldout: Corpus) -> None:
    """Grids to look at, in the work folder: reconstructions, samples, and what the image-text model finds."""
    originals = heldout.images_N3HW[:64]
    restored = reconstruct(networks.autoencoder, originals, shop.device)
    rows = [part for pair in zip(originals.split(COLUMNS), restored.split(COLUMNS), strict=True) for part in pair]
    save_pictures(shop.work_dir / "decoder.png", torch.cat(rows))

    prompts = export.distinct_prompts(shop.seed, shop.scaled(8, at_least=1), is_heldout=True)
    repeated = [prompt for prompt in prompts for _ in range(COLUMNS)]
    generator = shop.generator("grid")
    images = sample(
        networks.autoencoder, networks.denoiser, tokenizer, repeated, generator=generator, device=shop.device
    )
    save_pictures(shop.work_dir / "denoiser.png", images)

    image_ND = it.embed_images(networks.image_text, heldout.images_N3HW, shop.device)
    text_ND = it.embed_texts(networks.image_text, encode(tokenizer, list(prompts)), shop.device)
    best = (text_ND @ image_ND.T).topk(min(COLUMNS, len(heldout)), dim=1).indices.flatten()
    save_pictures(shop.work_dir / "image-text.png", heldout.images_N3HW[best])


def _swap_in(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        old = source / f"{name}.old"
        if (target / name).exists():
            os.replace(target / name, old)
        os.replace(source / name, target / name)
    shutil.rmtree(source)
