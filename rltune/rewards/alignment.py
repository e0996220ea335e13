"""How well an image matches its prompt, as a CLIP model sees it.

B: images in the batch. D: width of the embedding. H, W: image rows and columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rltune.rewards.base import REWARDS, check_batch
from rltune.rewards.clip import ClipTower, load_clip


class Alignment:
    """Cosine of the CLIP embeddings of image and prompt, in [-1, 1]: CLIPScore (arXiv:2104.08718) without its factor.

    CLIPScore is ``2.5 * max(cosine, 0)``; the maximum would take the gradient of the worst images away.

    Args:
        tower: The CLIP model.
    """

    is_differentiable = True
    value_range = (-1.0, 1.0)
    metric_unit = ""

    def __init__(self, tower: ClipTower) -> None:
        self._tower = tower

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, differentiable in the images."""
        check_batch(images_B3HW, prompts)
        if not prompts:
            return images_B3HW.new_zeros(0, dtype=torch.float32)
        return (self._tower.image_features(images_B3HW) * self._tower.text_features(prompts)).sum(dim=1)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score itself."""
        return self(images_B3HW, prompts)

    def to(self, device: torch.device) -> "Alignment":
        """Move the model to ``device`` and return the reward."""
        self._tower.to(device)
        return self


@REWARDS.register("alignment")
def build_alignment(*, model: str = "builtin") -> Alignment:
    """Cosine of CLIP's embeddings of image and prompt: built-in, or ``MODEL/TAG`` of open_clip, or a folder.

    Raises:
        UserError: ``model`` is none of these.
        RunError: Its weights are not on this machine.
    """
    return Alignment(load_clip(model))
