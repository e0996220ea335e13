"""What is where in a scene, as tensors, and worn-out pictures: the teachers of the networks that read pictures.

B scenes, K object slots, G cells a side of a coarse grid over the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own documentation writes F)

from rltune.builtin.scenes import GROUND_COLORS, MAX_OBJECTS, OBJECT_COLORS, SHAPES, Scene

GRID = 16
"""Cells a side. Objects are disjoint and at least 14 px wide, so no two centres share a cell of 4 px."""
_COLOR_NUMBER = {name: number for number, name in enumerate(OBJECT_COLORS)}
_GROUND_NUMBER = {name: number for number, name in enumerate(GROUND_COLORS)}


@dataclass(frozen=True)
class Labels:
    """Per scene: its objects, and its ground. Unused slots have colour and shape -1."""

    place_BK3: Tensor
    """x, y, radius as fractions of the picture."""
    color_BK: Tensor
    shape_BK: Tensor
    ground_B: Tensor

    def __len__(self) -> int:
        return len(self.ground_B)

    def __getitem__(self, picks: Tensor) -> "Labels":
        return Labels(self.place_BK3[picks], self.color_BK[picks], self.shape_BK[picks], self.ground_B[picks])

    def to(self, device: torch.device) -> "Labels":
        """The same labels on ``device``."""
        return Labels(*(tensor.to(device) for tensor in (self.place_BK3, self.color_BK, self.shape_BK, self.ground_B)))

    def centers(self) -> Tensor:
        """1 in the cell of each object's centre, ``(B, K, G, G)`` float32."""
        cell_BK2 = (self.place_BK3[..., :2] * GRID).long().clamp(0, GRID - 1)
        number_BK = cell_BK2[..., 1] * GRID + cell_BK2[..., 0]
        is_used_BK1 = (self.color_BK >= 0)[..., None]
        center_BKN: Tensor = F.one_hot(number_BK, GRID * GRID) * is_used_BK1
        return center_BKN.float().view(*number_BK.shape, GRID, GRID)

    def discs(self, share: float) -> Tensor:
        """Whether a cell's centre lies within ``share`` of an object's radius, ``(B, K, G, G)`` bool."""
        at = (torch.arange(GRID, device=self.place_BK3.device) + 0.5) / GRID
        x, y, radius = (value[..., None, None] for value in self.place_BK3.unbind(-1))
        distance = torch.hypot(at[None, None, None, :] - x, at[None, None, :, None] - y)
        return (distance < share * radius) & (self.color_BK >= 0)[..., None, None]

    def counts(self) -> Tensor:
        """Objects of each colour, ``(B, colours)`` int64."""
        return _one_hot(self.color_BK, len(OBJECT_COLORS)).sum(1)

    def shape_of_color(self) -> Tensor:
        """The shape that the objects of each colour have, ``(B, colours)`` int64; -1 where there are none."""
        hit_BKC = _one_hot(self.color_BK, len(OBJECT_COLORS))
        return (hit_BKC * (self.shape_BK[..., None] + 1)).amax(1) - 1


def _one_hot(number_BK: Tensor, count: int) -> Tensor:
    return F.one_hot(number_BK + 1, count + 1)[..., 1:]


def make_labels(scenes: Sequence[Scene]) -> Labels:
    """The labels of ``scenes``, on the CPU."""
    place = torch.zeros(len(scenes), MAX_OBJECTS, 3)
    kind = torch.full((len(scenes), MAX_OBJECTS, 2), -1)
    for i, scene in enumerate(scenes):
        for k, item in enumerate(scene.placed):
            group = scene.groups[item.group]
            place[i, k] = torch.tensor([item.x, item.y, item.radius])
            kind[i, k] = torch.tensor([_COLOR_NUMBER[group.color], SHAPES.index(group.shape)])
    ground = torch.tensor([_GROUND_NUMBER[scene.ground] for scene in scenes])
    return Labels(place, kind[..., 0], kind[..., 1], ground)


def wear(images_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Images in [-1, 1] with chance blur, noise and tint, so that a reader is not thrown by what is not content."""
    num = len(images_B3HW)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(num, *shape, 1, 1, generator=generator)

    # A Gaussian of 0 to 1.3 px, of 0 for a third of the pictures; one kernel a picture, as a grouped convolution.
    sigma_B = (uniform(-0.65, 1.3, 1).flatten()).clamp(min=0.05)
    at = torch.arange(-3, 4).float()
    kernel_BX = torch.softmax(-(at**2) / (2 * sigma_B[:, None] ** 2), dim=1).repeat_interleave(3, 0)
    size = images_B3HW.shape[-2:]
    flat = F.pad(images_B3HW, (3, 3, 3, 3), mode="replicate").reshape(1, 3 * num, size[0] + 6, size[1] + 6)
    flat = F.conv2d(flat, kernel_BX[:, None, None, :], groups=3 * num)
    images_B3HW = F.conv2d(flat, kernel_BX[:, None, :, None], groups=3 * num).view(num, 3, *size)
    images_B3HW = images_B3HW * uniform(0.93, 1.05, 3) + uniform(-0.05, 0.05, 3)
    noise = torch.randn(images_B3HW.shape, generator=generator)
    return (images_B3HW + uniform(0, 0.08, 1) * noise).clamp(-1, 1)
