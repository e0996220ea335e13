import math
from dataclasses import replace

import pytest
import torch

from rltune.builtin.render import render
from rltune.builtin.scenes import GROUND_COLORS, OBJECT_COLORS, SIZE_PX, Group, Placed, Scene, Style, make_scene

PLAIN = Style(is_shaded=False, has_shadow=False, is_regular=True, has_vignette=False, saturation=1.0)
RADIUS = 0.3


def one_object(shape: str, rotation: float = 0.0) -> Scene:
    placed = Placed(0.5, 0.5, RADIUS, rotation, 0)
    return Scene((Group(1, "plain", "black", shape),), "white", False, PLAIN, (placed,), noise_seed=1)


def covered_area(scene: Scene) -> float:
    """Share of the picture under the object: black on white, so that brightness is coverage."""
    image = render([scene])[0]
    ground, ink = image[:, 0, 0], image.amin(dim=(1, 2))
    return ((ground[:, None, None] - image) / (ground - ink)[:, None, None]).mean().item()


def test_the_same_scene_gives_the_same_picture_alone_or_in_a_batch() -> None:
    scenes = [make_scene(2, index) for index in range(12)]
    batch = render(scenes)
    assert batch.shape == (12, 3, SIZE_PX, SIZE_PX)
    assert batch.dtype == torch.float32
    alone = torch.cat([render([scene]) for scene in scenes])
    # Vectorised transcendental functions may round differently for another batch; a byte step is 4e-3.
    torch.testing.assert_close(alone, batch, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi * (0.95 * RADIUS) ** 2),
        ("square", (2 * 0.80 * RADIUS) ** 2),
        ("triangle", 3 * math.sqrt(3) / 4 * (0.98 * RADIUS) ** 2),  # equilateral, circumradius .98 R
        ("ring", math.pi * RADIUS**2 * (0.94**2 - 0.42**2)),
        ("cross", RADIUS**2 * (2 * (1.9 * 0.64) - 0.64**2)),
    ],
)
def test_shapes_have_the_area_of_the_closed_form(shape: str, area: float) -> None:
    # Anti-aliasing errs by a fraction of a pixel along an edge of some 100 px: 1.5 % of these areas.
    assert covered_area(one_object(shape)) == pytest.approx(area, rel=0.015)
    assert covered_area(one_object(shape, rotation=0.3)) == pytest.approx(area, rel=0.015)


def test_a_star_has_five_points() -> None:
    scene = one_object("star")
    turned = [
        render([replace(scene, placed=(replace(scene.placed[0], rotation=k * 2 * math.pi / 5),))]) for k in (0, 1)
    ]
    torch.testing.assert_close(*turned, rtol=0, atol=2e-3)  # float32 trigonometry, times 64 px per unit at an edge
    other = render([replace(scene, placed=(replace(scene.placed[0], rotation=math.pi / 5),))])
    assert (other - turned[0]).abs().max() > 0.5


def test_colors_are_those_of_the_palette() -> None:
    for color in OBJECT_COLORS:
        scene = one_object("square")
        ground = "black" if color != "black" else "white"
        image = render([replace(scene, groups=(Group(1, "plain", color, "square"),), ground=ground)])[0]
        # Jitter is uniform with standard deviation .02, so at most .035.
        assert image[:, 32, 32].tolist() == pytest.approx(OBJECT_COLORS[color], abs=0.036)
        assert image[:, 1, 1].tolist() == pytest.approx(GROUND_COLORS[ground], abs=0.036)


@pytest.mark.parametrize("flag", ["is_shaded", "has_shadow", "has_vignette"])
def test_every_style_factor_shows(flag: str) -> None:
    scene = replace(one_object("circle"), groups=(Group(1, "plain", "red", "circle"),))
    styled = replace(scene, style=replace(PLAIN, **{flag: True}))
    assert (render([styled]) - render([scene])).abs().max() > 0.05


def test_less_saturation_is_grayer() -> None:
    scene = replace(one_object("circle"), groups=(Group(1, "plain", "red", "circle"),))
    dull = replace(scene, style=replace(PLAIN, saturation=0.5))
    spread = [(image[0, 32, 32] - image[1, 32, 32]).item() for image in render([scene, dull])]
    red, green, _ = OBJECT_COLORS["red"]
    assert spread[0] - spread[1] == pytest.approx((red - green) / 2, abs=1e-5)  # same jitter in both


@pytest.mark.slow
def test_no_picture_is_out_of_range_or_not_finite() -> None:
    images = render([make_scene(11, index) for index in range(200)])
    assert images.isfinite().all()
    assert images.min() >= 0
    assert images.max() <= 1
