"""ImageReward against the formulas of its published code, written out on the published keys, and its files' refusal.

B: images. L: tokens. N: positions of the image encoder.
"""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import BertTokenizerLegacy

from rltune.builtin.render import render
from rltune.builtin.scenes import make_scene
from rltune.errors import RunError, UserError
from rltune.rewards import frozen
from rltune.rewards.base import REWARDS
from rltune.rewards.blip import PUBLISHED_TEXT, ScoreNetwork, published_name
from rltune.rewards.imagereward import WEIGHTS, ImageReward, PromptTokenizer, build_imagereward
from rltune.rewards.weights import WeightsFile
from tests.rewards import imagereward_layout as layout

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]
SIZE_PX = 32
LONG = "a red circle and two blue stars on a white background " * 4
PROMPTS = ("a red circle", "", "two blue stars and an orange ring on a blue background", LONG, "unheard of", "a " * 33)
Options = dict[str, str]


def tokens_by_hand(prompt: str) -> tuple[list[int], list[int]]:
    """Ids and mask of a prompt of whole words."""
    words = [layout.VOCAB.index(word) if word in layout.VOCAB else 1 for word in prompt.split()]
    ids = [2, *words[:33], 3]
    return ids + [0] * (35 - len(ids)), [1] * len(ids) + [0] * (35 - len(ids))


class Reference:
    """The published formulas, vit.py's and med.py's, on the published keys; nothing of a library but its arithmetic."""

    def __init__(self, state: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.state = {key: value.to(dtype) for key, value in state.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        unit = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        return unit * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int, bias: Tensor | None = None) -> Tensor:
        width = query.shape[-1] // num_heads
        heads = []
        for i in range(num_heads):
            part = slice(i * width, (i + 1) * width)
            logits = torch.einsum("bld,bnd->bln", query[..., part], key[..., part]) / math.sqrt(width)
            logits = logits if bias is None else logits + bias
            weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
            heads.append(weights / weights.sum(dim=-1, keepdim=True) @ value[..., part])
        return torch.cat(heads, dim=-1)

    def see(self, pixels: Tensor) -> Tensor:
        pre, patch = "blip.visual_encoder", layout.TINY_VISION["patch_px"]
        side = pixels.shape[-1] // patch
        kernel = self.state[f"{pre}.patch_embed.proj.weight"].flatten(1)
        patches = pixels.reshape(-1, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = patches @ kernel.T + self.state[f"{pre}.patch_embed.proj.bias"]
        x = torch.cat([self.state[f"{pre}.cls_token"].expand(len(x), -1, -1), x], dim=1)
        x = x + self.state[f"{pre}.pos_embed"]
        for i in range(layout.TINY_VISION["depth"]):
            block = f"{pre}.blocks.{i}"
            query, key, value = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, dim=-1)
            x = x + self.linear(f"{block}.attn.proj", self.attend(query, key, value, num_heads=x.shape[-1] // 64))
            inner = self.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", inner)
        return self.norm(f"{pre}.norm", x, 1e-6)

    def attention(self, name: str, x: Tensor, seen: Tensor, bias: Tensor | None) -> Tensor:
        query, key, value = (
            self.linear(f"{name}.self.{part}", of) for part, of in (("query", x), ("key", seen), ("value", seen))
        )
        mixed = self.attend(query, key, value, layout.TINY_TEXT["num_attention_heads"], bias)
        return self.norm(f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", mixed) + x, 1e-12)

    def features(self, images: Tensor, prompts: tuple[str, ...]) -> Tensor:
        """First-token features of images that have the model's size."""
        seen = self.see((images - CLIP_MEAN.to(images.dtype)) / CLIP_STD.to(images.dtype))
        pairs = [tokens_by_hand(prompt) for prompt in prompts]
        ids, mask = torch.tensor([ids for ids, _ in pairs]), torch.tensor([mask for _, mask in pairs])
        bias = -10000.0 * (1 - mask[:, None, :]).to(images.dtype)
        pre = "blip.text_encoder"
        x = self.state[f"{pre}.embeddings.word_embeddings.weight"][ids]
        x = x + self.state[f"{pre}.embeddings.position_embeddings.weight"][:35]
        x = self.norm(f"{pre}.embeddings.LayerNorm", x, 1e-12)
        for i in range(layout.TINY_TEXT["num_hidden_layers"]):
            layer = f"{pre}.encoder.layer.{i}"
            x = self.attention(f"{layer}.attention", x, x, bias)
            x = self.attention(f"{layer}.crossattention", x, seen, None)
            inner = self.gelu(self.linear(f"{layer}.intermediate.dense", x))
            x = self.norm(f"{layer}.output.LayerNorm", self.linear(f"{layer}.output.dense", inner) + x, 1e-12)
        return x[:, 0]

    def score(self, images: Tensor, prompts: tuple[str, ...]) -> Tensor:
        x = self.features(images, prompts)
        for i in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{i}", x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def make_images(num: int = len(PROMPTS), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(num, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
        dtype
    )


def build(options: Options, **others: Any) -> ImageReward:
    REWARDS.check("imagereward", options | others)
    return build_imagereward(**(options | others))


# Off by at most 6e-6 and 1e-14, for features up to 3: sums of 128 terms in another order, five layers deep.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_features_score_and_gradient_are_those_of_the_published_formulas(
    imagereward_options: Options, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    if dtype == torch.float64:  # rewards cast with ``float()``: make it mean double
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        monkeypatch.setattr(torch.nn.Module, "float", torch.nn.Module.double)
    reward, reference = build(imagereward_options), Reference(layout.random_state(), dtype)
    images = make_images(dtype=dtype).requires_grad_()
    for ours, theirs in (
        (reward.features(images, PROMPTS), reference.features(images, PROMPTS)),
        (reward(images, PROMPTS), reference.score(images, PROMPTS)),
        (gradient(reward, images), gradient(reference.score, images)),
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def gradient(score: Callable[[Tensor, tuple[str, ...]], Tensor], images: Tensor) -> Tensor:
    (gradient_B3HW,) = torch.autograd.grad(score(images, PROMPTS).sum(), images)
    return gradient_B3HW


def test_prompt_and_image_both_move_the_score(imagereward_options: Options) -> None:
    reward, images = build(imagereward_options), make_images()
    by_prompt_BD = reward.features(images[:1].expand_as(images), PROMPTS)
    by_image_BD = reward.features(images, PROMPTS[:1] * len(images))
    assert by_prompt_BD.shape == (len(PROMPTS), 24)
    # The last layer norm keeps features near 1; what is lost on the way must not drown in the tolerance above.
    assert by_prompt_BD.std(dim=0).mean() > 0.02
    assert by_image_BD.std(dim=0).mean() > 0.02


def test_the_true_sizes_have_the_published_keys() -> None:
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        network = ScoreNetwork(vision | {"image_size": 224, "patch_size": 16}, PUBLISHED_TEXT)
    shapes = {published_name(name): tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes == layout.published_shapes(layout.PUBLISHED_VISION, layout.PUBLISHED_TEXT)
    assert shapes["blip.text_encoder.embeddings.word_embeddings.weight"] == (30524, 768)
    assert shapes["blip.visual_encoder.pos_embed"] == (1, 197, 1024)
    assert shapes["blip.visual_encoder.blocks.23.attn.qkv.weight"] == (3072, 1024)
    assert shapes["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"] == (768, 1024)
    assert shapes["mlp.layers.0.weight"] == (1024, 768)
    # The published file is 1 786 880 927 bytes. Besides these it holds two projections to 256 numbers and the positions
    # in int64; PyTorch's format adds a few hundred bytes a tensor.
    num_bytes = 4 * sum(math.prod(shape) for shape in shapes.values())
    num_bytes += 4 * (256 * (1024 + 1) + 256 * (768 + 1)) + 8 * 512
    assert 200 < (1_786_880_927 - num_bytes) / (len(shapes) + 5) < 500
    assert WEIGHTS.size_mb == pytest.approx(1786.880927, abs=0.1)


def test_large_networks_compute_their_blocks_again_and_give_the_same_gradient(
    imagereward_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(reward: ImageReward) -> tuple[list[int], Tensor]:
        calls = [0, 0]
        network: Any = reward._network
        for i, module in enumerate((network.vision.encoder.layers[0].mlp, network.text.encoder.layer[1].intermediate)):
            module.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        return calls, gradient(reward, make_images().requires_grad_())

    calls, expected = count(build(imagereward_options))
    assert calls == [1, 1]
    monkeypatch.setattr(frozen, "LARGE", 0)
    calls, actual = count(build(imagereward_options))
    assert calls == [2, 2]
    assert torch.equal(actual, expected)  # the same operations on the same numbers


def pil_pipeline(size_px: int) -> Any:
    resized = Resize(size_px, interpolation=InterpolationMode.BICUBIC)
    mean, std = CLIP_MEAN.flatten().tolist(), CLIP_STD.flatten().tolist()
    return Compose([resized, CenterCrop(size_px), ToTensor(), Normalize(mean, std)])


@pytest.mark.parametrize("size", [(64, 64), (160, 96), (65, 121)])
def test_preprocessing_is_the_published_one_but_for_its_rounding(imagereward_options: Options, size: Any) -> None:
    scenes = render([make_scene(0, i) for i in range(8)])
    pictures = (torch.nn.functional.interpolate(scenes, size, mode="bilinear") * 255).round() / 255
    pil = [Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()) for picture in pictures]
    expected = torch.stack([pil_pipeline(SIZE_PX)(picture) for picture in pil])
    error = (build(imagereward_options).preprocess(pictures) - expected).abs() * CLIP_STD.float() * 255
    # Levels of 255. PIL rounds after each of two passes and clips what overshoots beside saturated edges.
    assert error.mean() < 0.4
    assert (error > 1.5).float().mean() < 0.02


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("", ["[CLS]", "[SEP]"]),
        ("A Red circle, A CAT", ["[CLS]", "a", "red", "circle", ",", "a", "cat", "[SEP]"]),
        ("cats catstas", ["[CLS]", "cat", "##s", "cat", "##sta", "##s", "[SEP]"]),
        ("a \u00e0  caf\u00e9\nring", ["[CLS]", "a", "a", "[UNK]", "ring", "[SEP]"]),
    ],
)
def test_a_prompt_becomes_berts_tokens(imagereward_options: Options, prompt: str, tokens: list[str]) -> None:
    vocab = Path(imagereward_options["vocab"])
    tokenizer = PromptTokenizer(vocab, vocab_size=len(layout.VOCAB) + 2)
    ids_BL, mask_BL = tokenizer([prompt], torch.device("cpu"))
    expected = [layout.VOCAB.index(token) for token in tokens]
    assert ids_BL.tolist() == [expected + [0] * (35 - len(expected))]
    assert mask_BL.tolist() == [[1] * len(expected) + [0] * (35 - len(expected))]
    # The implementation in Python, which the published code ran.
    legacy = BertTokenizerLegacy(str(vocab))
    assert legacy(prompt, padding="max_length", truncation=True, max_length=35)["input_ids"] == ids_BL[0].tolist()


def test_blips_own_tokens_follow_berts(imagereward_options: Options) -> None:
    tokenizer = PromptTokenizer(Path(imagereward_options["vocab"]), vocab_size=len(layout.VOCAB) + 2)
    ids_BL, _ = tokenizer(["[DEC] a [ENC]"], torch.device("cpu"))
    size = len(layout.VOCAB)
    assert ids_BL[0, :5].tolist() == [2, size, layout.VOCAB.index("a"), size + 1, 3]


def test_the_first_prompt_that_is_cut_is_named_once(
    imagereward_options: Options, caplog: pytest.LogCaptureFixture
) -> None:
    reward, image = build(imagereward_options), make_images(1)
    with caplog.at_level(logging.WARNING):
        reward(image, ["a " * 33])  # 33 words and two marks: all of it is read
        assert not caplog.records
        for prompt in ("red " * 34, "red " * 34, "blue " * 50):
            reward(image, [prompt])
    (record,) = caplog.records
    assert "reads 35 tokens" in record.getMessage()
    assert repr("red " * 34) in record.getMessage()


def test_a_prompt_is_tokenised_once(imagereward_options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    reward, image = build(imagereward_options), make_images(1)
    before = reward(image, ["a red circle"])
    monkeypatch.setattr(reward._tokenizer, "_tokenizer", None)
    assert torch.equal(reward(image, ["a red circle"]), before)


def test_safetensors_and_half_precision_files_load(imagereward_options: Options, tmp_path: Path) -> None:
    state = {key: value.half() if value.is_floating_point() else value for key, value in layout.random_state().items()}
    save_file(state, tmp_path / "model.safetensors")
    actual = build(imagereward_options, weights=str(tmp_path / "model.safetensors"))(make_images(), PROMPTS)
    expected = Reference(state, torch.float32).score(make_images(), PROMPTS)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)  # as above: float32


@pytest.mark.parametrize(("option", "file"), [("weights", "ImageReward.pt"), ("vocab", "vocab.txt")])
def test_a_file_that_is_not_here_is_named(
    imagereward_options: Options, monkeypatch: pytest.MonkeyPatch, option: str, file: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(WeightsFile, "find", lambda _: None)
    with pytest.raises(RunError) as caught:
        build({name: path for name, path in imagereward_options.items() if name != option})
    for part in ("reward 'imagereward'", file, "Apache-2.0", "rltune models fetch imagereward", f"option '{option}'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("option", ["weights", "vocab", "config"])
def test_an_option_that_names_no_file_is_refused(imagereward_options: Options, option: str) -> None:
    with pytest.raises(RunError, match=f"there is no file /no/such; {option} must be"):
        build(imagereward_options, **{option: "/no/such"})
    with pytest.raises(UserError, match=f"{option} must be the path of a file, got 3"):
        build(imagereward_options, **{option: 3})


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("num_bytes", [0, 100, 20_000])
def test_a_truncated_file_is_refused(imagereward_options: Options, tmp_path: Path, suffix: str, num_bytes: int) -> None:
    path = tmp_path / f"model.{suffix}"
    (torch.save if suffix == "pt" else save_file)(layout.random_state(), path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(UserError, match=rf"{path} does not load as a state dict .*ImageReward\.pt, whole"):
        build(imagereward_options, weights=str(path))


def without(*prefixes: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: value for key, value in state.items() if not key.startswith(prefixes)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("mlp.layers.7.bias"), "mlp.layers.7.bias is missing;"),
        (without("blip.text_encoder.encoder.layer.1."), r"layer\.1\.\S+ is missing, .* and 23 more"),
        (without("blip.visual_encoder.blocks.1."), r"blocks\.1\.\S+ is missing, .* and 9 more"),
        (without("blip.visual_encoder."), "has not the image encoder"),
        (lambda state: {"state_dict": state}, "does not load as a state dict"),
        (lambda state: list(state.values()), "does not load as a state dict"),
        (lambda state: state | {"blip.text_encoder.other": torch.ones(1)}, "blip.text_encoder.other is unknown;"),
        (
            lambda state: state | {"mlp.layers.0.weight": torch.ones(1024, 25)},
            r"mlp.layers.0.weight is \(1024, 25\) torch.float32 and should be \(1024, 24\) floating point",
        ),
        (
            lambda state: state | {"mlp.layers.7.bias": torch.ones(1, dtype=torch.int8)},
            r"mlp.layers.7.bias is \(1,\) torch.int8 and should be \(1,\) floating point",
        ),
        (
            lambda state: state | {"blip.text_encoder.embeddings.word_embeddings.weight": torch.ones(9, 24)},
            r"word_embeddings.weight is \(9, 24\) \S+ and should be \(26, 24\)",
        ),
        (lambda state: state | {"blip.visual_encoder.pos_embed": torch.ones(1, 16, 128)}, "of 16 positions"),
        (lambda state: state | {"blip.visual_encoder.pos_embed": torch.ones(17, 128)}, "has not the image encoder"),
        (lambda state: state | {"blip.visual_encoder.pos_embed": torch.ones(1, 17, 100)}, "width 100"),
    ],
)
def test_other_tensors_are_refused(
    imagereward_options: Options, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    torch.save(spoil(layout.random_state()), tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"{tmp_path}/model.pt .*{message}"):
        build(imagereward_options, weights=str(tmp_path / "model.pt"))


def test_what_pretraining_alone_needs_is_passed_over(imagereward_options: Options, tmp_path: Path) -> None:
    extra = ("blip.text_queue", "blip.visual_encoder_m.cls_token", "blip.text_decoder.bert.x", "blip.itm_head.weight")
    torch.save(layout.random_state() | {key: torch.ones(2) for key in extra}, tmp_path / "model.pt")
    expected = build(imagereward_options)(make_images(), PROMPTS)
    assert torch.equal(build(imagereward_options, weights=str(tmp_path / "model.pt"))(make_images(), PROMPTS), expected)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (layout.VOCAB[:-1], "2 tokens fewer than the 26 that the model knows, got .* with 23 tokens"),
        ([*layout.VOCAB, "more"], "with 25 tokens"),
        (["[NONE]", *layout.VOCAB[1:]], r"with 24 tokens and no \[PAD\]"),
        (["\udcff"], "vocab must be a text file"),
    ],
)
def test_another_vocabulary_is_refused(
    imagereward_options: Options, tmp_path: Path, lines: list[str], message: str
) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(lines), errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        build(imagereward_options, vocab=str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config must be a med_config.json with vocab_size, "),
        ("[]", "config must be"),
        (json.dumps({"vocab_size": 26}), r"\('hidden_size'\)"),
        (json.dumps(layout.TINY_TEXT | {"num_attention_heads": "3"}), "num_attention_heads is '3'"),
        (json.dumps(layout.TINY_TEXT | {"num_attention_heads": True}), "num_attention_heads is True"),
        (json.dumps(layout.TINY_TEXT | {"num_attention_heads": 5}), "not divisible"),
        (json.dumps(layout.TINY_TEXT | {"layer_norm_eps": 0}), "layer_norm_eps is 0"),
        (json.dumps(layout.TINY_TEXT | {"max_position_embeddings": 34}), "less than the 35 tokens"),
        (json.dumps(layout.TINY_TEXT | {"hidden_act": "relu"}), "hidden_act is 'relu'"),
    ],
)
def test_another_configuration_is_refused(
    imagereward_options: Options, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "med_config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        build(imagereward_options, config=str(tmp_path / "med_config.json"))


def test_without_a_configuration_the_published_one_holds(imagereward_options: Options) -> None:
    with pytest.raises(UserError, match="2 tokens fewer than the 30524 that the model knows"):
        build({name: path for name, path in imagereward_options.items() if name != "config"})
