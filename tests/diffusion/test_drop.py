"""T5 of Stable Diffusion 3 can be left out, and no other part of any model."""

import shutil
from pathlib import Path

import pytest
import torch

from rltune.diffusion.loading import load_model
from rltune.diffusion.outline import load_outline
from rltune.errors import UserError
from tests.tiny_families import lively, sd3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "folder"
    torch.manual_seed(0)
    lively(sd3()).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_model_without_t5_is_the_pipeline_without_it_and_needs_none_of_its_files(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "sd3")
    prompts = ["a cat", "two red birds"]
    both = load_model(str(folder))
    full = both.encode_prompts(prompts)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
    outline = load_outline(folder, base=str(folder), drop=["text_encoder_3"])
    model = load_model(str(folder), drop=["text_encoder_3"])
    assert model.pipeline.text_encoder_3 is model.pipeline.tokenizer_3 is outline.pipeline.text_encoder_3 is None
    for row, other in zip(model.encode_prompts(prompts), full, strict=True):
        num_clip = 77
        assert torch.equal(row["text"][:num_clip], other["text"][:num_clip])
        assert not row["text"][num_clip:].any()
        assert other["text"][num_clip:].any()
        assert torch.equal(row["pooled"], other["pooled"])
    long, longest = "a" * 100, "a" * 300  # a letter a token; CLIP reads 75, T5 255 with the space before them
    assert list(both.cut_off(["a cat", long, longest])) == [longest]
    for each in (model, outline):
        assert each.cut_off(["a cat", long, longest]) == {long: "a" * 25, longest: "a" * 225}


@pytest.mark.parametrize("name", ["text_encoder", "vae"])
def test_what_sd3_needs_stays(whole: Path, name: str) -> None:
    message = rf"^model\.drop: a StableDiffusion3 cannot do without its {name}, got '{name}'; it can do without text_en"
    with pytest.raises(UserError, match=message):
        load_model(str(whole), drop=[name])
    with pytest.raises(UserError, match=message):
        load_outline(whole, base="sd3", drop=[name])


def test_others_need_all_they_have(tiny_pipeline: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.drop: a StableDiffusion cannot do without .*; leave it out, this"):
        load_model(str(tiny_pipeline), drop=["text_encoder"])
