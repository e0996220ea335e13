"""What a score hangs on: counterfactual images, in which the object or the ground is another.

A reward that should judge what a picture shows, and moves as much when only the ground is replaced, is one that
training will please through the ground. Masked images as counterfactuals: Xiao et al., arXiv 2303.03052; there a
classifier's activation map says where the object is, here a mask does, so that rewards of every kind can be asked.

B: images. H, W: image rows and columns. V: versions of an image, those of ``VERSIONS``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rltune.errors import UserError
from rltune.intervals import Array, half_width, standard_error
from rltune.rewards.base import Reward
from rltune.rewards.mixture import score

PARTS = ("object", "ground")
FILLS = ("image", "colour")
"""What a part is replaced with: what the image before it in the batch shows there (the last image, for the first), or
the mean colour of the part that is kept."""
VERSIONS = tuple((part, fill) for fill in FILLS for part in PARTS)
BATCH = 16


@dataclass(frozen=True)
class Change:
    """What the scores do where one part of each image is replaced."""

    part: str
    fill: str
    mean: float
    """Of the replaced image's score minus the image's own."""
    half: float | None
    """Half the width of the mean's 95 % interval over images."""
    rms: float
    """Root mean square of that difference."""
    correlation: float | None
    """Of both scores over images: 1 where what was replaced did not matter. None where either has no spread."""


@dataclass(frozen=True)
class Audit:
    """What the scores of a batch hang on."""

    scores_B: Array
    versions_VB: Array
    changes: tuple[Change, ...]
    area: float
    """The object's share of the pixels."""
    shares: dict[str, tuple[float, float | None]]
    """By fill: the object's share of all squared changes, with half the width of its 95 % interval by the jackknife."""
    gradient: float | None
    """The object's share of the squared gradient of the scores in the pixels; None where a reward has none."""


def replaced(images_B3HW: Tensor, objects_B1HW: Tensor, part: str, fill: str) -> Tensor:
    """Return the images with one part replaced, the other as it is, ``(B, 3, H, W)``.

    Args:
        images_B3HW: RGB in [0, 1].
        objects_B1HW: Bool, true on the object.
        part: One of ``PARTS``, what is replaced.
        fill: One of ``FILLS``.
    """
    gone_B1HW = objects_B1HW if part == "object" else ~objects_B1HW
    if fill == "image":
        return torch.where(gone_B1HW, images_B3HW.roll(1, 0), images_B3HW)
    kept_B1HW = (~gone_B1HW).to(images_B3HW.dtype)
    colour_B311 = (images_B3HW * kept_B1HW).sum((2, 3), keepdim=True) / kept_B1HW.sum((2, 3), keepdim=True)
    return torch.where(gone_B1HW, colour_B311, images_B3HW)


def audit(name: str, reward: Reward, images_B3HW: Tensor, objects_B1HW: Tensor, prompts: Sequence[str]) -> Audit:
    """Return what a reward's scores of these images hang on.

    Raises:
        UserError: There are fewer than two images, one shows no object or nothing else, or the reward compares images.
        NonFiniteError: A score is not finite.
        RunError: The reward fails.
    """
    _check(name, reward, objects_B1HW)
    scores_B = _scores(name, reward, images_B3HW, prompts)
    versions_VB = np.stack(
        [_scores(name, reward, replaced(images_B3HW, objects_B1HW, *version), prompts) for version in VERSIONS]
    )
    changes_VB = versions_VB - scores_B
    squares = {version: changes_VB[v] ** 2 for v, version in enumerate(VERSIONS)}
    return Audit(
        scores_B=scores_B,
        versions_VB=versions_VB,
        changes=tuple(
            Change(
                part=part,
                fill=fill,
                mean=float(changes_B.mean()),
                half=half_width(standard_error(changes_B), len(changes_B) - 1),
                rms=float(np.sqrt(np.mean(changes_B**2))),
                correlation=_correlation(scores_B, values_B),
            )
            for (part, fill), changes_B, values_B in zip(VERSIONS, changes_VB, versions_VB, strict=True)
        ),
        area=float(objects_B1HW.double().mean()),
        shares={fill: share(squares["object", fill], squares["ground", fill]) for fill in FILLS},
        gradient=_gradient_share(name, reward, images_B3HW, objects_B1HW, prompts),
    )


def check_masks(objects_B1HW: Tensor, *, first: int = 0) -> None:
    """Check that every image shows an object and something else; ``first`` images came before these.

    Raises:
        UserError: One does not.
    """
    for i, mask_1HW in enumerate(objects_B1HW):
        if not mask_1HW.any() or mask_1HW.all():
            what = "nothing" if not mask_1HW.any() else "everything"
            raise UserError(f"mask: number {first + i + 1} marks {what} as the object; paint the object white on black")


def share(object_B: Array, ground_B: Array) -> tuple[float, float | None]:
    """Return the share of the first in the sum of both, and half the width of its 95 % interval by the jackknife.

    Where nothing changes at all it is one half.
    """

    def of(first: float, second: float) -> float:
        return first / (first + second) if first + second > 0 else 0.5

    left = np.array(
        [of(object_B.sum() - a, ground_B.sum() - b) for a, b in zip(object_B, ground_B, strict=True)], dtype=np.float64
    )
    number = len(left)
    error = float(np.sqrt((number - 1) / number * ((left - left.mean()) ** 2).sum())) if number > 1 else None
    return of(float(object_B.sum()), float(ground_B.sum())), half_width(error, number - 1)


def _check(name: str, reward: Reward, objects_B1HW: Tensor) -> None:
    if reward.sees_group:
        raise UserError(f"reward {name!r}: compares the images of a prompt, so that no image's score is its own")
    if len(objects_B1HW) < 2:
        raise UserError("--image: an audit fills images from one another, got 1; give two or more")
    check_masks(objects_B1HW)


def _scores(name: str, reward: Reward, images_B3HW: Tensor, prompts: Sequence[str]) -> Array:
    with torch.no_grad():
        parts = [
            score(name, reward, images_B3HW[start : start + BATCH], prompts[start : start + BATCH])
            for start in range(0, len(prompts), BATCH)
        ]
    return torch.cat(parts).double().cpu().numpy()


def _correlation(first_B: Array, second_B: Array) -> float | None:
    is_flat = min(np.ptp(first_B), np.ptp(second_B)) <= 1e-9 * max(1.0, float(np.abs(first_B).max()))
    return None if is_flat else float(np.corrcoef(first_B, second_B)[0, 1])


def _gradient_share(
    name: str, reward: Reward, images_B3HW: Tensor, objects_B1HW: Tensor, prompts: Sequence[str]
) -> float | None:
    if not reward.is_differentiable:
        return None
    on_object, everywhere = 0.0, 0.0
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        some_B3HW = images_B3HW[part].clone().requires_grad_()
        (slope_B3HW,) = torch.autograd.grad(score(name, reward, some_B3HW, prompts[part]).sum(), some_B3HW)
        squares_B3HW = slope_B3HW.double() ** 2
        on_object += float((squares_B3HW * objects_B1HW[part]).sum())
        everywhere += float(squares_B3HW.sum())
    return on_object / everywhere if everywhere > 0 else None
