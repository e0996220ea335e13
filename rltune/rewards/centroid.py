"""How near an image is to a handful of pictures, as a CLIP model sees them: for what words do not get.

B: images in the batch. N: reference pictures. D: width of the embedding. H, W: image rows and columns.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rltune.errors import UserError
from rltune.rewards.base import REWARDS, Card
from rltune.rewards.clip import ClipTower
from rltune.rewards.clip_loading import load_clip
from rltune.rewards.references import SUFFIXES, picture_files, pictures_in, read_image


class Centroid:
    """Cosine of an image's CLIP embedding and the centroid of reference pictures'; the prompt is not looked at.

    The centroid is the mean of the pictures' unit embeddings, scaled to unit length. It is the image term of SeedSelect
    (arXiv:2304.14530), which has its loss as one minus this cosine.

    Args:
        tower: The CLIP model.
        pictures: RGB in [0, 1], ``(3, H, W)`` each, of any size.
    """

    value_range = (-1.0, 1.0)

    def __init__(self, tower: ClipTower, pictures: Sequence[Tensor]) -> None:
        self._tower = tower
        with torch.no_grad():  # frozen weights and given pictures: there is nothing to differentiate
            features_ND = torch.cat([tower.image_features(picture_3HW[None].float()) for picture_3HW in pictures])
        self._centroid_D = normalize(features_ND.mean(dim=0), dim=0)

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, differentiable in the images."""
        return (self._tower.image_features(images_B3HW) * self._centroid_D).sum(dim=1)

    def features(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the unit image embedding ``(B, D)``."""
        return self._tower.image_features(images_B3HW)

    def to(self, device: torch.device) -> None:
        """Move the model and the centroid to ``device``."""
        self._tower.to(device)
        self._centroid_D = self._centroid_D.to(device)


@REWARDS.register("centroid", Card(scale="-1 to 1, cosine", is_shipped=True))
def build_centroid(*, images: str | list[str] = "", model: str = "builtin") -> Centroid:
    """Cosine of a CLIP's embeddings of the image and the centre of a few reference pictures.

    Args:
        images: The reference pictures: files, or a folder that holds them.
        model: ``builtin``, a folder of open_clip's, or ``MODEL/TAG`` of its published weights, as ``alignment`` has it.

    Raises:
        UserError: A picture is missing or cannot be read, there is none, or ``model`` is no CLIP model.
        RunError: The weights of ``model`` are not on this machine.
    """
    named = [images] if isinstance(images, str) else images
    if not isinstance(named, Sequence) or not all(isinstance(name, str) for name in named):
        raise UserError(f"reward 'centroid': images must be files or a folder, got {images!r}")
    if not any(named):
        raise UserError(
            f"reward 'centroid': images must name the reference pictures, got {images!r}; give files or a folder"
        )
    for name in named:
        folder = Path(name).expanduser()
        if folder.is_dir() and not pictures_in(folder):
            raise UserError(f"reward 'centroid': images: the folder {name!r} holds no picture ({', '.join(SUFFIXES)})")
        if not folder.exists():
            raise UserError(f"reward 'centroid': images: no such file or folder, got {name!r}; check the path")
    try:
        pictures = [read_image(path) for path in picture_files(named)]
    except UserError as error:
        raise UserError(f"reward 'centroid': images: {error}") from error
    return Centroid(load_clip(model), pictures)
