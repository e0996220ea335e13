"""Networks of the shipped layout with random weights, small where size is free: what the reward suite scores with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer

from rltune.builtin.counter import Counter
from rltune.builtin.judge import Judge
from tests.rewards.imagereward_layout import save_files

EMBED_DIM = 16
HIDDEN = [12, 8]
CONTEXT = 24


def save_tokenizer(folder: Path) -> int:
    letters = "abcdefghijklmnopqrstuvwxyz,"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    return len(tokens)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder: 32 px, bicubic, crop after resizing the shorter side."""
    folder = tmp_path_factory.mktemp("clip")
    vocab_size = save_tokenizer(folder)
    model_cfg = {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": vocab_size, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**model_cfg)
    model_cfg["text_cfg"]["hf_tokenizer_name"] = "local"
    preprocess_cfg = {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aesthetic head with two hidden layers."""
    torch.manual_seed(1)
    widths = [EMBED_DIM, *HIDDEN, 1]
    state = {}
    for i in range(len(widths) - 1):
        layer = nn.Linear(widths[i], widths[i + 1])
        state |= {f"layers.{2 * i}.weight": layer.weight.detach(), f"layers.{2 * i}.bias": layer.bias.detach()}
    header = {"in": str(EMBED_DIM), "hidden": json.dumps(HIDDEN), "activation": "silu", "offset": "5.5", "scale": "2.0"}
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(state, path, metadata=header)
    return path


@pytest.fixture(scope="session")
def counter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A counter that has learnt nothing."""
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("counter") / "counter.safetensors"
    save_file(Counter().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def judge_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge that has learnt nothing."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    save_file(Judge().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def imagereward_options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small ImageReward that has learnt nothing."""
    return save_files(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture(scope="session")
def reward_options(
    clip_folder: Path, head_file: Path, counter_file: Path, judge_file: Path, imagereward_options: dict[str, str]
) -> Mapping[str, Mapping[str, Any]]:
    """Name -> options with which the suite builds a reward; one that needs weights has an entry here."""
    return {
        "aesthetic": {"clip": str(clip_folder), "head": str(head_file)},
        "alignment": {"model": str(clip_folder)},
        "count": {"weights": str(counter_file)},
        "presence": {"weights": str(counter_file)},
        "faithful": {"weights": str(judge_file)},
        "faithful_exact": {"weights": str(judge_file)},
        "imagereward": imagereward_options,
    }
