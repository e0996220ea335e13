"""PickScore (arXiv:2305.01569): CLIP-H fine-tuned on which of two images a user picked."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rltune.errors import UserError
from rltune.rewards.alignment import Alignment
from rltune.rewards.base import REWARDS, Card
from rltune.rewards.clip_loading import load_clip_state
from rltune.rewards.weights import WeightsFile, locate

PICKSCORE = WeightsFile(repo="yuvalkirstain/PickScore_v1", file="model.safetensors", licence="MIT", size_mb=3945)

RENAMED = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"\.layer_norm1\.", ".ln_1."),
    (r"\.layer_norm2\.", ".ln_2."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)
"""Names of transformers' CLIPModel, and what open_clip calls them."""
PROJECTIONS = ("text_projection", "visual.proj")
"""Kept transposed by open_clip."""


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of transformers' ``CLIPModel`` under open_clip's names: query, key and value in one."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("position_ids") or re.search(r"\.self_attn\.[kv]_proj\.", key):
            continue  # counters that old versions saved; keys and values go with their query
        name = key
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if ".self_attn.q_proj." in name:
            parts = [state[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            name, value = name.replace(".self_attn.q_proj.", ".attn.in_proj_"), torch.cat(parts)
        renamed[name] = value.T if name in PROJECTIONS else value
    return renamed


def load_pickscore(path: Path) -> Alignment:
    """Return the score of the published checkpoint: the cosine times ``exp(logit_scale)``, which is about 100.

    The published one runs transformers' CLIPModel; ours runs the same weights in open_clip, whose tower the other CLIP
    rewards use too. They agree to float32 rounding.

    Raises:
        UserError: The file is not such a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = to_open_clip({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118, not a dict
        factor = math.exp(float(state["logit_scale"]))
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(
            f"reward 'pickscore': {path} is not PickScore's model.safetensors ({error}); fetch it again"
        ) from error
    return Alignment(load_clip_state(path, state, reward="pickscore"), factor=factor)


@REWARDS.register("pickscore", Card(scale="about 16 to 26", licence="MIT", weights=(PICKSCORE,)))
def build_pickscore(*, weights: str | None = None) -> Alignment:
    """PickScore v1, CLIP-H fine-tuned on what users picked.

    Args:
        weights: Path of its ``model.safetensors``; the Hugging Face cache if left out.

    Raises:
        UserError: The file is not such a checkpoint.
        RunError: It is not on this machine and cannot be fetched.
    """
    return load_pickscore(locate("pickscore", PICKSCORE, weights))
