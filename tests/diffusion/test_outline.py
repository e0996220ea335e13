"""A model without weights says of itself what the loaded one says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

from rltune.diffusion.loading import load_model
from rltune.diffusion.outline import RENAMED, find_pipeline, load_outline
from rltune.errors import UserError
from tests.tiny import hollow


@pytest.fixture
def bare(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """The tiny pipeline's folder without the values of its weights."""
    folder = tmp_path / "bare"
    shutil.copytree(tiny_pipeline, folder)
    hollow(folder)
    return folder


def test_an_outline_is_the_model_without_its_weights(tiny_pipeline: Path, bare: Path) -> None:
    outline, model = load_outline(bare, base="bare"), load_model(str(tiny_pipeline))
    assert type(outline) is type(model)
    assert outline.size_px == model.size_px
    assert outline.latent_shape(32, 16) == model.latent_shape(32, 16)
    tables = [each.read_table(num_steps=7, eta=0.5, shape=(4, 8, 8)) for each in (outline, model)]
    assert torch.equal(tables[0].timesteps_T, tables[1].timesteps_T)
    shapes = [{name: tuple(p.shape) for name, p in each.network.named_parameters()} for each in (outline, model)]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in outline.network.parameters())


def test_what_is_cut_off_has_no_part_in_the_embedding(tiny_pipeline: Path) -> None:
    model = load_model(str(tiny_pipeline))  # reads 14 letters; these are cut between words
    prompts = ["a cat", "four lobsters in a row", "an octopus, four fish"]
    cut = model.cut_off([*prompts, prompts[1]])
    assert list(cut) == prompts[1:]
    for prompt, lost in cut.items():
        letters = prompt.replace(" ", "")
        read = letters[: -len(lost.replace(" ", ""))]
        assert len(read) == 14
        assert read + lost.replace(" ", "") == letters
        kept = next(prompt[:i] for i in range(len(prompt)) if prompt[:i].replace(" ", "") == read)
        (whole,), (same,), (other,) = (
            model.encode_prompts([text]) for text in (prompt, kept + " 123", kept[:-1] + " 123")
        )
        assert torch.equal(whole["text"], same["text"])
        assert not torch.equal(whole["text"], other["text"])


SHARDS = json.dumps({"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "x-2.safetensors"}})


def half_of(file: str, share: float = 0.7) -> Callable[[Path], object]:
    """A file as a download leaves it that was broken off."""

    def cut(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(share * len(content))])

    return cut


def spoil_index(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model_index.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "the folder has no model_index.json"),
        (spoil_index('{"_class_name": "Stable'), r"model_index.json of .* is not whole \(JSONDecodeError"),
        (spoil_index("[]"), "model_index.json of .* is not whole"),
        (
            spoil_index(json.dumps({"_class_name": "PixArtPipeline"})),
            r"^model\.base: .* is a PixArtPipeline, which rltune cannot train; give one of AuraFlowPipeline, Chroma",
        ),
        (spoil_index(json.dumps({"_class_name": "StableDiffusionPipeline"})), "is no whole StableDiffusionPipeline"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), r"tokenizer of .* cannot be read \(FileNotFoundError"),
        (lambda folder: (folder / "unet" / "config.json").write_text("{"), "unet of .* cannot be read"),
        (
            lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
            "vae of .* it has no weights",
        ),
        (
            half_of("unet/diffusion_pytorch_model.safetensors"),
            r"unet of .*\.safetensors is not whole, it has \d+ of",
        ),
        (half_of("text_encoder/model.safetensors", 0.0), "text_encoder of .*is no safetensors file, or a part of one"),
        (lambda folder: (folder / "vae" / "x.safetensors.index.json").write_text(SHARDS), "x-2.safetensors, a part of"),
    ],
)
def test_a_folder_that_is_no_whole_pipeline_is_one_message(
    bare: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(bare)
    with pytest.raises(UserError, match=message) as raised:
        load_outline(found if (found := find_pipeline(str(bare))) else bare, base=str(bare))
    assert "fetch" not in str(raised.value)  # nothing to download: it is a path


@pytest.mark.slow
def test_a_class_that_diffusers_has_renamed_is_found_by_its_old_name(
    tiny_pipeline: Path, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(hasattr(diffusers, new) and not hasattr(diffusers, old) for old, new in RENAMED.items())
    assert RENAMED["Lumina2Text2ImgPipeline"] == "Lumina2Pipeline"  # as Lumina-Image-2.0's index has it
    monkeypatch.setitem(RENAMED, "OldPipeline", "StableDiffusionPipeline")
    folder = shutil.copytree(tiny_pipeline, bare.parent / "old")
    for place in (folder, bare):
        index = json.loads((place / "model_index.json").read_text())
        (place / "model_index.json").write_text(json.dumps({**index, "_class_name": "OldPipeline"}))
    assert type(load_model(str(folder))) is type(load_outline(bare, base="bare")) is type(load_model("builtin"))


@pytest.mark.parametrize("base", ["/no/such", "./no", "sd15", "a/b/c", "../x/y", "é/x", __file__])
def test_what_is_no_folder_and_no_name_on_the_hub_is_refused(base: str) -> None:
    with pytest.raises(
        UserError, match=r"^model\.base: (no such folder|this is a file), got .*; give a pipeline's folder"
    ):
        find_pipeline(base)


def test_what_may_be_on_the_hub_is_looked_for_in_the_cache_alone(
    tmp_path: Path, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(repo: str, file: str, revision: str | None = None) -> str | None:
        return str(bare / file) if (repo, revision) == ("me/mine", "v2") else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert find_pipeline("me/mine") is None
    assert find_pipeline("me/mine", "v2") == bare
