"""The rendered training set and the held-out set, kept on disk in chunks."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from rltune.builtin.render import render
from rltune.builtin.scenes import Scene, make_scenes
from rltune.builtin.workshop import Workshop

NUM_PICTURES = 65_536
NUM_HELDOUT = 1_024
CAPTIONS_PER_PICTURE = 4
_CHUNK = 2_048


@dataclass(frozen=True)
class Corpus:
    """N pictures with their captions and labels."""

    images_N3HW: Tensor
    """uint8 RGB; ``to_network`` turns a batch of it into what the networks read."""
    captions: tuple[tuple[str, ...], ...]
    """Per picture ``CAPTIONS_PER_PICTURE`` ways to say it."""
    aesthetic_N: Tensor
    """float32 in [1, 10]."""

    def __len__(self) -> int:
        return len(self.images_N3HW)


def to_network(images_uint8: Tensor) -> Tensor:
    """Bytes -> float32 in [-1, 1], the range of the autoencoder and of the image-text model."""
    return images_uint8.float() / 127.5 - 1


def load_corpus(shop: Workshop, *, is_heldout: bool) -> Corpus:
    """The training or the held-out set, rendered on the first call and read from the work folder afterwards."""
    stage = "heldout" if is_heldout else "pictures"
    total = shop.scaled(NUM_HELDOUT, at_least=24) if is_heldout else shop.scaled(NUM_PICTURES, at_least=64)
    images: list[Tensor] = []
    captions: list[tuple[str, ...]] = []
    aesthetic: list[Tensor] = []
    index = 0
    for first in range(0, total, _CHUNK):
        name = f"corpus-{stage}-{first // _CHUNK:03d}"
        chunk = shop.load(name)
        if chunk is None:
            size = min(_CHUNK, total - first)
            chunk = _make_chunk(shop.seed, index, size, is_heldout=is_heldout)
            shop.save(name, chunk)
            shop.on_progress(stage, first + size, total, {})
        index = int(chunk["next_index"])
        images.append(chunk["images"])
        captions.extend(tuple(c) for c in chunk["captions"])
        aesthetic.append(chunk["aesthetic"])
    return Corpus(torch.cat(images), tuple(captions), torch.cat(aesthetic))


def _make_chunk(seed: int, index: int, size: int, *, is_heldout: bool) -> dict[str, object]:
    scenes, next_index = make_scenes(seed, size, is_heldout=is_heldout, start=index)
    batches = [render(scenes[i : i + 256]) for i in range(0, size, 256)]
    return {
        "images": torch.cat([(batch * 255).round().to(torch.uint8) for batch in batches]),
        "captions": [_captions(scene) for scene in scenes],
        "aesthetic": torch.tensor([scene.style.aesthetic() for scene in scenes]),
        "next_index": next_index,
    }


def _captions(scene: Scene) -> list[str]:
    rng = random.Random(scene.noise_seed)
    return [scene.caption(rng) for _ in range(CAPTIONS_PER_PICTURE)]
