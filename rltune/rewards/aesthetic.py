"""How pleasing an image looks: a small head on the CLIP image embedding, fitted to what people rated.

B: images in the batch. D: width of the embedding. H, W: image rows and columns.
"""

import json
import logging
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from rltune.assets import BUILTIN_AESTHETIC_HEAD
from rltune.errors import RunError, UserError
from rltune.rewards.alignment import OPENAI_CLIP_L
from rltune.rewards.base import REWARDS, Card, weights_file
from rltune.rewards.clip import ClipTower
from rltune.rewards.clip_loading import load_clip
from rltune.rewards.frozen import freeze
from rltune.rewards.weights import WeightsFile, locate

logger = logging.getLogger(__name__)

LAION_WIDTHS = (768, 1024, 128, 64, 16, 1)


class Aesthetic:
    """``offset + scale * head(embedding)`` of the unit CLIP image embedding; about 1 to 10, unbounded in principle.

    Args:
        tower: The CLIP model.
        head: Module from ``(B, D)`` to ``(B, 1)``.
        offset: Added to the scaled output.
        scale: Factor of the head's output.

    Raises:
        UserError: The head was fitted on a CLIP model of another width.
    """

    def __init__(self, tower: ClipTower, head: nn.Module, *, offset: float = 0.0, scale: float = 1.0) -> None:
        self._tower = tower
        self.head = freeze(head)
        num_read = next(layer for layer in head.modules() if isinstance(layer, nn.Linear)).in_features
        num_given = tower.text_features([""]).shape[1]
        if num_read != num_given:
            raise UserError(
                f"aesthetic head: it reads {num_read} features, and CLIP model {tower.name!r} gives {num_given}; give "
                "the CLIP model that it was fitted on as `clip`"
            )
        self._offset = offset
        self._scale = scale

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, differentiable. Ignores what the prompts say."""
        return self.of_features(self._tower.image_features(images_B3HW))

    def of_features(self, features_BD: Tensor) -> Tensor:
        """Score what ``features`` returns -> the shape without its last axis, float32, differentiable."""
        score_B1: Tensor = self.head(features_BD)
        return self._offset + self._scale * score_B1[..., 0]

    def features(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the unit image embedding ``(B, D)`` that the head reads."""
        return self._tower.image_features(images_B3HW)

    def with_head(self, head: nn.Module) -> "Aesthetic":
        """Return the score of another head on the same model."""
        return Aesthetic(self._tower, head, offset=self._offset, scale=self._scale)

    def save(self, path: Path) -> None:
        """Write the head as a file that its reward's option ``head`` takes: ours in float32, or LAION's state dict.

        Raises:
            OSError: It cannot be written.
        """
        state = {f"layers.{name}": value.cpu().contiguous() for name, value in self.head.state_dict().items()}
        maps = [layer for layer in self.head.modules() if isinstance(layer, nn.Linear)]
        part = path.with_name(f"{path.name}.{uuid4().hex}.part")  # moved into place whole
        try:
            if any(isinstance(layer, nn.SiLU) for layer in self.head.modules()):
                about = {"in": maps[0].in_features, "hidden": json.dumps([layer.out_features for layer in maps[:-1]])}
                about |= {"activation": "silu", "offset": self._offset, "scale": self._scale}
                part.write_bytes(serialise(state, metadata={name: str(value) for name, value in about.items()}))
            else:
                torch.save(state, part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def to(self, device: torch.device) -> None:
        """Move model and head to ``device``."""
        self._tower.to(device)
        self.head.to(device)


LAION_HEAD = WeightsFile(
    file="sac+logos+ava1-l14-linearMSE.pth",
    url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac+logos+ava1-l14-linearMSE.pth",
    licence="Apache-2.0",
    size_mb=3.7,
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)


@REWARDS.register("aesthetic", Card(scale="about 1 to 10", is_shipped=True))
def build_aesthetic(*, head: str | None = None, clip: str = "builtin") -> Aesthetic:
    """How pleasing an image looks: a head on the built-in CLIP.

    Args:
        head: File of another head of the same layout.
        clip: The CLIP model that the head was fitted on, as ``alignment`` names it.

    Raises:
        UserError: An option has a value that it cannot take, or ``head`` is not the file it should be.
        RunError: Weights are not on this machine.
    """
    network, offset, scale = load_builtin_head(weights_file("aesthetic", head, BUILTIN_AESTHETIC_HEAD, option="head"))
    return Aesthetic(load_clip(clip), network, offset=offset, scale=scale)


@REWARDS.register(
    "laion_aesthetic", Card(scale="about 1 to 10", licence="Apache-2.0, MIT", weights=(LAION_HEAD, OPENAI_CLIP_L))
)
def build_laion_aesthetic(*, head: str | None = None, clip: str = "ViT-L-14/openai") -> Aesthetic:
    """LAION's aesthetic predictor v2 on OpenAI's CLIP-L.

    Args:
        head: Path of ``sac+logos+ava1-l14-linearMSE.pth``; the cache if left out.
        clip: The CLIP model under it: ``ViT-L-14/openai``, or a folder of open_clip's with the same weights.

    Raises:
        UserError: ``head`` is not the file it should be, or ``clip`` names no model.
        RunError: Weights are not on this machine.
    """
    path = locate("laion_aesthetic", LAION_HEAD, head, option="head")  # first: it is quick to miss
    return Aesthetic(load_clip(clip), load_laion_head(path, is_given=head is not None))


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


def load_laion_head(path: Path, *, is_given: bool) -> nn.Module:
    """Return LAION's aesthetic predictor v2 (``sac+logos+ava1-l14-linearMSE``): five linear maps in a row.

    The published class has dropout between them and no activation: https://github.com/christophschuhmann/
    improved-aesthetic-predictor, ``simple_inference.py``.

    Args:
        path: The file.
        is_given: Whether the user named it: then a head of the same layout that is not the published one is taken,
            with a warning.

    Raises:
        UserError: The file is not such a head, or was fetched and is not the published one.
    """
    try:
        LAION_HEAD.check(path)
    except UserError as error:
        if not is_given:
            raise
        logger.warning("reward 'laion_aesthetic': not the published head, so not its scores: %s", error)
    return read_laion_head(path)


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
        raise UserError(f"reward 'laion_aesthetic': {file} is not a state dict of LAION's head ({error})") from error


def _load_layers(network: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    network.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    return network
