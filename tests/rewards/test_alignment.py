"""Alignment against the cosine of open_clip's own embeddings."""

from pathlib import Path

import open_clip
import torch

from rltune.builtin.render import render
from rltune.builtin.scenes import make_scene
from rltune.rewards.base import REWARDS


def test_alignment_is_the_cosine_of_image_and_prompt(clip_folder: Path) -> None:
    model = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reward = REWARDS.build("alignment", {"model": str(clip_folder)})
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        image_2D = model.encode_image((images - mean) / std)
        text_2D = model.encode_text(tokenizer(["a cat", "two birds"]))
    expected = torch.nn.functional.cosine_similarity(image_2D, text_2D)
    torch.testing.assert_close(reward(images, ["a cat", "two birds"]), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(reward(images, ["two birds", "a cat"]), expected, atol=1e-3)


def test_clip_score_is_a_hundred_times_the_cosine(clip_folder: Path) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cosine = REWARDS.build("alignment", {"model": str(clip_folder)})(images, ["a cat", "two birds"])
    reward = REWARDS.build("clip_score", {"model": str(clip_folder)})
    torch.testing.assert_close(reward(images, ["a cat", "two birds"]), 100 * cosine)
    assert reward.value_range == (-100.0, 100.0)


def test_the_shipped_model_prefers_a_scenes_own_caption() -> None:
    scenes = [make_scene(0, i) for i in range(16)]
    images, captions = render(scenes), [scene.canonical_caption() for scene in scenes]
    reward = REWARDS.build("alignment", {})
    own, other = reward(images, captions), reward(images, captions[1:] + captions[:1])
    assert (own > other).float().mean() > 0.8
