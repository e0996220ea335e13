"""HPSv2, HPSv2.1 and PickScore against open_clip and transformers on the same random weights, and what they share."""

import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from rltune.errors import RunError, UserError
from rltune.rewards import frozen
from rltune.rewards.base import REWARDS
from rltune.rewards.clip import ClipTower, embeddings_kept
from rltune.rewards.clip_loading import VIT_H, _sizes
from rltune.rewards.frozen import checkpoint_blocks, held_bytes, share_equal
from rltune.rewards.hps import HPS_2
from rltune.rewards.pickscore import to_open_clip
from tests.rewards.conftest import make_clip_h

PROMPTS = ["a cat", "Two birds, on a WIRE!", "a " * 100]
"""One with capitals and marks, one that is cut at 77 tokens."""


def make_images(dtype: torch.dtype = torch.float32, size: int = 28) -> Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.Module, "float", torch.nn.Module.double)


def normalised(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(v) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (images - mean[:, None, None]) / std[:, None, None]


def hps_reference(seed: int, images: Tensor, dtype: torch.dtype) -> Tensor:
    model = make_clip_h(seed, num_shared=1).half().to(dtype).eval()
    ids = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
    image_BD = model.encode_image(normalised(images), normalize=True)
    return (image_BD * model.encode_text(ids, normalize=True)).sum(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [("hpsv2", 5), ("hpsv2_1", 6)])
def test_hps_is_open_clips_cosine(name: str, seed: int, reward_options: Any) -> None:
    images = make_images().requires_grad_()
    expected = hps_reference(seed, images, torch.float32)
    (slope,) = torch.autograd.grad(expected.sum(), images)
    actual = REWARDS.build(name, reward_options[name])(images, PROMPTS)
    # The same sums in float32, of 32 products of unit vectors: a few roundings of 6e-8. Measured: 6e-8.
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-7)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), images)[0], slope, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_hps_is_open_clips_cosine_in_float64(reward_options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hps_reference(5, make_images(torch.float64), torch.float64)
    in_float64(monkeypatch)
    actual = REWARDS.build("hpsv2", reward_options["hpsv2"])(make_images(torch.float64), PROMPTS)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def test_hps_sees_the_whole_of_an_image_that_is_not_square(reward_options: Any) -> None:
    wide = make_images(size=56)[:, :, 10:42]  # 32 x 56 becomes 16 x 28 between black bars of 6 rows
    reward = REWARDS.build("hpsv2", reward_options["hpsv2"])
    squeezed = torch.nn.functional.interpolate(wide, size=(16, 28), mode="bicubic", antialias=True)
    framed = torch.nn.functional.pad(squeezed, (0, 0, 6, 6))
    torch.testing.assert_close(reward(wide, PROMPTS), reward(framed, PROMPTS), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_pickscore_is_transformers_logit(pickscore_model: CLIPModel, reward_options: Any) -> None:
    images = make_images()
    tokenizer = transformers_tokenizer()
    ids = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    assert torch.equal(ids["input_ids"][1:2, :9], open_clip.get_tokenizer("ViT-H-14")(PROMPTS[1:2])[:, :9])
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_rescale=False)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = pickscore_model(pixel_values=pixels, **ids).logits_per_image.diagonal()
    actual = REWARDS.build("pickscore", reward_options["pickscore"])(images, PROMPTS)
    # Logits are 14.3 (exp of transformers' initial scale) times a cosine: roundings of 1e-6. Measured: 1e-6.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_pickscore_is_transformers_logit_in_float64(
    pickscore_model: CLIPModel, reward_options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(torch.float64).requires_grad_()
    twin = CLIPModel(pickscore_model.config).eval()
    twin.load_state_dict(pickscore_model.state_dict())
    ids = transformers_tokenizer()(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    expected = twin.double()(pixel_values=normalised(images), **ids).logits_per_image.diagonal()
    (slope,) = torch.autograd.grad(expected.sum(), images)
    in_float64(monkeypatch)
    actual = REWARDS.build("pickscore", reward_options["pickscore"])(images, PROMPTS)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), images)[0], slope, rtol=1e-9, atol=1e-12)


def tower_of(reward: Any) -> ClipTower:
    return reward._score._tower  # type: ignore[no-any-return]


def test_pickscores_preprocessing_is_its_processors_but_for_rounding(reward_options: Any) -> None:
    picture = (make_images(size=64)[0, :, :48] * 255).round().byte()
    picture = torch.nn.functional.avg_pool2d(picture.float(), 4).repeat_interleave(4, 1).repeat_interleave(4, 2).byte()
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = processor(images=Image.fromarray(picture.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
    reward = REWARDS.build("pickscore", reward_options["pickscore"])
    error = (tower_of(reward).preprocess(picture[None] / 255) - expected).abs() * 0.27 * 255
    assert error.max() < 1.5  # levels: 8-bit rounding, half a level and what bicubic weights make of it


@pytest.mark.slow
def test_the_published_architecture_has_the_names_and_shapes_we_read() -> None:
    published = open_clip.get_model_config("ViT-H-14")
    with torch.device("meta"):
        model = open_clip.CLIP(**published)
        vision = {"hidden_size": 1280, "num_attention_heads": 16, "num_hidden_layers": 32, "intermediate_size": 5120}
        text = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "intermediate_size": 4096}
        vision |= {"image_size": 224, "patch_size": 14}
        twin = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    sizes = _sizes(model.state_dict(), VIT_H)
    assert {"mlp_ratio": 4.0, **published["vision_cfg"]} == sizes["vision_cfg"]
    assert {"mlp_ratio": 4.0, **published["text_cfg"]} == sizes["text_cfg"]
    assert sizes["embed_dim"] == published["embed_dim"]
    assert {name: value.shape for name, value in to_open_clip(twin.state_dict()).items()} == shapes
    assert sum(value.numel() for value in model.state_dict().values()) == 986_109_441


@pytest.mark.slow
def test_two_versions_hold_once_what_they_have_in_common(reward_options: Any) -> None:
    alone = REWARDS.build("hpsv2_1", reward_options["hpsv2_1"])(make_images(), PROMPTS)
    old, new = (REWARDS.build(name, reward_options[name]) for name in ("hpsv2", "hpsv2_1"))
    models = [tower_of(reward).model for reward in (old, new)]
    blocks = (models[0].visual.transformer.resblocks, models[0].transformer.resblocks)
    common = sum(held_bytes([tower[0]]) for tower in blocks) + 49408 * 64 * 4
    saved = sum(held_bytes([model]) for model in models) - held_bytes(models)
    assert common <= saved < common + 20_000  # biases that no one has trained are equal too, and small
    kept = models[1].visual.transformer.resblocks[1].mlp.c_fc.weight
    assert kept is not models[0].visual.transformer.resblocks[1].mlp.c_fc.weight
    assert torch.equal(new(make_images(), PROMPTS), alone)


def test_parameters_are_shared_only_if_every_value_is_equal() -> None:
    torch.manual_seed(0)
    first, same, other = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    same.load_state_dict(first.state_dict())
    other.load_state_dict(first.state_dict())
    with torch.no_grad():
        other.weight[0, 1] += 1e-6  # between the values that are sampled
    share_equal(first)
    assert share_equal(same).weight is first.weight
    assert share_equal(other).weight is not first.weight
    assert other.bias is first.bias
    assert share_equal(torch.nn.Linear(64, 64).to(torch.float64)).weight is not first.weight


def test_rewards_on_one_tower_embed_an_image_once(
    clip_l_folder: Path, laion_head_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aesthetic = REWARDS.build("laion_aesthetic", {"clip": str(clip_l_folder), "head": str(laion_head_file)})
    score = REWARDS.build("clip_score", {"model": str(clip_l_folder)})
    assert tower_of(aesthetic) is tower_of(score)
    model, calls = tower_of(score).model, []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda x, **rest: calls.append(1) or encode(x, **rest))
    images = make_images().requires_grad_()
    apart = aesthetic(images, PROMPTS).sum() + score(images, PROMPTS).sum()
    (expected,) = torch.autograd.grad(apart, images)
    assert len(calls) == 2
    with embeddings_kept():
        together = aesthetic(images, PROMPTS).sum() + score(images, PROMPTS).sum()
        assert len(calls) == 3
        with torch.no_grad():
            assert not score(images, PROMPTS).requires_grad
            assert len(calls) == 3
        score(images * 0.5, PROMPTS)
        assert len(calls) == 4
    (actual,) = torch.autograd.grad(together, images)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)  # the order of a sum
    score(images, PROMPTS)
    assert len(calls) == 5  # after the end nothing is kept


def test_an_image_that_was_only_watched_first_still_gets_its_gradient(clip_folder: Path) -> None:
    reward = REWARDS.build("clip_score", {"model": str(clip_folder)})
    images = make_images().requires_grad_()
    (expected,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    with embeddings_kept():
        with torch.no_grad():
            reward(images, PROMPTS)
        total = reward(images, PROMPTS).sum()
    assert torch.equal(torch.autograd.grad(total, images)[0], expected)


def test_a_large_network_recomputes_its_blocks_and_has_the_same_gradient(
    reward_options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images().requires_grad_()
    (expected,) = torch.autograd.grad(REWARDS.build("hpsv2", reward_options["hpsv2"])(images, PROMPTS).sum(), images)
    monkeypatch.setattr(frozen, "LARGE", 1)
    reward = REWARDS.build("hpsv2", reward_options["hpsv2"])
    calls: list[int] = []
    block = tower_of(reward).model.visual.transformer.resblocks[0]
    block.ln_1.register_forward_hook(lambda *_: calls.append(1))
    value = reward(images, PROMPTS).sum()
    assert len(calls) == 1
    (actual,) = torch.autograd.grad(value, images)
    assert len(calls) == 2
    assert torch.equal(actual, expected)


def test_a_checkpointed_block_keeps_its_input_alone() -> None:
    block = torch.nn.Sequential(*[layer for _ in range(3) for layer in (torch.nn.Linear(4, 4), torch.nn.Tanh())])
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    x = torch.rand(5, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
        num_plain, _ = len(sizes), sizes.clear()
        checkpoint_blocks([block])
        block(x)
    assert num_plain >= 6
    assert len(sizes) <= 1


@pytest.mark.parametrize("name", ["hpsv2", "pickscore"])
def test_a_file_of_another_kind_is_named(name: str, reward_options: Any, tmp_path: Path) -> None:
    whole = Path(reward_options[name]["weights"])
    broken = tmp_path / whole.name
    for content in (whole.read_bytes()[: whole.stat().st_size // 2], b"", b"no weights"):
        broken.write_bytes(content)
        with pytest.raises(UserError, match=f"reward '{name}': {broken} is not"):
            REWARDS.build(name, {"weights": str(broken)})
    with pytest.raises(RunError, match=r"there is no file .*nothing; weights must be .*GB, .*huggingface"):
        REWARDS.build(name, {"weights": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match="weights must be the path of a file, got 3"):
        REWARDS.build(name, {"weights": 3})


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_a_checkpoint_of_another_model_is_refused_with_what_is_wrong(
    fault: str, hps_files: tuple[Path, Path], tmp_path: Path
) -> None:
    state = torch.load(hps_files[0], weights_only=True)["state_dict"]
    key = "visual.transformer.resblocks.1.ln_1.weight"
    if fault == "missing":
        del state[key]
    elif fault == "unexpected":
        key = "score_predictor.weight"
        state[key] = torch.zeros(1)
    else:
        state[key] = torch.zeros(7)
    torch.save({"state_dict": state}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=rf"other\.pt is not a checkpoint of ViT-H-14 .*{key}"):
        REWARDS.build("hpsv2", {"weights": str(tmp_path / "other.pt")})


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": Trap(tmp_path / "sprung")}}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match="is not a checkpoint"):
        REWARDS.build("hpsv2", {"weights": str(tmp_path / "trap.pt")})
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_missing_weights_say_what_to_fetch_and_where_to_put_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(RunError) as caught:
        REWARDS.build("hpsv2", {})
    for part in (
        HPS_2.file,
        "2.0 GB",
        "Apache-2.0",
        "huggingface.co/xswu/HPSv2",
        "rltune models fetch hpsv2",
        "'weights'",
    ):
        assert part in str(caught.value)


def transformers_tokenizer() -> CLIPTokenizer:
    """transformers' tokenizer on the vocabulary that open_clip ships, which is OpenAI's."""
    ours = open_clip.get_tokenizer("ViT-H-14")
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {marks.get(token, token): number for token, number in ours.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=list(ours.bpe_ranks))


@pytest.mark.long
@pytest.mark.parametrize("name", ["RN50", pytest.param("ViT-B-16-SigLIP", marks=pytest.mark.long)])
def test_towers_of_other_kinds_are_looked_through_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "LARGE", 1)  # as if it were large
    monkeypatch.setattr(logging.root.manager, "disable", logging.WARNING)  # that it has no weights
    model = open_clip.create_model(name, load_weights=False).eval()
    images = torch.rand(1, 3, 70, 60, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tower = ClipTower(model, open_clip.get_tokenizer(name) if name == "RN50" else lambda texts, **_: texts, name=name)
    features = tower.image_features(images)
    with torch.no_grad():
        expected = model.encode_image(tower.preprocess(images), normalize=True)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    (slope,) = torch.autograd.grad(features[0, 0], images)
    assert slope.isfinite().all()
    assert slope.abs().max() > 0
