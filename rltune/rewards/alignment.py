"""How well an image matches its prompt, as a CLIP model sees it.

B: images in the batch. D: width of the embedding. H, W: image rows and columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rltune.rewards.base import REWARDS, Card
from rltune.rewards.clip import ClipTower
from rltune.rewards.clip_loading import load_clip
from rltune.rewards.weights import WeightsFile


class Alignment:
    """``factor`` times the cosine of the CLIP embeddings of image and prompt.

    CLIPScore (arXiv:2104.08718) is ``2.5 * max(cosine, 0)``; the maximum would take the gradient of the worst images
    away, so it is left out.

    Args:
        tower: The CLIP model.
        factor: Of the cosine: 1, or what the published score multiplies it with.
    """

    def __init__(self, tower: ClipTower, *, factor: float = 1.0) -> None:
        self._tower = tower
        self._factor = factor
        self.value_range = (-factor, factor)

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, differentiable in the images."""
        cosine_B = (self._tower.image_features(images_B3HW) * self._tower.text_features(prompts)).sum(dim=1)
        return self._factor * cosine_B

    def features(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the unit image embedding ``(B, D)``."""
        return self._tower.image_features(images_B3HW)

    def to(self, device: torch.device) -> None:
        """Move the model to ``device``."""
        self._tower.to(device)


OPENAI_CLIP_L = WeightsFile(
    repo="timm/vit_large_patch14_clip_224.openai", file="open_clip_model.safetensors", licence="MIT", size_mb=1711
)
"""What open_clip loads as ``ViT-L-14/openai``."""


@REWARDS.register("alignment", Card(scale="-1 to 1, cosine", is_shipped=True))
def build_alignment(*, model: str = "builtin") -> Alignment:
    """Cosine of the built-in CLIP's embeddings of image and prompt.

    Args:
        model: ``builtin``, a folder of open_clip's, or ``MODEL/TAG`` of its published weights.

    Raises:
        UserError: ``model`` is none of these.
        RunError: Its weights are not on this machine.
    """
    return Alignment(load_clip(model))


@REWARDS.register("clip_score", Card(scale="-100 to 100, about 20 to 35", licence="MIT", weights=(OPENAI_CLIP_L,)))
def build_clip_score(*, model: str = "ViT-L-14/openai") -> Alignment:
    """CLIP score, 100 times the cosine, by any published CLIP.

    Args:
        model: ``MODEL/TAG`` of open_clip's published weights, a folder of open_clip's, or ``builtin``.

    Raises:
        UserError: ``model`` is none of these.
        RunError: Its weights are not on this machine.
    """
    return Alignment(load_clip(model), factor=100.0)
