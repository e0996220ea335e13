"""Figures of the finished model: do its pictures show what the prompt says?

The judge (``judge.py``) reads them. It shares nothing with the build, and every figure stands beside the judge's own
ceiling (real renders of held-out scenes), the autoencoder's (the same, reconstructed) and a control (the samples
against the prompts of others). The figures rank builds of this model and say nothing about any other.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from rltune.builtin.corpus import to_network
from rltune.builtin.denoiser import Denoiser
from rltune.builtin.drawing import sample, to_bytes
from rltune.builtin.grammar import Content, parse
from rltune.builtin.image_text import ImageText, embed_images, embed_texts
from rltune.builtin.judge import Judge, Verdict, judge_images
from rltune.builtin.render import render
from rltune.builtin.scenes import make_scenes
from rltune.builtin.shipping import distinct_prompts
from rltune.builtin.tokenizer import encode
from rltune.builtin.workshop import Workshop

NUM_PROMPTS = 500
IMAGES_PER_PROMPT = 2
NUM_SCENES = 1_000

MEASURES: Mapping[str, tuple[int | None, str]] = MappingProxyType(
    {
        "exact": (None, "exact"),
        "ground": (None, "ground"),
        "one_color": (1, "colors"),
        "one_count": (1, "count"),
        "one_shape": (1, "shape"),
        "one_all": (1, "groups"),
        "two_colors": (2, "colors"),
        "two_all": (2, "groups"),
    }
)
"""Figure -> how many groups a prompt must have to be asked (None: any), and the part of the verdict that counts."""


def measure_samples(
    shop: Workshop,
    tokenizer: CLIPTokenizer,
    judge: Judge,
    image_text: ImageText,
    autoencoder: AutoencoderKL,
    denoiser: Denoiser,
) -> dict[str, dict[str, float]]:
    """Per kind of picture (``samples``, ``shuffled``, ``reconstructions``, ``renders``) what the judge reads.

    Beside each share stand ``.._low`` and ``.._high``, its 95 % interval; with it the alignment and the aesthetic score
    that the shipped reward models give, which are no judges.
    """
    prompts = distinct_prompts(shop.seed, shop.scaled(NUM_PROMPTS, at_least=8), is_heldout=True)
    repeated = [prompt for prompt in prompts for _ in range(IMAGES_PER_PROMPT)]
    sampled = sample(
        autoencoder, denoiser, tokenizer, repeated, generator=shop.generator("samples"), device=shop.device
    )
    scenes, _ = make_scenes(shop.seed, shop.scaled(NUM_SCENES, at_least=8), is_heldout=True)
    rendered = (render(scenes) * 255).round().to(torch.uint8)
    captions = [scene.canonical_caption() for scene in scenes]
    sets = {
        "samples": (sampled, repeated, IMAGES_PER_PROMPT),
        "shuffled": (sampled, repeated[IMAGES_PER_PROMPT:] + repeated[:IMAGES_PER_PROMPT], IMAGES_PER_PROMPT),
        "reconstructions": (reconstruct(autoencoder, rendered, shop.device), captions, 1),
        "renders": (rendered, captions, 1),
    }
    figures = {}
    for name, (images, texts, images_per_prompt) in sets.items():
        contents = [_content(text) for text in texts]
        shares = judged_shares(judge_images(judge, images, contents, shop.device), contents, images_per_prompt)
        image_ND = embed_images(image_text, images, shop.device)
        text_ND = embed_texts(image_text, encode(tokenizer, texts), shop.device)
        with torch.no_grad():
            aesthetic = image_text.head(image_ND.to(shop.device)).mean().item()
        alignment = (image_ND * text_ND).sum(1).mean().item()
        counts = {"num_pictures": float(len(images)), "num_prompts": float(len(images) // images_per_prompt)}
        figures[name] = counts | shares | {"alignment": alignment, "aesthetic": aesthetic}
    return figures


def judged_shares(verdicts: Sequence[Verdict], contents: Sequence[Content], images_per_prompt: int) -> dict[str, float]:
    """Every one of ``MEASURES`` as a share of pictures, with its interval.

    Pictures of one prompt are not independent, so the interval (Wilson's) counts each prompt once: it is too wide
    rather than too narrow.
    """
    shares: dict[str, float] = {}
    for name, (num_groups, part) in MEASURES.items():
        hits = [
            getattr(verdict, part)
            for verdict, content in zip(verdicts, contents, strict=True)
            if num_groups in (None, len(content.groups))
        ]
        share = sum(hits) / max(1, len(hits))
        low, high = wilson(share, len(hits) / images_per_prompt)
        shares |= {name: share, f"{name}_low": low, f"{name}_high": high}
    return shares


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927); (0, 1) where nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    z2 = 1.959964**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, images_uint8: Tensor, device: torch.device) -> Tensor:
    """The same pictures behind the autoencoder, uint8."""
    batches = [autoencoder.encode(to_network(batch.to(device))).latent_dist.mean for batch in images_uint8.split(64)]
    return torch.cat([to_bytes(autoencoder.decode(batch).sample) for batch in batches])


def _content(caption: str) -> Content:
    content = parse(caption)
    assert content is not None, f"not a caption of this world: {caption!r}"
    return content
