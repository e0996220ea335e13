"""PrefPaint's reward (arXiv:2410.21966): how well an image is filled, seen beside what was given of it.

B: images in the batch. D: width of a CLIP embedding. F: width of the last features. H, W: image rows and columns.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rltune.canvas import Canvas
from rltune.errors import UserError
from rltune.rewards.base import REWARDS, Card
from rltune.rewards.clip import ClipTower
from rltune.rewards.clip_loading import VIT_B, load_clip, load_clip_state
from rltune.rewards.frozen import freeze
from rltune.rewards.weights import WeightsFile, locate

NAME = "prefpaint"
WEIGHTS = WeightsFile(repo="kd5678/prefpaintReward", file="prefpaintReward.pt", licence="not stated", size_mb=658)
"""The size is that of the layout in float32; the file's own has not been seen."""
BLOCK = "vit_block.transformer_encoder.layers.0."
CLIP = "clip_model."


class Head(nn.Module):
    """A transformer block on one token, two linear maps to the last features, and one to the score.

    As the published code builds it (github.com/Kenkenzaii/PrefPaint, ``InpaintReward.py``): attention over a single
    token is its value and output maps, the norms come after, and there is no activation between the last maps. In
    evaluation mode: the published training scores with dropout on.

    Args:
        state: The published state dict, whatever its widths.

    Raises:
        KeyError: It is another layout.
        RuntimeError: Its shapes do not fit.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        width = state[f"{BLOCK}norm1.weight"].shape[0]
        attention = {
            "weight": state[f"{BLOCK}self_attn.in_proj_weight"][2 * width :],
            "bias": state[f"{BLOCK}self_attn.in_proj_bias"][2 * width :],
        }
        self.value = _linear(attention)
        self.out = _linear(_part(state, f"{BLOCK}self_attn.out_proj."))
        self.hidden = _linear(_part(state, f"{BLOCK}linear1."))
        self.back = _linear(_part(state, f"{BLOCK}linear2."))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm1.load_state_dict(_part(state, f"{BLOCK}norm1."))
        self.norm2.load_state_dict(_part(state, f"{BLOCK}norm2."))
        self.first = _linear(_part(state, "mlp.layers.0."))
        self.second = _linear(_part(state, "mlp.layers.2."))
        self.last = _linear({"weight": state["mlp.last_layer.weight"]})

    def forward(self, pair_BD: Tensor) -> Tensor:
        """Return the last features, ``(B, F)``, of both embeddings side by side."""
        x_BD = self.norm1(pair_BD + self.out(self.value(pair_BD)))
        x_BD = self.norm2(x_BD + self.back(self.hidden(x_BD).relu()))
        features_BF: Tensor = self.second(self.first(x_BD))
        return features_BF


class PrefPaint:
    """The score of an image beside the image that was given, black where it was to be drawn; unbounded.

    Of a prompt that comes without a picture nothing is given: black.

    Args:
        tower: The CLIP model, whose embeddings are taken as they are, not of unit length.
        head: Of twice their width.

    Raises:
        UserError: The head reads embeddings of another width.
    """

    def __init__(self, tower: ClipTower, head: Head) -> None:
        self._tower, self._head = tower, freeze(head)
        self._given: dict[tuple[str, int, int], Tensor] = {}
        num_read, num_given = head.value.in_features, 2 * tower.text_features([""]).shape[1]
        if num_read != num_given:
            raise UserError(
                f"reward {NAME!r}: the head reads {num_read} features, CLIP model {tower.name!r} gives {num_given}; "
                "give the one that it was fitted on as `clip`"
            )

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, differentiable in the images."""
        score_B1: Tensor = self._head.last(self.features(images_B3HW, prompts))
        return score_B1[:, 0]

    def features(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the last features, ``(B, F)`` float32, which the score is linear in and trust is measured by."""
        if images_B3HW.shape[0] == 0:
            return images_B3HW.new_zeros(0, self._head.second.out_features, dtype=torch.float32)
        given_BD = torch.stack([self._embed_given(prompt, images_B3HW) for prompt in prompts])
        features_BF: Tensor = self._head(torch.cat([self._embed(images_B3HW), given_BD], dim=1))
        return features_BF

    def to(self, device: torch.device) -> None:
        """Move model and head to ``device``."""
        self._tower.to(device)
        self._head.to(device)
        self._given = {key: embedding_D.to(device) for key, embedding_D in self._given.items()}

    def _embed(self, images_B3HW: Tensor) -> Tensor:
        embedding_BD: Tensor = self._tower.model.encode_image(self._tower.preprocess(images_B3HW))
        return embedding_BD

    @torch.no_grad()
    def _embed_given(self, prompt: str, images_B3HW: Tensor) -> Tensor:
        """Return the embedding of what is given of an image, a constant; each is embedded once and kept."""
        height, width = images_B3HW.shape[-2:]
        key = (prompt if isinstance(prompt, Canvas) else "", height, width)
        if key not in self._given:
            given_3HW = torch.zeros(3, height, width)
            if isinstance(prompt, Canvas):
                image_HW3, mask_HW = prompt.read(height, width)
                given_3HW = (torch.tensor(image_HW3).float() / 255 * ~torch.tensor(mask_HW)[..., None]).permute(2, 0, 1)
            self._given[key] = self._embed(given_3HW[None].to(images_B3HW.device))[0]
        return self._given[key]


@REWARDS.register(NAME, Card(scale="unbounded", licence=WEIGHTS.licence, weights=(WEIGHTS,), needs_canvas=True))
def build_prefpaint(*, weights: str | None = None, clip: str | None = None) -> PrefPaint:
    """How people would like the way an image was filled: PrefPaint's reward, for inpainting.

    Args:
        weights: ``prefpaintReward.pt``, or a file of the same layout, in place of the published one.
        clip: The CLIP model under the head, as ``alignment`` names it; left out, the one in the file.

    Raises:
        UserError: The file is not what it should be, or the head was fitted on another CLIP model.
        RunError: It is not on this machine and cannot be fetched.
    """
    return load_prefpaint(locate(NAME, WEIGHTS, weights), clip)


def load_prefpaint(path: Path, clip: str | None = None) -> PrefPaint:
    """Return the reward in a file of the published layout.

    Raises:
        UserError: It is another file.
    """
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        state = {name.removeprefix("module."): value for name, value in loaded.items()}
        head = Head(state)
    except (
        KeyError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
        AttributeError,
        TypeError,
        OSError,
    ) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"reward {NAME!r}: {path} is not a state dict of PrefPaint's reward ({why})") from error
    if clip is not None:
        return PrefPaint(load_clip(clip), head)
    return PrefPaint(load_clip_state(path, _part(state, CLIP), reward=NAME, kind=VIT_B), head)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.float() for name, value in state.items() if name.startswith(prefix)}


def _linear(state: Mapping[str, Tensor]) -> nn.Linear:
    num_out, num_in = state["weight"].shape
    layer = nn.Linear(num_in, num_out, bias="bias" in state)
    layer.load_state_dict(state)
    return layer
