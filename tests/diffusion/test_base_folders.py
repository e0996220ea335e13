"""Base folders as they are found: of a variant alone, with a missing safety checker, cut; loaded, or one message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from rltune.diffusion.loading import load_model
from rltune.errors import UserError
from tests.tiny_families import lively, sdxl

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def half(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline in float16, as a variant: no file has the usual name."""
    folder = tmp_path_factory.mktemp("half")
    StableDiffusionPipeline.from_pretrained(tiny_pipeline, dtype=torch.float16).save_pretrained(folder, variant="fp16")
    return folder


@pytest.mark.slow
def test_a_variant_that_is_alone_is_taken(half: Path, tiny_pipeline: Path) -> None:
    assert not (half / UNET).exists()
    loaded, whole = load_model(str(half)), load_model(str(tiny_pipeline))
    assert loaded.network.dtype == torch.float32
    for name in ("unet", "vae", "text_encoder"):
        values = getattr(whole.pipeline, name).state_dict()
        for key, value in getattr(loaded.pipeline, name).state_dict().items():
            assert torch.equal(value, values[key].half().float() if value.is_floating_point() else values[key]), key


@pytest.mark.slow
def test_so_is_sdxl_s_with_both_text_encoders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipeline = lively(sdxl())
    pipeline.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert len(list(tmp_path.rglob("*.fp16.safetensors"))) == len(list(tmp_path.rglob("*.safetensors"))) == 4
    loaded = load_model(str(tmp_path))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        values = getattr(pipeline, name).state_dict()
        for key, value in getattr(loaded.pipeline, name).state_dict().items():
            assert torch.equal(value, values[key].float() if value.is_floating_point() else values[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("has_both", [True, False])
def test_the_usual_file_comes_first_and_a_variant_serves_where_it_is_missing(
    half: Path, tiny_pipeline: Path, tmp_path: Path, has_both: bool
) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "mixed")
    shutil.copy(half / "unet/diffusion_pytorch_model.fp16.safetensors", folder / "unet")
    if not has_both:
        (folder / UNET).unlink()
    weight = load_model(str(folder)).network.state_dict()["conv_in.weight"]
    usual = load_model(str(tiny_pipeline)).network.state_dict()["conv_in.weight"]
    assert torch.equal(weight, usual if has_both else usual.half().float())
    assert not torch.equal(usual, usual.half().float())


def edited(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def test_what_is_not_read_may_be_missing(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "base")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    unread = {"safety_checker": checker, "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    edited(folder, "model_index.json", lambda index: index.update(unread, requires_safety_checker=True))
    assert load_model(str(folder)).pipeline.safety_checker is None


def test_a_size_may_be_height_and_width(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pipeline, tmp_path / "base")
    edited(folder, "unet/config.json", lambda config: config.update(sample_size=[8, 12]))
    assert load_model(str(folder)).size_px == (16, 24)


def cut(file: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:60])


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edited(folder, "model_index.json", change)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut index": (cut("model_index.json"), r"model_index\.json of .* is not whole \(JSONDecodeError"),
    "no object": (lambda folder: (folder / "model_index.json").write_text("[1]"), "is not whole"),
    "no class": (index(lambda content: content.pop("_class_name")), r"is not whole \(KeyError: '_class_name'\)"),
    "odd entry": (index(lambda content: content.update(unet="x")), "could not be loaded"),
    "unknown class": (index(lambda content: content.update(unet=["diffusers", "Net"])), "could not be loaded .*`Net`"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "has no folder tokenizer, which its index"),
    "tokenizer not named": (index(lambda content: content.pop("tokenizer")), "could not be loaded"),
    "no weights": (lambda folder: (folder / UNET).unlink(), "could not be loaded .*no file named"),
    "cut weights": (cut(UNET), "could not be loaded .*Unable to load weights"),
    "cut config": (cut("unet/config.json"), "could not be loaded .*not a valid JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_is_not_whole_is_one_message_that_fits_a_path(
    tiny_pipeline: Path, tmp_path: Path, case: str
) -> None:
    damage, message = BROKEN[case]
    folder = shutil.copytree(tiny_pipeline, tmp_path / "base")
    damage(folder)
    with pytest.raises(UserError, match=rf"^model\.base: .*{message}.*; copy the folder anew, whole$") as caught:
        load_model(str(folder))
    assert "fetch" not in str(caught.value)  # a path cannot be downloaded
