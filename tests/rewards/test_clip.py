"""The CLIP tower against open_clip's own transform and encoders, and what it says when weights are not there."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from rltune.builtin.render import render
from rltune.builtin.scenes import make_scene
from rltune.errors import RunError, UserError
from rltune.rewards import clip_loading as clip
from rltune.rewards.clip_loading import load_clip, weights_gb

LONG_PROMPT = "a red bird " * 5


def make_picture(height: int, width: int) -> Tensor:
    """A smooth ground with sharp shapes on it, whole multiples of 1/255 so that PIL reads it exactly."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    picture = torch.stack([rows, columns, 0.5 + 0.4 * torch.sin(6 * rows) * torch.cos(5 * columns)])
    picture[:, (rows - 0.5) ** 2 + (columns - 0.4) ** 2 < 0.06] = torch.tensor([0.8, 0.1, 0.3])[:, None]
    return (picture * 255).round() / 255


def to_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 65), (65, 49), (20, 24)])
def test_preprocessing_is_open_clips_own_but_for_its_rounding(clip_folder: Path, size: tuple[int, int]) -> None:
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    picture = make_picture(*size)
    expected = transform(to_pil(picture))
    actual = load_clip(str(clip_folder)).preprocess(picture[None])[0]
    assert actual.shape == expected.shape
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    error = (actual - expected).abs() * std * 255
    # PIL rounds to whole levels after each of two passes: half a level, plus half a level that the bicubic weights
    # (absolute sum at most 1.6) amplify; its 8-bit weights add a little.
    assert error.max() < 1.5
    assert error.mean() < 0.4


def test_only_what_overshoots_beside_saturated_edges_differs_from_open_clip(clip_folder: Path) -> None:
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    scenes = (render([make_scene(0, i) for i in range(16)]) * 255).round() / 255
    expected = torch.stack([transform(to_pil(scene)) for scene in scenes])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    error = (load_clip(str(clip_folder)).preprocess(scenes) - expected).abs() * std * 255
    assert error.mean() < 0.4
    assert (error > 1.5).float().mean() < 0.01  # 0.7 % exceed one level at this size


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_squash_and_bilinear_are_followed(clip_folder: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    folder = edited_copy(
        clip_folder, tmp_path, {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5] * 3}
    )
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    picture = make_picture(*size)
    actual = load_clip(str(folder)).preprocess(picture[None])[0]
    assert (actual - transform(to_pil(picture))).abs().max() < 1.5 / 255 / 0.26  # levels over the least std


@pytest.mark.parametrize("size", [(64, 64), (96, 65), (40, 70), (20, 24)])
def test_a_longer_side_resized_is_followed_by_black(clip_folder: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    folder = edited_copy(clip_folder, tmp_path, {"resize_mode": "longest"})
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    picture = 0.25 + 0.5 * make_picture(*size)  # clear of black, so that a shifted edge would show
    picture = (picture * 255).round() / 255
    error = (load_clip(str(folder)).preprocess(picture[None])[0] - transform(to_pil(picture))).abs()
    assert error.max() < 1.5 / 255 / 0.26  # levels over the least std, as above


def test_embeddings_are_open_clips(clip_folder: Path) -> None:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    tower = load_clip(str(clip_folder))
    picture = make_picture(32, 32)  # the model's own size, so that no resizing differs
    with torch.no_grad():
        image_1D = model.eval().encode_image(transform(to_pil(picture))[None], normalize=True)
        text_2D = model.encode_text(tokenizer(["a cat", "two birds"]), normalize=True)
    torch.testing.assert_close(tower.image_features(picture[None]), image_1D, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower.text_features(["a cat", "two birds"]), text_2D, rtol=1e-5, atol=1e-5)


def test_the_tower_is_frozen_in_float32_and_evaluation_mode(clip_folder: Path) -> None:
    model = load_clip(str(clip_folder)).model
    assert not model.training
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(False, torch.float32)}


def test_a_prompt_is_embedded_once(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = load_clip(str(clip_folder))
    encode, seen = tower.model.encode_text, []
    monkeypatch.setattr(tower.model, "encode_text", lambda ids, **rest: seen.append(ids) or encode(ids, **rest))
    first = tower.text_features(["a cat", "a dog", "a cat"])
    assert torch.equal(tower.text_features(["a dog", "a cat"]), first[[1, 0]])
    assert len(seen) == 2


def test_a_prompt_first_seen_in_inference_mode_can_be_trained_on(clip_folder: Path) -> None:
    tower = load_clip(str(clip_folder))
    with torch.inference_mode():
        tower.text_features(["a cat"])
    images = torch.rand(1, 3, 32, 32).requires_grad_()
    (tower.image_features(images) * tower.text_features(["a cat"])).sum().backward()
    assert images.grad is not None


def test_a_cut_prompt_is_named_once(clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tower = load_clip(str(clip_folder))
    with caplog.at_level(logging.WARNING):
        tower.text_features(["a cat"])
        assert not caplog.records
        tower.text_features([LONG_PROMPT, LONG_PROMPT + "x"])
    assert [LONG_PROMPT in record.getMessage() for record in caplog.records] == [True]
    assert "24 tokens" in caplog.text


@pytest.mark.parametrize(("num_letters", "is_cut"), [(22, False), (23, True)])
def test_a_prompt_is_cut_from_the_first_token_too_many(
    clip_folder: Path, caplog: pytest.LogCaptureFixture, num_letters: int, is_cut: bool
) -> None:
    with caplog.at_level(logging.WARNING):  # 24 tokens less the start and the end mark leave 22 letters
        load_clip(str(clip_folder)).text_features(["a" * num_letters])
    assert bool(caplog.records) == is_cut


def test_clips_published_tokenizer_says_when_it_cuts(clip_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tower = load_clip(str(clip_folder))
    tower._tokenizer = open_clip.get_tokenizer("ViT-B-32")
    ids_1L = tower._tokenizer(["a cat " * 37 + "cat"])
    assert not tower._is_cut("a cat " * 37 + "a", tower._tokenizer(["a cat " * 37 + "a"]))  # 75 words and two marks
    assert tower._is_cut("a cat " * 38, tower._tokenizer(["a cat " * 38]))
    assert ids_1L.shape == (1, 77)


def edited_copy(clip_folder: Path, tmp_path: Path, preprocess: dict[str, Any]) -> Path:
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= preprocess
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def without_weights(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()


def with_a_broken_config(folder: Path) -> None:
    (folder / "open_clip_config.json").write_text("{")


def with_other_weights(folder: Path) -> None:
    text = (folder / "open_clip_config.json").read_text()
    (folder / "open_clip_config.json").write_text(text.replace('"embed_dim": 16', '"embed_dim": 8'))


def with_another_resize(folder: Path) -> None:
    text = (folder / "open_clip_config.json").read_text()
    (folder / "open_clip_config.json").write_text(text.replace("bicubic", "nearest"))


@pytest.mark.parametrize("spoil", [without_weights, with_a_broken_config, with_other_weights, with_another_resize])
def test_a_folder_that_does_not_load_is_named(clip_folder: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    folder = edited_copy(clip_folder, tmp_path, {})
    spoil(folder)
    with pytest.raises(UserError, match=str(folder)):
        load_clip(str(folder))


def test_a_wrong_name_is_met_with_what_would_be_right() -> None:
    with pytest.raises(UserError, match="did you mean 'ViT-L-14'"):
        load_clip("ViT-L14/openai")
    with pytest.raises(UserError, match="did you mean 'openai'"):
        load_clip("ViT-L-14/opena")
    with pytest.raises(UserError, match="neither a folder nor MODEL/TAG"):
        load_clip("/no/such/folder")


def test_weights_out_of_reach_say_what_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to download weights")

    monkeypatch.setattr(clip.open_clip.factory, "download_pretrained", unreachable)
    with pytest.raises(RunError) as caught:
        load_clip("ViT-L-14/openai")
    message = str(caught.value)
    for part in ("ViT-L-14/openai", "open_clip_model.safetensors", "timm/vit_large_patch14_clip_224.openai", "1.7 GB"):
        assert part in message


def test_the_size_of_published_weights_is_known(caplog: pytest.LogCaptureFixture) -> None:
    assert weights_gb("ViT-B-32") == pytest.approx(151_277_313 * 4 / 1e9)  # 151 M parameters: the CLIP paper's
    assert not caplog.records


@pytest.mark.slow
def test_quick_gelu_is_what_the_weights_were_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    # open_clip builds ViT-B-32 with GELU and warns, but OpenAI's weights want QuickGELU.
    create, models = open_clip.create_model, []

    def without_loading(model: str, tag: str, **options: Any) -> Any:
        options |= {"require_pretrained": False, "load_weights": False}
        with torch.device("meta"):
            models.append(create(model, device="meta", **options))
        return models[-1]

    monkeypatch.setattr(clip.open_clip, "create_model", without_loading)
    monkeypatch.setattr(clip, "ClipTower", lambda model, *_, **__: model)  # nothing to share, nothing to freeze
    monkeypatch.setattr(clip, "check_hub", lambda repo, file: None)  # nor to fetch
    for name in ("ViT-B-32/openai", "ViT-B-32/laion2b_s34b_b79k"):
        load_clip(name)
    kinds = [type(model.visual.transformer.resblocks[0].mlp.gelu).__name__ for model in models]
    assert kinds == ["QuickGELU", "GELU"]


def test_the_shipped_model_loads() -> None:
    tower = load_clip("builtin")
    assert tower.image_features(make_picture(64, 64)[None]).norm().item() == pytest.approx(1, rel=1e-5)  # float32
