"""Labels against brute force over the scenes' objects; worn-out pictures against what wear may and may not do."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rltune.builtin.labels import GRID, Labels, make_labels, wear
from rltune.builtin.scenes import GROUND_COLORS, MAX_OBJECTS, OBJECT_COLORS, SHAPES, make_scene

SCENES = tuple(make_scene(23, index) for index in range(300))
COLORS, GROUNDS = tuple(OBJECT_COLORS), tuple(GROUND_COLORS)


@pytest.fixture(scope="module")
def labels() -> Labels:
    return make_labels(SCENES)


def tensors(labels: Labels) -> tuple[Tensor, ...]:
    return labels.place_BK3, labels.color_BK, labels.shape_BK, labels.ground_B


def test_every_object_has_its_place_colour_and_shape(labels: Labels) -> None:
    assert len(labels) == len(SCENES)
    for i, scene in enumerate(SCENES):
        assert GROUNDS[labels.ground_B[i]] == scene.ground
        for k, item in enumerate(scene.placed):
            group = scene.groups[item.group]
            # A float64 number rounded to float32.
            assert labels.place_BK3[i, k].tolist() == pytest.approx([item.x, item.y, item.radius], rel=1e-7)
            assert COLORS[labels.color_BK[i, k]] == group.color
            assert SHAPES[labels.shape_BK[i, k]] == group.shape
        num_unused = MAX_OBJECTS - len(scene.placed)
        assert labels.color_BK[i, len(scene.placed) :].tolist() == [-1] * num_unused
        assert labels.shape_BK[i, len(scene.placed) :].tolist() == [-1] * num_unused


def test_a_centre_lies_in_its_cell_and_in_no_other(labels: Labels) -> None:
    centers = labels.centers()
    assert centers.shape == (len(SCENES), MAX_OBJECTS, GRID, GRID)
    assert centers.dtype == torch.float32
    expected = torch.zeros_like(centers)
    for i, scene in enumerate(SCENES):
        for k, item in enumerate(scene.placed):
            # In float32, as there: the middle of the picture is .5 but for the last bit of float64.
            column, row = (math.floor(np.float32(value) * np.float32(GRID)) for value in (item.x, item.y))
            expected[i, k, row, column] = 1
    assert torch.equal(centers, expected)


def test_no_two_centres_share_a_cell(labels: Labels) -> None:
    assert labels.centers().sum(1).max() == 1


def test_a_centre_on_the_rim_stays_in_the_grid() -> None:
    labels = Labels(torch.tensor([[[1.0, 0.0, 0.1]]]), torch.tensor([[0]]), torch.tensor([[0]]), torch.tensor([0]))
    assert labels.centers()[0, 0].nonzero().tolist() == [[0, GRID - 1]]


@pytest.mark.parametrize("share", [0.5, 0.85])
def test_discs_are_the_cells_within_a_share_of_the_radius(labels: Labels, share: float) -> None:
    discs = labels.discs(share)
    assert discs.dtype == torch.bool
    for i, scene in enumerate(SCENES[:40]):
        for k, item in enumerate(scene.placed):
            for row in range(GRID):
                for column in range(GRID):
                    distance = math.hypot((column + 0.5) / GRID - item.x, (row + 0.5) / GRID - item.y)
                    # Nearer to the rim than float32 tells apart, either answer is right.
                    if abs(distance - share * item.radius) > 1e-6:
                        assert bool(discs[i, k, row, column]) == (distance < share * item.radius)
        assert not discs[i, len(scene.placed) :].any()


def test_counts_and_shapes_of_the_colours(labels: Labels) -> None:
    counts, shapes = labels.counts(), labels.shape_of_color()
    for i, scene in enumerate(SCENES):
        groups = {group.color: group for group in scene.groups}
        for c, color in enumerate(COLORS):
            assert counts[i, c] == (groups[color].count if color in groups else 0)
            assert shapes[i, c] == (SHAPES.index(groups[color].shape) if color in groups else -1)


def test_picking_rows_is_picking_scenes(labels: Labels) -> None:
    picks = torch.tensor([7, 0, 7, 250])
    picked, expected = labels[picks], make_labels([SCENES[i] for i in picks])
    assert len(picked) == 4
    for one, other in zip(tensors(picked), tensors(expected), strict=True):
        assert torch.equal(one, other)


def test_everything_moves_to_the_device(labels: Labels) -> None:
    moved = tensors(labels.to(torch.device("meta")))
    assert [tensor.device.type for tensor in moved] == ["meta"] * 4
    assert [tensor.shape for tensor in moved] == [tensor.shape for tensor in tensors(labels)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_pictures(count: int, seed: int) -> Tensor:
    return 2 * torch.rand(count, 3, 64, 64, generator=seeded(seed)) - 1


def test_worn_pictures_stay_in_range_and_follow_the_generator() -> None:
    images = noise_pictures(16, 0)
    worn = wear(images, seeded(1))
    assert worn.shape == images.shape
    assert worn.min() >= -1
    assert worn.max() <= 1
    assert torch.equal(wear(images, seeded(1)), worn)
    assert not torch.equal(wear(images, seeded(2)), worn)


def test_a_worn_picture_depends_on_no_other() -> None:
    images = noise_pictures(8, 0)
    worn = wear(images, seeded(1))
    for row in range(8):
        changed = noise_pictures(8, 3)
        changed[row] = images[row]
        # The same draws and the same kernel on the same picture: the same bits.
        assert torch.equal(wear(changed, seeded(1))[row], worn[row])


def test_black_and_white_pictures_stay_apart() -> None:
    flat = torch.tensor([-1.0, 1.0]).repeat(8)[:, None, None, None].expand(16, 3, 64, 64)
    rows = wear(flat, seeded(4)).mean(dim=3)
    # A tint takes away at most .07 + .05; noise of at most .08, in a mean of 64: five times .01.
    assert rows[::2].max() < -0.88 + 0.05
    assert rows[1::2].min() > 0.88 - 0.05


def test_a_flat_picture_stays_flat_up_to_tint_and_noise() -> None:
    level = 0.3  # far enough from 1 for nothing to be clipped: 1.05 * .3 + .05 + 5 * .08 < 1
    worn = wear(torch.full((64, 3, 64, 64), level), seeded(5))
    mean = worn.mean(dim=(2, 3))
    # Noise of at most .08 in a mean of 4096: five times .00125.
    assert mean.min() > 0.93 * level - 0.05 - 0.007
    assert mean.max() < 1.05 * level + 0.05 + 0.007
    # Blur must not pull in what lies outside of the picture: of the 252 outermost pixels the mean is within five times
    # .08 / sqrt(252) of the others'; a zero beyond the edge would cost a blurred picture up to a third of .3.
    edge = torch.cat([worn[:, :, 0], worn[:, :, -1], worn[:, :, 1:-1, 0], worn[:, :, 1:-1, -1]], dim=2).mean(dim=2)
    assert (edge - worn[:, :, 1:-1, 1:-1].mean(dim=(2, 3))).abs().max() < 5 * 0.08 / math.sqrt(252) + 0.007
    # The spread is the noise alone: of 4096 draws it is known to 1 / sqrt(8192), five times of which is 6 %.
    assert worn.std(dim=(2, 3)).max() < 0.08 * 1.06


@pytest.mark.slow
def test_the_blur_is_a_gaussian_of_up_to_1_3_px_for_two_pictures_in_three() -> None:
    stripes = torch.ones(600, 3, 64, 64)
    stripes[..., ::2] = -1
    worn = wear(stripes, seeded(6))
    contrast_BC = (worn[..., 1::2].mean(dim=(2, 3)) - worn[..., ::2].mean(dim=(2, 3))) / 2
    # One blur a picture: its channels differ by their tints alone, of .93 to 1.05, and five times .08 / sqrt(2048).
    assert (contrast_BC.amax(1) - contrast_BC.amin(1)).max() < 0.12 + 0.01
    contrast = contrast_BC.mean(1)
    # With a = exp(-1 / (2 sigma^2)) stripes of one pixel keep (1 - 2a) / (1 + 2a) of their contrast: one half where
    # a = 1/6, sigma = .53. Drawn evenly from -.65 to 1.3, negative ones being none at all, .604 of them lie below.
    half = 1 / math.sqrt(2 * math.log(6))
    # Five binomial spreads of 600; tints of a few percent move the threshold by less.
    assert (contrast > 0.5).float().mean().item() == pytest.approx((0.65 + half) / 1.95, abs=5 * 0.02)
    # At 1.3 px next to nothing is left of stripes: a = .74, and three pixels a side cut the kernel off.
    assert contrast.min().item() == pytest.approx(0.0, abs=0.05)
