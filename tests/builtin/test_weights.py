"""The files that ship: they load offline with stock libraries, hold what the code promises, and draw pictures."""

import json
import random
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline

from rltune.assets import BUILTIN_AESTHETIC_HEAD, BUILTIN_CLIP_DIR, BUILTIN_DIR, BUILTIN_PIPELINE_DIR, BUILTIN_PROMPTS
from rltune.builtin.card import figure_tables
from rltune.builtin.grammar import parse
from rltune.builtin.render import render
from rltune.builtin.scenes import make_scenes
from rltune.builtin.shipping import distinct_prompts, load_head

MAX_BYTES = 20 * 1000 * 1000
FIGURES = BUILTIN_DIR / "weights" / "figures.json"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(BUILTIN_PIPELINE_DIR, dtype=torch.float32, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def clip() -> tuple[Any, Any]:
    model = open_clip.create_model(f"local-dir:{BUILTIN_CLIP_DIR}").float().eval()
    return model, open_clip.get_tokenizer(f"local-dir:{BUILTIN_CLIP_DIR}")


def draw(pipeline: StableDiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = pipeline(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generator, output_type="pt").images
    return images.float()


def test_everything_together_is_small() -> None:
    files = [path for path in (BUILTIN_DIR / "weights").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_no_file_names_the_machine_it_was_built_on() -> None:
    texts = [path for path in BUILTIN_DIR.rglob("*") if path.suffix in {".json", ".txt", ".md"}]
    assert [path for path in texts if "/tmp" in path.read_text() or "/home" in path.read_text()] == []


@pytest.mark.long
def test_the_pipeline_draws_its_prompts(pipeline: StableDiffusionPipeline, clip: tuple[Any, Any]) -> None:
    prompts = BUILTIN_PROMPTS["builtin-heldout"].read_text().splitlines()[:16]
    images = draw(pipeline, prompts)
    assert images.shape == (16, 3, 64, 64)
    assert images.isfinite().all()
    # A picture shows something: a flat one has no spread, and 16 prompts do not make 16 equal pictures.
    assert images.flatten(1).std(1).min() > 0.02
    assert images.std(0).mean() > 0.1
    model, tokenizer = clip
    with torch.no_grad():
        image_BD = model.encode_image(images * 2 - 1, normalize=True)
        text_BD = model.encode_text(tokenizer(prompts), normalize=True)
    matched = (image_BD * text_BD).sum(1).mean()
    shuffled = (image_BD * text_BD.roll(1, 0)).sum(1).mean()
    assert matched > shuffled + 0.3  # recorded figures differ by more than twice that


def test_one_number_format_for_all_parts_where_none_is_named() -> None:
    """transformers takes that of the config, diffusers float32: with two formats the first picture is an error."""
    loaded = StableDiffusionPipeline.from_pretrained(BUILTIN_PIPELINE_DIR, local_files_only=True)
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype} == {torch.float32}


@pytest.mark.slow
def test_the_same_noise_gives_the_same_picture(pipeline: StableDiffusionPipeline) -> None:
    prompts = ["a red circle on a white background"]
    assert torch.equal(draw(pipeline, prompts), draw(pipeline, prompts))


def test_the_tokenizers_of_both_models_agree(pipeline: StableDiffusionPipeline, clip: tuple[Any, Any]) -> None:
    texts = ["three red stars on a blue background, glossy", "", "something else entirely"]
    ids = pipeline.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(clip[1](texts), ids)


@pytest.mark.slow
def test_the_image_text_model_and_the_head_read_renders(clip: tuple[Any, Any]) -> None:
    model, tokenizer = clip
    scenes, _ = make_scenes(12345, 128, is_heldout=True)
    rng = random.Random(0)
    with torch.no_grad():
        image_BD = model.encode_image(render(scenes) * 2 - 1, normalize=True)
        text_BD = model.encode_text(tokenizer([scene.caption(rng) for scene in scenes]), normalize=True)
        score_B = load_head(BUILTIN_AESTHETIC_HEAD)(image_BD)
    label_B = torch.tensor([scene.style.aesthetic() for scene in scenes])
    assert torch.corrcoef(torch.stack([score_B, label_B]))[0, 1] > 0.8
    nearest_B = (image_BD @ text_BD.T).argmax(1)
    assert (nearest_B == torch.arange(128)).float().mean() > 0.5  # chance is .008


@pytest.mark.parametrize(("name", "count", "is_heldout"), [("builtin", 512, False), ("builtin-heldout", 256, True)])
def test_prompt_files_are_distinct_captions_of_their_split(name: str, count: int, is_heldout: bool) -> None:
    prompts = BUILTIN_PROMPTS[name].read_text().splitlines()
    assert len(set(prompts)) == len(prompts) == count
    assert tuple(prompts) == distinct_prompts(0, count, is_heldout=is_heldout)


def test_the_card_quotes_the_figures_that_were_measured() -> None:
    card = Path(BUILTIN_DIR / "MODEL_CARD.md").read_text()
    figures = json.loads(FIGURES.read_text())
    assert figure_tables(figures) in card
    assert figures["samples"]["num_prompts"] == 500
    assert figures["samples"]["num_pictures"] == figures["renders"]["num_pictures"] == 1000


@pytest.mark.slow
def test_the_control_falls_to_chance() -> None:
    """Held against the next prompt a picture is right by accident only: on the ground, where both prompts share it."""
    contents = [parse(prompt) for prompt in distinct_prompts(0, 500, is_heldout=True)]
    grounds = [content.ground for content in contents if content is not None]
    share = sum(map(str.__eq__, grounds, grounds[1:] + grounds[:1])) / len(grounds)
    shuffled = json.loads(FIGURES.read_text())["shuffled"]
    assert shuffled["ground"] == pytest.approx(share, abs=0.005)  # samples have the right ground in 99.5 % or more
    assert shuffled["exact"] < 0.01
