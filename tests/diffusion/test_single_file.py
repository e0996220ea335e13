"""Checkpoints in one file, in their authors' layout, give the very pipeline that they are of."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rltune.diffusion.loading import load_model
from rltune.diffusion.outline import find_pipeline, load_outline
from rltune.diffusion.single_file import holds, published_config, read_header
from rltune.errors import UserError
from tests.original_layout import original_flux, write_original, write_original_sd3
from tests.tiny_families import flux, lively, sd3, sdxl


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xl") / "folder"
    torch.manual_seed(0)
    pipeline = sdxl()
    config = CLIPTextConfig(**{**pipeline.text_encoder.config.to_dict(), "hidden_size": 24})
    pipeline.text_encoder = CLIPTextModel(config)  # by their widths they are told apart
    lively(pipeline).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "folder"
    torch.manual_seed(0)
    pipeline = lively(sd3())
    wide = CLIPTextConfig(**{**pipeline.text_encoder.config.to_dict(), "hidden_size": 24, "projection_dim": 24})
    pipeline.text_encoder = CLIPTextModelWithProjection(wide)  # by their widths they are told apart
    with torch.no_grad():
        pipeline.text_encoder.text_projection.weight.copy_(torch.eye(24))
    pipeline.save_pretrained(folder)
    return folder


def settings_of(folder: Path, target: Path) -> Path:
    """A pipeline's folder as ``rltune models fetch FILE`` brings it: without weights."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors")))


def check_same(one: Any, other: Any) -> None:
    for name, part in other.pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            ours = getattr(one.pipeline, name).state_dict()
            assert ours.keys() == part.state_dict().keys(), name
            for key, value in part.state_dict().items():
                assert torch.equal(ours[key], value), (name, key)


@pytest.mark.slow
def test_stable_diffusion_is_read_with_another_folder_s_settings(tiny_pipeline: Path, tmp_path: Path) -> None:
    file = write_original(tiny_pipeline, tmp_path / "model.safetensors")
    config = settings_of(tiny_pipeline, tmp_path / "settings")
    whole = load_model(str(tiny_pipeline))
    check_same(load_model(str(file), config=str(config)), whole)
    assert torch.equal(
        load_model(str(file), config=str(config)).encode_prompts(["a cat"])[0]["text"],
        whole.encode_prompts(["a cat"])[0]["text"],
    )
    outline = load_outline(config, base=str(file))
    assert outline.size_px == whole.size_px
    half = load_model(str(file), config=str(config), dtype=torch.bfloat16)
    assert half.network.dtype == half.pipeline.vae.dtype == half.pipeline.text_encoder.dtype == torch.bfloat16


@pytest.mark.slow
def test_sdxl_is_read_with_both_its_text_encoders(xl: Path, tmp_path: Path) -> None:
    file = write_original(xl, tmp_path / "model.safetensors")
    config = settings_of(xl, tmp_path / "settings")
    check_same(load_model(str(file), config=str(config)), load_model(str(xl)))


@pytest.mark.slow
@pytest.mark.parametrize("has_text", [True, False])
def test_stable_diffusion_3_is_read_with_and_without_its_text_encoders(
    three: Path, tmp_path: Path, has_text: bool
) -> None:
    file = write_original_sd3(three, tmp_path / "model.safetensors", has_text=has_text)
    config = settings_of(three, tmp_path / "settings") if has_text else three
    check_same(load_model(str(file), config=str(config)), load_model(str(three)))


@pytest.mark.slow
@pytest.mark.parametrize("is_dev", [True, False])
def test_every_tensor_of_flux_s_own_file_has_its_place(is_dev: bool) -> None:
    with torch.device("meta"):  # diffusers takes such a file at its full width alone
        network = FluxTransformer2DModel(num_layers=2, num_single_layers=3, guidance_embeds=is_dev)
    state = network.state_dict()
    file = original_flux(state, num_double=2, num_single=3)
    assert published_config(file) == f"black-forest-labs/FLUX.1-{'dev' if is_dev else 'schnell'}"
    assert holds(file, "transformer", FluxTransformer2DModel)
    assert not any(holds(file, name, kind) for name, kind in (("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)))
    read = convert_flux_transformer_checkpoint_to_diffusers(dict(file))
    assert {name: tensor.shape for name, tensor in read.items()} == {name: row.shape for name, row in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("lacks", ["vae", "text"])
def test_what_a_file_lacks_is_the_folder_s(tiny_pipeline: Path, tmp_path: Path, lacks: str) -> None:
    file = write_original(tiny_pipeline, tmp_path / "model.safetensors", **{lacks: False})
    check_same(load_model(str(file), config=str(tiny_pipeline)), load_model(str(tiny_pipeline)))
    config = settings_of(tiny_pipeline, tmp_path / "settings")
    for load in (lambda: load_model(str(file), config=str(config)), lambda: load_outline(config, base=str(file))):
        with pytest.raises(UserError, match=r"^model\.base: .*; copy the file anew, or name the folder of a pipeline"):
            load()


def test_a_denoiser_in_diffusers_own_names_is_a_checkpoint_too(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other.safetensors"
    torch.manual_seed(0)
    pipeline = lively(flux())
    pipeline.save_pretrained(folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    changed = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(changed, other)
    model = load_model(str(other), config=str(folder))
    assert all(torch.equal(value, changed[name]) for name, value in model.network.state_dict().items())
    assert torch.equal(model.pipeline.vae.decoder.conv_in.weight, pipeline.vae.decoder.conv_in.weight)


@pytest.mark.slow
def test_the_published_model_s_settings_are_looked_for_in_the_cache(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_original(tiny_pipeline, tmp_path / "my model.safetensors")
    assert published_config(read_header(file)) == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    with pytest.raises(UserError) as caught:
        find_pipeline(str(file))
    assert str(caught.value) == (
        f"model.base: '{file}' has weights alone, and its settings and tokenizers, those of "
        f"stable-diffusion-v1-5/stable-diffusion-v1-5, are not on this machine; run 'rltune models fetch '{file}'', or "
        "name the folder of a pipeline of its kind as model.config"
    )
    with pytest.raises(UserError, match=r"^model\.config: .* those of me/mine, .* run 'rltune models fetch me/mine'"):
        find_pipeline(str(file), config="me/mine")

    def cached(repo: str, name: str, revision: str | None = None) -> str | None:
        return str(tiny_pipeline / name) if repo == "stable-diffusion-v1-5/stable-diffusion-v1-5" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert find_pipeline(str(file)) == tiny_pipeline
    check_same(load_model(str(file)), load_model(str(tiny_pipeline)))


def test_what_is_no_such_file_is_one_message(tiny_pipeline: Path, xl: Path, tmp_path: Path) -> None:
    file = write_original(tiny_pipeline, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"^model\.config: no folder with a model_index.json, got '/no/such'; give"):
        load_model(str(file), config="/no/such")
    with pytest.raises(UserError, match=r"^model\.config: is for the settings of a checkpoint in one file, which mod"):
        load_model(str(tiny_pipeline), config=str(tiny_pipeline))
    with pytest.raises(UserError, match=r"^model\.base: .*could not be loaded .*name the folder of a pipeline of its"):
        load_model(str(file), config=str(xl))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"^model\.base: cut\.safetensors is not whole, it has \d+ of \d+ bytes; copy"):
        load_model(str(cut), config=str(tiny_pipeline))
    part = tmp_path / "part.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("time_embed.2.bias")}, part)
    with pytest.raises(UserError, match=r"^model\.base: .* lacks a part of the unet\); copy the file anew"):
        load_model(str(part), config=str(tiny_pipeline))


def test_an_unknown_family_s_settings_are_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    file = write_original(tiny_pipeline, tmp_path / "model.safetensors")
    config = settings_of(tiny_pipeline, tmp_path / "settings")
    index = json.loads((config / "model_index.json").read_text())
    (config / "model_index.json").write_text(json.dumps({**index, "_class_name": "PixArtSigmaPipeline"}))
    with pytest.raises(UserError, match="is a PixArtSigmaPipeline, which rltune cannot train"):
        load_model(str(file), config=str(config))
