"""Statistics of the pixels against closed forms and numpy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rltune.rewards.base import REWARDS


def score(name: str, images_B3HW: Tensor) -> list[float]:
    return REWARDS.build(name, {})(images_B3HW, [""] * len(images_B3HW)).tolist()


def mix(a: list[float], b: list[float], share: float = 0.5) -> Tensor:
    """An image of 8 x 10 whose upper part, ``share`` of it, has colour ``a``, and the rest ``b``."""
    image_3HW = torch.tensor(b).view(3, 1, 1).repeat(1, 8, 10)
    image_3HW[:, : round(8 * share)] = torch.tensor(a).view(3, 1, 1)
    return image_3HW[None]


RED, CYAN, BLACK, WHITE = [1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0] * 3, [1.0] * 3


def test_smoothness_is_minus_total_variation() -> None:
    stripes = torch.zeros(1, 3, 4, 4)
    stripes[..., ::2] = 1.0  # every horizontal step is 1, every vertical one 0
    assert score("smoothness", stripes) == [-1.0]
    checks = (torch.arange(4)[:, None] + torch.arange(4)[None, :]).remainder(2).float().expand(1, 3, 4, 4)
    assert score("smoothness", checks) == [-2.0]


def test_brightness_is_the_mean() -> None:
    images = torch.stack([torch.full((3, 5, 7), 0.25), torch.ones(3, 5, 7)])
    # A mean of 105 equal float32 numbers, rounded.
    assert score("brightness", images) == pytest.approx([0.25, 1.0], rel=1e-6)
    assert not math.isinf(REWARDS.build("brightness", {}).value_range[1])


def test_contrast_of_two_levels_is_known() -> None:
    # Two values a and b, shares p and 1 - p: deviation |a - b| sqrt(p (1 - p)). float32 rounds to 6e-8 of it.
    assert score("contrast", mix(BLACK, WHITE)) == pytest.approx([0.5], rel=1e-6)
    assert score("contrast", mix(BLACK, WHITE, 0.25)) == pytest.approx([math.sqrt(3) / 4], rel=1e-6)
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        lit = [float(channel == i) for i in range(3)]
        assert score("contrast", mix(lit, BLACK)) == pytest.approx([weight / 2], rel=1e-6)


def test_colourfulness_of_two_colours_is_known() -> None:
    # Red is (1, 0.5) of the opponent channels and cyan (-1, -0.5), both sqrt(1.25) from gray: deviations of
    # sqrt(1.25) * 2 sqrt(p (1 - p)), a mean sqrt(1.25) * |2 p - 1| from gray.
    assert score("colourfulness", mix(RED, RED)) == pytest.approx([0.3 * math.sqrt(1.25)], rel=1e-5)  # the EPS is 3e-6
    assert score("colourfulness", mix(RED, CYAN)) == pytest.approx([math.sqrt(1.25)], rel=1e-5)
    quarter = math.sqrt(1.25) * (2 * math.sqrt(0.25 * 0.75) + 0.3 * 0.5)
    assert score("colourfulness", mix(RED, CYAN, 0.25)) == pytest.approx([quarter], rel=1e-5)
    assert score("colourfulness", mix(BLACK, WHITE)) == pytest.approx([0], abs=2e-6)  # 1.3 sqrt(EPS)


def test_no_mix_of_colours_leaves_the_range_and_one_reaches_its_end() -> None:
    low, high = REWARDS.build("colourfulness", {}).value_range
    share = (1 + 0.3 / math.sqrt(1.09)) / 2  # a mean that is 0.3 times the deviation: Cauchy-Schwarz is tight
    red = torch.linspace(0, 1, 10_001) < share
    best = torch.where(red[None, :, None], torch.tensor(RED)[:, None, None], torch.tensor(CYAN)[:, None, None])
    assert score("colourfulness", best[None]) == pytest.approx([high], rel=1e-4)  # the share is a multiple of 1e-4
    corners = (torch.rand(500, 3, 2, 4, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    values = score("colourfulness", corners)
    assert low <= min(values)
    assert max(values) <= high


@pytest.mark.parametrize("name", ["contrast", "colourfulness"])
@pytest.mark.parametrize("level", [0.0, 0.3, 0.5, 1.0])
def test_the_gradient_of_a_flat_image_is_finite(name: str, level: float) -> None:
    images = torch.full((1, 3, 48, 64), level, requires_grad=True)
    (gradient,) = torch.autograd.grad(REWARDS.build(name, {})(images, [""]).sum(), images)
    assert gradient.isfinite().all()
    # The opponent channels and luma have slopes of sqrt(2) at most in a pixel, a deviation and a mean of n numbers of
    # 1 / sqrt(n): 1.3 sqrt(2) / sqrt(n) in all.
    assert gradient.norm() < 2 / math.sqrt(48 * 64)


def numpy_contrast(picture: np.ndarray) -> float:
    return float((picture @ np.array([0.299, 0.587, 0.114])).std())


def numpy_colourfulness(picture: np.ndarray) -> float:
    rg = picture[..., 0] - picture[..., 1]
    yb = 0.5 * (picture[..., 0] + picture[..., 1]) - picture[..., 2]
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


@pytest.mark.parametrize(("name", "theirs"), [("contrast", numpy_contrast), ("colourfulness", numpy_colourfulness)])
def test_numpy_agrees(name: str, theirs: object) -> None:
    images = torch.rand(6, 3, 37, 21, generator=torch.Generator().manual_seed(0)) ** torch.arange(1, 7).view(6, 1, 1, 1)
    expected = [theirs(image.permute(1, 2, 0).double().numpy()) for image in images]  # type: ignore[operator]
    # 777 float32 numbers, summed to a few roundings of 6e-8.
    assert score(name, images) == pytest.approx(expected, rel=2e-6)
