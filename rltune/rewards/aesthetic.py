"""How pleasing an image looks: a small head on the CLIP image embedding, fitted to what people rated.

B: images in the batch. D: width of the embedding. H, W: image rows and columns.
"""

import hashlib
import json
import math
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rltune.assets import BUILTIN_AESTHETIC_HEAD
from rltune.errors import RunError, UserError
from rltune.rewards.base import REWARDS, check_batch
from rltune.rewards.clip import ClipTower, load_clip

LAION_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
LAION_HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
LAION_HEAD_URL = f"https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/{LAION_HEAD}"
LAION_WIDTHS = (768, 1024, 128, 64, 16, 1)


class Aesthetic:
    """``offset + scale * head(embedding)`` of the unit CLIP image embedding; about 1 to 10, unbounded in principle.

    Args:
        tower: The CLIP model.
        head: Module from ``(B, D)`` to ``(B, 1)``.
        offset: Added to the scaled output.
        scale: Factor of the head's output.
    """

    is_differentiable = True
    value_range = (-math.inf, math.inf)
    metric_unit = ""

    def __init__(self, tower: ClipTower, head: nn.Module, *, offset: float = 0.0, scale: float = 1.0) -> None:
        self._tower = tower
        self._head = head.float().eval().requires_grad_(False)
        self._offset = offset
        self._scale = scale

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, differentiable. Ignores what the prompts say."""
        check_batch(images_B3HW, prompts)
        score_B1: Tensor = self._head(self._tower.image_features(images_B3HW))
        return self._offset + self._scale * score_B1[:, 0]

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score itself."""
        return self(images_B3HW, prompts)

    def to(self, device: torch.device) -> "Aesthetic":
        """Move model and head to ``device`` and return the reward."""
        self._tower.to(device)
        self._head.to(device)
        return self


@REWARDS.register("aesthetic")
def build_aesthetic(*, model: str = "builtin", head: str | None = None, clip: str | None = None) -> Aesthetic:
    """How pleasing an image looks: a head on CLIP features, the built-in one or LAION's predictor v2.

    Args:
        model: ``builtin`` or ``laion``.
        head: File of the head. ``laion`` needs one; ``builtin`` has its own, and takes another of the same layout.
        clip: CLIP model in place of the one the head was fitted on (``builtin``, ``ViT-L-14/openai``): a folder with
            the same weights, for a machine without a network.

    Raises:
        UserError: An option has a value that it cannot take, or ``head`` is not the file it should be.
        RunError: Weights are not on this machine.
    """
    if model == "builtin":
        network, offset, scale = load_builtin_head(Path(head).expanduser() if head else BUILTIN_AESTHETIC_HEAD)
        return Aesthetic(load_clip(clip or "builtin"), network, offset=offset, scale=scale)
    if model == "laion":
        network = load_laion_head(head)  # first: it is quick to miss, the CLIP model takes a while to be refused
        return Aesthetic(load_clip(clip or "ViT-L-14/openai"), network)
    raise UserError(f"reward 'aesthetic': model must be 'builtin' or 'laion', got {model!r}")


def load_builtin_head(path: Path) -> tuple[nn.Module, float, float]:
    """Return head, offset and scale from a safetensors file of ours.

    The header gives ``in`` (D), ``hidden`` (a JSON list of widths), ``activation`` (``silu``), ``offset`` and
    ``scale``; the tensors are ``layers.{i}.weight`` and ``layers.{i}.bias`` of an ``nn.Sequential`` that alternates
    linear maps and activations and ends in a linear map to one number.

    Raises:
        UserError: The file is not such a head.
        RunError: It is not there.
    """
    if not path.is_file():
        raise RunError(f"aesthetic head: {path} is missing; install rltune again, or give a file as `head`")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
        widths = (int(header["in"]), *(int(width) for width in json.loads(header["hidden"])), 1)
        if header["activation"] != "silu":
            raise ValueError(f"activation {header['activation']!r}")
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.SiLU()]
        network = _load_layers(nn.Sequential(*layers[:-1]), state)
        return network, float(header["offset"]), float(header["scale"])
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"aesthetic head: {path} is not a head of the built-in layout ({error!r})") from error


def load_laion_head(path: str | None) -> nn.Module:
    """Return LAION's aesthetic predictor v2 (``sac+logos+ava1-l14-linearMSE``): five linear maps in a row.

    The published class has dropout between them and no activation: https://github.com/christophschuhmann/
    improved-aesthetic-predictor, ``simple_inference.py``.

    Raises:
        UserError: The file has other contents than the published one.
        RunError: There is no such file.
    """
    file = Path(path).expanduser() if path else None
    if file is None or not file.is_file():
        raise RunError(
            f"reward 'aesthetic': LAION's head is {'not given' if file is None else f'not at {file}'}; fetch "
            f"{LAION_HEAD} (4 MB, Apache-2.0) from {LAION_HEAD_URL} and give its path as `head`"
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != LAION_HEAD_SHA256:
        raise UserError(
            f"reward 'aesthetic': {file} is not the published head, its sha256 is {digest} and should be "
            f"{LAION_HEAD_SHA256}; fetch it again from {LAION_HEAD_URL}"
        )
    return read_laion_head(file)


def read_laion_head(file: Path) -> nn.Module:
    """Return the head from a state dict of the published layout, whatever its values.

    Raises:
        UserError: The file is not such a state dict.
    """
    maps = [nn.Linear(m, n) for m, n in pairwise(LAION_WIDTHS)]
    gap = nn.Identity()  # where the published class has dropout, so that the indices of the state dict fit
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        return _load_layers(nn.Sequential(maps[0], gap, maps[1], gap, maps[2], gap, maps[3], maps[4]), state)
    except (pickle.UnpicklingError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"reward 'aesthetic': {file} is not a state dict of LAION's head ({error})") from error


def _load_layers(network: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    network.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    return network
