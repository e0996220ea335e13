"""The images that a reward is trusted on: scenes of the built-in world, a folder, or features that were kept.

N: reference images. D: width of the features. H, W: image rows and columns.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rltune.builtin.render import render
from rltune.builtin.scenes import distinct_scenes
from rltune.errors import UserError
from rltune.rewards.base import Reward
from rltune.rewards.mixture import features
from rltune.rewards.trust import read_features

BUILTIN = "builtin"
NUM_SCENES = 512
SEED = 0
"""Of the corpus that the built-in rewards were trained on."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def reference_features(reward: Reward, source: str, device: torch.device) -> Tensor:
    """Return what a reward sees in its references, ``(N, D)`` float32.

    Args:
        reward: One that has features.
        source: ``builtin``, a folder of images (``NAME.txt`` beside ``NAME.png`` is its prompt), or a safetensors file
            with a tensor ``features``.
        device: Where the reward is.

    Raises:
        UserError: The reward has no features, or others than ``source`` holds, or ``source`` cannot be read.
    """
    if source != BUILTIN and Path(source).expanduser().is_file():
        features_ND = read_features(Path(source).expanduser())
        width = features(reward, torch.zeros(1, 3, 64, 64, device=device), [""]).shape[1]
        if features_ND.shape[1] != width:
            raise UserError(
                f"reference: {source!r} holds features {features_ND.shape[1]} wide, the reward's are {width}"
            )
        return features_ND
    parts = _scenes() if source == BUILTIN else _pictures(Path(source).expanduser())
    return torch.cat([features(reward, images_B3HW.to(device), prompts) for images_B3HW, prompts in parts])


def _scenes() -> Iterator[tuple[Tensor, Sequence[str]]]:
    scenes = distinct_scenes(SEED, NUM_SCENES, is_heldout=False)
    for start in range(0, NUM_SCENES, 64):
        part = scenes[start : start + 64]
        yield render(part), [scene.caption(random.Random(start + i)) for i, scene in enumerate(part)]


def _pictures(folder: Path) -> Iterator[tuple[Tensor, Sequence[str]]]:
    paths = pictures_in(folder)
    if not paths:
        raise UserError(
            f"reference: {str(folder)!r} is neither 'builtin' nor a safetensors file nor a folder that holds images "
            f"({', '.join(SUFFIXES)})"
        )
    for path in paths:
        caption = path.with_suffix(".txt")
        yield read_image(path)[None], [caption.read_text().strip() if caption.is_file() else ""]


def pictures_in(folder: Path) -> list[Path]:
    """Return the image files of a folder, by name."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)


def picture_files(images: str | Sequence[str]) -> tuple[Path, ...]:
    """Return the files that ``images`` names, folders by the pictures in them; nothing is said of what is not there."""
    paths = [Path(name).expanduser() for name in ([images] if isinstance(images, str) else images)]
    return tuple(file for path in paths for file in (pictures_in(path) if path.is_dir() else [path]))


def read_image(path: Path) -> Tensor:
    """Return an image file as RGB in [0, 1], ``(3, H, W)`` float32; grey and transparent ones are converted.

    Raises:
        UserError: There is no such file, or it is not an image.
    """
    try:
        with Image.open(path) as image:
            pixels_HW3 = np.asarray(image.convert("RGB"), dtype=np.float32)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path}: is not an image that can be read ({error})") from error
    return torch.from_numpy(pixels_HW3 / 255).permute(2, 0, 1)
