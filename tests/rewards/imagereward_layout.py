"""The published layout of ImageReward's files, written down from its code, and small random files of that layout."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["a", "red", "circle", "two", "blue", "stars", "and", "an", "orange", "ring", "green", "cross", "on", "white"]
PIECES = ["background", "cat", "##s", "##sta", ","]
VOCAB = SPECIAL + WORDS + PIECES
TINY_VISION = {"width": 128, "depth": 3, "inner": 96, "patch_px": 8, "num_patches": 16}
TINY_TEXT: dict[str, Any] = {
    "vocab_size": len(VOCAB) + 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 37,
    "layer_norm_eps": 1e-12,
}
PUBLISHED_VISION = {"width": 1024, "depth": 24, "inner": 4096, "patch_px": 16, "num_patches": 196}
PUBLISHED_TEXT = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
}


def published_shapes(vision: dict[str, int], text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the tensors that the score is computed from."""
    width, inner, hidden = vision["width"], vision["inner"], text["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, num_in: int, num_out: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (num_out, num_in), (num_out,)

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    shapes["blip.visual_encoder.cls_token"] = (1, 1, width)
    shapes["blip.visual_encoder.pos_embed"] = (1, vision["num_patches"] + 1, width)
    shapes["blip.visual_encoder.patch_embed.proj.weight"] = (width, 3, vision["patch_px"], vision["patch_px"])
    shapes["blip.visual_encoder.patch_embed.proj.bias"] = (width,)
    for i in range(vision["depth"]):
        block = f"blip.visual_encoder.blocks.{i}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", width, 3 * width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", width, inner)
        linear(f"{block}.mlp.fc2", inner, width)
    norm("blip.visual_encoder.norm", width)
    embeddings = "blip.text_encoder.embeddings"
    shapes[f"{embeddings}.word_embeddings.weight"] = (text["vocab_size"], hidden)
    shapes[f"{embeddings}.position_embeddings.weight"] = (text["max_position_embeddings"], hidden)
    norm(f"{embeddings}.LayerNorm", hidden)
    for i in range(text["num_hidden_layers"]):
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for name, num_in in (("attention", hidden), ("crossattention", width)):
            linear(f"{layer}.{name}.self.query", hidden, hidden)
            linear(f"{layer}.{name}.self.key", num_in, hidden)
            linear(f"{layer}.{name}.self.value", num_in, hidden)
            linear(f"{layer}.{name}.output.dense", hidden, hidden)
            norm(f"{layer}.{name}.output.LayerNorm", hidden)
        linear(f"{layer}.intermediate.dense", hidden, text["intermediate_size"])
        linear(f"{layer}.output.dense", text["intermediate_size"], hidden)
        norm(f"{layer}.output.LayerNorm", hidden)
    widths = (hidden, 1024, 128, 64, 16, 1)
    for k, i in enumerate((0, 2, 4, 6, 7)):
        linear(f"mlp.layers.{i}", widths[k], widths[k + 1])
    return shapes


def random_state() -> dict[str, Tensor]:
    """A small state dict that keeps numbers near 1, with the unused tensors that the published file has too."""
    generator = torch.Generator().manual_seed(4)
    state = {}
    for name, shape in published_shapes(TINY_VISION, TINY_TEXT).items():
        noise = torch.randn(shape, generator=generator)
        is_matrix = name.endswith("weight") and len(shape) > 1 and "embeddings" not in name
        if is_matrix:
            gain = 2 if name.startswith("blip") else 1  # attention that prefers some tokens over others
            state[name] = gain * noise / noise[0].numel() ** 0.5
        else:
            is_gain = name.endswith("weight") and len(shape) == 1
            state[name] = 1 + 0.2 * noise if is_gain else 0.5 * noise
    hidden, width = TINY_TEXT["hidden_size"], TINY_VISION["width"]
    for name, size in (("text", hidden), ("vision", width)):
        state |= {f"blip.{name}_proj.weight": torch.ones(8, size), f"blip.{name}_proj.bias": torch.ones(8)}
    positions = torch.arange(TINY_TEXT["max_position_embeddings"])[None]
    return state | {"blip.text_encoder.embeddings.position_ids": positions}


def save_files(folder: Path) -> dict[str, str]:
    """Write weights, vocabulary and configuration; return the reward's options that name them."""
    torch.save(random_state(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB))
    unused = {"architectures": ["BertModel"], "encoder_width": 768, "type_vocab_size": 2, "hidden_act": "gelu"}
    (folder / "med_config.json").write_text(json.dumps(TINY_TEXT | unused))
    return {
        "weights": str(folder / "ImageReward.pt"),
        "vocab": str(folder / "vocab.txt"),
        "config": str(folder / "med_config.json"),
    }
