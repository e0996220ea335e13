"""Figures of the finished model: do its pictures show what the prompt says?

The judge is our own image-text model. It saw the same kind of pictures and is not independent of the build, so every
figure stands beside its ceilings (real renders, and the same behind the autoencoder) and a control (shuffled prompts).
The figures rank builds of this model and say nothing about any other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from rltune.builtin.corpus import to_network
from rltune.builtin.denoiser import Denoiser
from rltune.builtin.image_text import ImageText, embed_images, embed_texts
from rltune.builtin.render import render
from rltune.builtin.sampling import sample, to_bytes
from rltune.builtin.scenes import GROUND_COLORS, OBJECT_COLORS, SHAPES, Scene, make_scenes
from rltune.builtin.tokenizer import encode
from rltune.builtin.workshop import Workshop

NUM_SCENES = 512

CHOICES: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {"shape": SHAPES, "color": tuple(OBJECT_COLORS), "count": (1, 2, 3, 4), "ground": tuple(GROUND_COLORS)}
)
"""What a one-group caption could have said instead."""


def measure_samples(
    shop: Workshop, tokenizer: CLIPTokenizer, judge: ImageText, autoencoder: AutoencoderKL, denoiser: Denoiser
) -> dict[str, float]:
    """Alignment (mean cosine with the prompt) and attribute accuracy on held-out scenes, with ceilings and control."""
    scenes, _ = make_scenes(shop.seed, shop.scaled(NUM_SCENES, at_least=8), is_heldout=True)
    prompts = [scene.canonical_caption() for scene in scenes]
    sampled = sample(autoencoder, denoiser, tokenizer, prompts, generator=shop.generator("samples"), device=shop.device)
    rendered = (render(scenes) * 255).round().to(torch.uint8)
    pictures = {
        "samples": sampled,
        "reconstructions": reconstruct(autoencoder, rendered, shop.device),
        "renders": rendered,
    }
    text_ND = embed_texts(judge, encode(tokenizer, prompts), shop.device)
    figures = {"num_prompts": float(len(prompts))}
    for name, images in pictures.items():
        image_ND = embed_images(judge, images, shop.device)
        figures[f"{name}_alignment"] = _cosine(image_ND, text_ND)
        for attribute, accuracy in attribute_accuracy(shop, tokenizer, judge, image_ND, scenes).items():
            figures[f"{name}_{attribute}"] = accuracy
        with torch.no_grad():
            figures[f"{name}_aesthetic"] = judge.head(image_ND.to(shop.device)).mean().item()
        if name == "samples":
            figures["shuffled_alignment"] = _cosine(image_ND, text_ND.roll(1, 0))
    return figures


def attribute_accuracy(
    shop: Workshop, tokenizer: CLIPTokenizer, judge: ImageText, image_ND: Tensor, scenes: Sequence[Scene]
) -> dict[str, float]:
    """Per attribute, how often the judge prefers the true caption to all that differ in this one word.

    Only scenes of one group are asked: with two, a swapped word can describe the other group.
    """
    picks = [number for number, scene in enumerate(scenes) if len(scene.groups) == 1]
    accuracy = {}
    for attribute, choices in CHOICES.items():
        hits = []
        for number in picks:
            captions, truth = _alternatives(scenes[number], attribute, choices)
            text_CD = embed_texts(judge, encode(tokenizer, captions), shop.device)
            hits.append(float((text_CD @ image_ND[number]).argmax().item() == truth))
        accuracy[attribute] = sum(hits) / max(1, len(hits))
    return accuracy


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, images_uint8: Tensor, device: torch.device) -> Tensor:
    """The same pictures behind the autoencoder, uint8."""
    batches = [autoencoder.encode(to_network(batch.to(device))).latent_dist.mean for batch in images_uint8.split(64)]
    return torch.cat([to_bytes(autoencoder.decode(batch).sample) for batch in batches])


def _alternatives(scene: Scene, attribute: str, choices: Sequence[object]) -> tuple[list[str], int]:
    if attribute == "ground":
        scenes = [replace(scene, ground=str(choice)) for choice in choices]
        truth = choices.index(scene.ground)
    else:
        group = scene.groups[0]
        changes: list[dict[str, Any]] = [{attribute: choice} for choice in choices]
        scenes = [replace(scene, groups=(replace(group, **change),)) for change in changes]
        truth = choices.index(getattr(group, attribute))
    return [swapped.canonical_caption() for swapped in scenes], truth


def _cosine(left_ND: Tensor, right_ND: Tensor) -> float:
    return (left_ND * right_ND).sum(1).mean().item()
