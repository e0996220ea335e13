"""The network of ImageReward: BLIP's image encoder, its text encoder that looks at the image, and a linear head.

Read from the published code (github.com/THUDM/ImageReward: ImageReward.py, and BLIP's blip_pretrain.py, med.py, vit.py)
and run by the BLIP of transformers, which has other names for the same parameters; files keep the published ones.

B: images in the batch. L: tokens of a prompt. N: patches of an image, and one more. S: its height and width. W: width
of the image encoder. D: width of the text encoder.
"""

import json
import math
import pickle
import re
from collections.abc import Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rltune.errors import UserError
from rltune.rewards.frozen import checkpoint_blocks, freeze, is_large

PUBLISHED_TEXT: Mapping[str, int | float] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
}
"""What ``med_config.json`` says of the text encoder and a network depends on."""
NUM_TOKENS = 35
"""What each prompt is padded or cut to."""
VISION_EPS = 1e-6
VISION_HEAD_WIDTH = 64
"""``vit.py``: the large encoder has 16 heads of width 64, the base one 12."""
HEAD_WIDTHS = (1024, 128, 64, 16, 1)
IGNORED = (
    "blip.vision_proj.",
    "blip.text_proj.",
    "blip.vision_proj_m.",
    "blip.text_proj_m.",
    "blip.visual_encoder_m.",
    "blip.text_encoder_m.",
    "blip.text_decoder.",
    "blip.text_encoder.pooler.",
    "blip.text_encoder.embeddings.position_ids",
    "blip.itm_head.",
    "blip.image_queue",
    "blip.text_queue",
    "blip.queue_ptr",
    "blip.ptr_queue",
    "blip.temp",
)
"""Beginnings of keys that BLIP's pretraining needs and the score does not; the first two and the positions are in the
published file."""
_RENAMED = (  # name here, published name
    (r"^vision\.embeddings\.patch_embedding\.", "blip.visual_encoder.patch_embed.proj."),
    (r"^vision\.embeddings\.class_embedding$", "blip.visual_encoder.cls_token"),
    (r"^vision\.embeddings\.position_embedding$", "blip.visual_encoder.pos_embed"),
    (r"^vision\.post_layernorm\.", "blip.visual_encoder.norm."),
    (r"^vision\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blip.visual_encoder.blocks.\1.norm\2."),
    (r"^vision\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"blip.visual_encoder.blocks.\1.attn.qkv."),
    (r"^vision\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blip.visual_encoder.blocks.\1.attn.proj."),
    (r"^vision\.encoder\.layers\.(\d+)\.mlp\.", r"blip.visual_encoder.blocks.\1.mlp."),
    (r"^text\.", "blip.text_encoder."),
    (r"^head\.", "mlp.layers."),
)


class ScoreNetwork(nn.Module):
    """Image and prompt tokens to the first token's features, and those to one number.

    Args:
        vision: Sizes of the image encoder, by the names of ``BlipVisionConfig``.
        text: Sizes of the text encoder, by the names of ``PUBLISHED_TEXT``.
    """

    def __init__(self, vision: Mapping[str, int], text: Mapping[str, int | float]) -> None:
        super().__init__()
        self.size_px = vision["image_size"]
        self.num_features = int(text["hidden_size"])
        self.vision: Any = BlipVisionModel(BlipVisionConfig(**vision, layer_norm_eps=VISION_EPS))
        # As a decoder it has cross-attention in each layer, which BLIP's encoder of images and text has too. Without
        # these ids of the full vocabulary, a small one does not warn.
        config = BlipTextConfig(
            **text, encoder_hidden_size=vision["hidden_size"], is_decoder=True, bos_token_id=None, sep_token_id=None
        )
        self.text: Any = BlipTextModel(config, add_pooling_layer=False)
        maps = [nn.Linear(m, n) for m, n in pairwise((self.num_features, *HEAD_WIDTHS))]
        gap = nn.Identity()  # where the published class has dropout, so that the indices of the state dict fit
        self.head = nn.Sequential(maps[0], gap, maps[1], gap, maps[2], gap, maps[3], maps[4])

    def features(self, pixels_B3SS: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the first token's features ``(B, D)``, differentiable in the pixels.

        Args:
            pixels_B3SS: Normalised images of ``size_px``.
            ids_BL: Tokens of the prompts.
            mask_BL: 1 where there is a token, 0 where there is padding.
        """
        patches_BNW: Tensor = self.vision(pixel_values=pixels_B3SS).last_hidden_state
        # is_decoder=False: each token attends to all others that are no padding. All patches are attended to.
        hidden_BLD: Tensor = self.text(
            input_ids=ids_BL, attention_mask=mask_BL, encoder_hidden_states=patches_BNW, is_decoder=False
        ).last_hidden_state
        return hidden_BLD[:, 0]


def read_text_sizes(path: Path | None) -> Mapping[str, int | float]:
    """Return the sizes of the text encoder from a ``med_config.json``, the published ones without a path.

    Raises:
        UserError: The file is not such a configuration.
    """
    if path is None:
        return PUBLISHED_TEXT
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: config[name] for name in PUBLISHED_TEXT}
        for name, value in sizes.items():
            kinds = int if isinstance(PUBLISHED_TEXT[name], int) else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
                raise ValueError(f"{name} is {value!r}")
        if sizes["max_position_embeddings"] < NUM_TOKENS:
            raise ValueError(f"max_position_embeddings is less than the {NUM_TOKENS} tokens of a prompt")
        if sizes["hidden_size"] % sizes["num_attention_heads"]:
            raise ValueError("hidden_size is not divisible by num_attention_heads")
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"hidden_act is {config['hidden_act']!r} and not 'gelu'")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"reward 'imagereward': config must be a med_config.json with {', '.join(PUBLISHED_TEXT)}, got {path} "
            f"({error})"
        ) from error
    return sizes


def load_network(path: Path, text: Mapping[str, int | float]) -> ScoreNetwork:
    """Return the frozen network with the weights of a file, large ones with blocks that recompute activations.

    Args:
        path: State dict under the published names, ``.safetensors`` or a PyTorch file.
        text: Sizes of the text encoder; those of the image encoder are those of its tensors.

    Raises:
        UserError: The file is not such a state dict, or has other tensors than the network.
    """
    state = _read_state(path)
    with torch.device("meta"):  # nothing is allocated or drawn: all tensors come from the file
        network = ScoreNetwork(_vision_sizes(state, path), text)
    own = network.state_dict()
    _check_tensors(state, {published_name(name): tensor for name, tensor in own.items()}, path)
    network.load_state_dict({name: state[published_name(name)] for name in own}, assign=True)
    # A buffer that is in no file, and so is still without values.
    network.text.embeddings.position_ids = torch.arange(int(text["max_position_embeddings"]))[None]
    freeze(network)
    if is_large(network):
        checkpoint_blocks(network.vision.encoder.layers)
        checkpoint_blocks(network.text.encoder.layer)
    return network


def published_name(name: str) -> str:
    """Return what the published file calls a tensor of ``ScoreNetwork``."""
    for pattern, replacement in _RENAMED:
        renamed, num_changes = re.subn(pattern, replacement, name)
        if num_changes:
            return renamed
    raise AssertionError(f"{name} has no published name")


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("it holds something else")
    except (pickle.UnpicklingError, SafetensorError, OSError, EOFError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"reward 'imagereward': {path} does not load as a state dict ({error}); weights must be ImageReward.pt, "
            "whole, or a .safetensors file of the same tensors"
        ) from error
    return state


def _vision_sizes(state: Mapping[str, Tensor], path: Path) -> dict[str, int]:
    prefix = "blip.visual_encoder."
    try:
        num_positions, width = state[f"{prefix}pos_embed"].shape[1:]
        patch_px = state[f"{prefix}patch_embed.proj.weight"].shape[-1]
        inner_width = state[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"reward 'imagereward': {path} has not the image encoder of ImageReward.pt ({error!r})"
        ) from error
    numbers = (re.match(re.escape(prefix) + r"blocks\.(\d+)\.", name) for name in state)
    num_side = math.isqrt(num_positions - 1)
    if num_side**2 != num_positions - 1 or width % VISION_HEAD_WIDTH:
        raise UserError(
            f"reward 'imagereward': {path} has an image encoder of {num_positions} positions and width {width}; it "
            f"must have one position and those of a square of patches, and a multiple of {VISION_HEAD_WIDTH} as width"
        )
    return {
        "hidden_size": width,
        "intermediate_size": inner_width,
        "num_hidden_layers": 1 + max(int(number[1]) for number in numbers if number),
        "num_attention_heads": width // VISION_HEAD_WIDTH,
        "image_size": num_side * patch_px,
        "patch_size": patch_px,
    }


def _check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    faults = [f"{name} is missing" for name in expected if name not in state]
    faults += [f"{name} is unknown" for name in state if name not in expected and not name.startswith(IGNORED)]
    faults += [
        f"{name} is {tuple(state[name].shape)} {state[name].dtype} and should be {tuple(tensor.shape)} floating point"
        for name, tensor in expected.items()
        if name in state and (state[name].shape != tensor.shape or not state[name].is_floating_point())
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"reward 'imagereward': {path} has other tensors than the model: {', '.join(islice(faults, 3))}{more}; "
            "weights must be ImageReward.pt or the same tensors, and config the one that they were trained with"
        )
