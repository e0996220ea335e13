"""Draws scenes: batched signed-distance fields, anti-aliased, on any device.

B scenes, K object slots per scene, H/W pixel rows and columns. Lengths are fractions of the picture's side, so one
pixel is ``1 / SIZE_PX``; a signed distance is negative inside.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rltune.builtin.scenes import GROUND_COLORS, MAX_OBJECTS, OBJECT_COLORS, SHAPES, SIZE_PX, TEXTURES, Scene

SHADOW_PX = 3


def render(scenes: Sequence[Scene]) -> Tensor:
    """The pictures, ``(B, 3, 64, 64)`` float32 RGB in [0, 1], on the CPU; row i depends on scene i alone."""
    y_HW, x_HW = torch.meshgrid(*[(torch.arange(SIZE_PX) + 0.5) / SIZE_PX] * 2, indexing="ij")
    noise = _Noise(scenes)
    image_B3HW = _draw_ground(scenes, x_HW, y_HW, noise)
    objects = _Objects(scenes, x_HW, y_HW)

    # A soft shadow is the same field moved to the right and down, and blurred.
    shifted_BKHW = torch.roll(objects.distance_BKHW, (SHADOW_PX, SHADOW_PX), (2, 3))
    shadow_B1HW = torch.sigmoid(-shifted_BKHW * SIZE_PX / 1.8).amax(1, keepdim=True)
    image_B3HW = image_B3HW * (1 - 0.45 * _flag(scenes, "has_shadow") * shadow_B1HW)

    saturation = torch.tensor([scene.style.saturation for scene in scenes]).view(-1, 1, 1, 1)
    shaded = _flag(scenes, "is_shaded")
    for k in range(MAX_OBJECTS):
        color_B3HW = _object_color(objects, k, saturation, shaded, noise)
        alpha_B1HW = (0.5 - objects.distance_BKHW[:, k, None] * SIZE_PX).clamp(0, 1)
        image_B3HW = image_B3HW * (1 - alpha_B1HW) + color_B3HW.clamp(0, 1) * alpha_B1HW
    return image_B3HW.clamp(0, 1)


def object_masks(scenes: Sequence[Scene]) -> Tensor:
    """Where objects are, and the shadows of those that throw one, bool ``(B, 1, 64, 64)``.

    Wider by a pixel, and by 4 where a shadow fades: outside, a picture is that of its ground to 0.05.
    """
    y_HW, x_HW = torch.meshgrid(*[(torch.arange(SIZE_PX) + 0.5) / SIZE_PX] * 2, indexing="ij")
    distance_BKHW = _Objects(scenes, x_HW, y_HW).distance_BKHW * SIZE_PX
    shadow_BKHW = torch.roll(distance_BKHW, (SHADOW_PX, SHADOW_PX), (2, 3))
    is_shadow_BKHW = (shadow_BKHW < 4) & (_flag(scenes, "has_shadow") > 0)
    return ((distance_BKHW < 1) | is_shadow_BKHW).any(1, keepdim=True)


class _Noise:
    """Every scene's random numbers, from its own seed: a batch must not change what its members look like."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        rows = [
            torch.rand(6 + 3 * MAX_OBJECTS, generator=torch.Generator().manual_seed(scene.noise_seed))
            for scene in scenes
        ]
        uniform = torch.stack(rows)
        self.phase, self.frequency, self.direction = (uniform[:, i].view(-1, 1, 1, 1) for i in range(3))
        # Uniform with the standard deviation .02 of the colour jitter that was tuned.
        jitter = (uniform[:, 3:] - 0.5) * (0.02 * math.sqrt(12))
        self.ground_jitter = jitter[:, :3, None, None]
        self.object_jitter = jitter[:, 3:].view(-1, MAX_OBJECTS, 3, 1, 1)


def _flag(scenes: Sequence[Scene], name: str) -> Tensor:
    return torch.tensor([float(getattr(scene.style, name)) for scene in scenes]).view(-1, 1, 1, 1)


def _draw_ground(scenes: Sequence[Scene], x_HW: Tensor, y_HW: Tensor, noise: _Noise) -> Tensor:
    ground_B3 = torch.tensor([GROUND_COLORS[scene.ground] for scene in scenes])
    ground = ground_B3[:, :, None, None] + noise.ground_jitter
    level = ground.mean(1, keepdim=True)  # a dark ground gets lighter stripes and a lit centre
    striped = torch.tensor([float(scene.is_ground_striped) for scene in scenes]).view(-1, 1, 1, 1)
    along = torch.where(noise.direction > 0.5, x_HW, y_HW)
    # 3.8 to 5.1 periods, 12.5 px or wider: narrower stripes turn into a grid behind the autoencoder.
    stripes = torch.sigmoid(6 * torch.sin(2 * math.pi * (along * (3.8 + 1.3 * noise.frequency) + noise.phase)))
    image = ground + striped * stripes * torch.where(level > 0.3, -0.16, 0.18)
    radius2_HW = (x_HW - 0.5) ** 2 + (y_HW - 0.5) ** 2
    vignette = torch.where(level > 0.3, 0.10 - 0.62 * radius2_HW, 0.16 - 0.5 * radius2_HW)
    return (image + _flag(scenes, "has_vignette") * vignette).clamp(0, 1)


class _Objects:
    """Per-slot geometry. An unused slot has radius 1 (0 would make 0/0) and is infinitely far away."""

    def __init__(self, scenes: Sequence[Scene], x_HW: Tensor, y_HW: Tensor) -> None:
        geometry = torch.zeros(len(scenes), MAX_OBJECTS, 4)
        geometry[:, :, 2] = 1.0
        kind = torch.full((len(scenes), MAX_OBJECTS, 3), -1)
        color_names = tuple(OBJECT_COLORS)
        for i, scene in enumerate(scenes):
            for k, item in enumerate(scene.placed):
                group = scene.groups[item.group]
                geometry[i, k] = torch.tensor([item.x, item.y, item.radius, item.rotation])
                kind[i, k, 0] = SHAPES.index(group.shape)
                kind[i, k, 1] = color_names.index(group.color)
                kind[i, k, 2] = TEXTURES.index(group.texture)
        x, y, self.radius, rotation = (value[:, :, None, None] for value in geometry.unbind(-1))
        shape_BK, self.color_BK, self.texture_BK = kind.unbind(-1)
        dx, dy = x_HW - x, y_HW - y
        self.x_BKHW = torch.cos(rotation) * dx + torch.sin(rotation) * dy
        self.y_BKHW = torch.cos(rotation) * dy - torch.sin(rotation) * dx
        self.distance_BKHW = torch.full_like(self.x_BKHW, 9.0)
        for number, shape in enumerate(SHAPES):
            mask = shape_BK == number
            if mask.any():
                args = (self.x_BKHW[mask], self.y_BKHW[mask], self.radius[mask])
                self.distance_BKHW[mask] = _DISTANCES[shape](*args)


def _object_color(objects: _Objects, k: int, saturation: Tensor, shaded: Tensor, noise: _Noise) -> Tensor:
    palette = torch.tensor(tuple(OBJECT_COLORS.values()))
    x, y, radius = objects.x_BKHW[:, k, None], objects.y_BKHW[:, k, None], objects.radius[:, k, None]
    color = palette[objects.color_BK[:, k].clamp(min=0)][:, :, None, None]
    gray = color.mean(1, keepdim=True)
    color = gray + (color - gray) * saturation + noise.object_jitter[:, k]
    texture = objects.texture_BK[:, k].view(-1, 1, 1, 1)
    other = torch.where(color.mean(1, keepdim=True) > 0.35, color * 0.5, color * 0.45 + 0.5)
    stripes = torch.sigmoid(7 * torch.sin(2 * math.pi * 5.2 * (0.8 * x + 0.6 * y)))
    waves = torch.cos(2 * math.pi * 6.2 * x) + torch.cos(2 * math.pi * 6.2 * y)
    dots = torch.sigmoid(9 * (waves - 0.55))
    mix = (texture == TEXTURES.index("striped")) * stripes + (texture == TEXTURES.index("dotted")) * dots
    color = color * (1 - mix) + other * mix
    # Light from the upper left: a linear ramp and one highlight.
    ramp = 1 - shaded * 0.38 * 0.7 * (x + y) / radius
    highlight = torch.exp(-((x / radius + 0.35) ** 2 + (y / radius + 0.38) ** 2) / 0.06)
    return color * ramp + 0.16 * shaded * highlight


def _box(x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
    qx, qy = x.abs() - half_width, y.abs() - half_height
    return torch.hypot(qx.clamp(min=0), qy.clamp(min=0)) + torch.maximum(qx, qy).clamp(max=0)


def _circle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95 * radius


def _square(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return _box(x, y, 0.80 * radius, 0.80 * radius)


def _triangle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Equilateral, pointing up: the exact field of Inigo Quilez, https://iquilezles.org/articles/distfunctions2d/."""
    root = math.sqrt(3.0)
    half = 0.98 * radius * root / 2
    x, y = x.abs() - half, -y - 0.12 * radius + half / root
    is_beyond = x + root * y > 0
    x, y = torch.where(is_beyond, (x - root * y) / 2, x), torch.where(is_beyond, (-root * x - y) / 2, y)
    x = x - torch.maximum(x.clamp(max=0), -2 * half)
    return -torch.hypot(x, y) * torch.sign(y)


def _star(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Five-pointed, inner radius about half: the exact field of Inigo Quilez (same page as the triangle's)."""
    radius = radius * 1.05
    cos36, sin36 = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x, y = x.abs(), -y
    for normal_x in (cos36, -cos36):  # fold the five points onto one
        depth = 2 * (normal_x * x - sin36 * y).clamp(min=0)
        x, y = x - depth * normal_x, y + depth * sin36
    x, y = x.abs(), y - radius
    edge_x, edge_y = 0.5 * sin36, 0.5 * cos36 - 1.0
    along = ((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2)).clamp(min=0)
    along = torch.minimum(along, radius)
    return torch.hypot(x - edge_x * along, y - edge_y * along) * torch.sign(y * edge_x - x * edge_y)


def _ring(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.68 * radius).abs() - 0.26 * radius


def _cross(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    long, short = 0.95 * radius, 0.32 * radius
    return torch.minimum(_box(x, y, long, short), _box(x, y, short, long))


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
