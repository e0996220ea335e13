"""The estimate of JPEG bits, and the distance that DRaFT trains on, against real file sizes."""

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rltune.builtin.render import render
from rltune.builtin.scenes import make_scene
from rltune.errors import UserError
from rltune.rewards.base import REWARDS, has_gradient
from rltune.rewards.jpeg import round_trip


@pytest.fixture(scope="module")
def scenes() -> Tensor:
    return render([make_scene(0, i) for i in range(96)])


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.numpy(), b.numpy())[0, 1])


def test_the_estimate_follows_the_bytes_and_the_distance_of_draft_does_not(scenes: Tensor) -> None:
    reward = REWARDS.build("compressibility", {})
    prompts = [""] * len(scenes)
    bytes_B = reward.metric(scenes, prompts)
    distance_B = REWARDS.build("compressibility", {"signal": "distance"})(scenes, prompts)
    estimated, distant = correlation(reward(scenes, prompts), bytes_B), correlation(distance_B, bytes_B)
    assert estimated > 0.97
    assert distant < estimated - 0.2


@pytest.mark.parametrize("chroma", ["4:2:0", "4:4:4"])
def test_the_estimate_follows_the_bytes_of_its_own_chroma(scenes: Tensor, chroma: str) -> None:
    reward = REWARDS.build("compressibility", {"chroma": chroma})
    prompts = [""] * len(scenes)
    sizes_kb, num_pixels = [], scenes.shape[2] * scenes.shape[3]
    for scene in scenes:
        buffer = io.BytesIO()
        pixels = (scene * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling={"4:2:0": 2, "4:4:4": 0}[chroma])
        sizes_kb.append(buffer.tell() / 1000)
    assert (-reward.metric(scenes, prompts)).tolist() == pytest.approx(sizes_kb)
    bits_B = -reward(scenes, prompts) * num_pixels
    assert correlation(bits_B, torch.tensor(sizes_kb)) > 0.97


def test_whole_chroma_costs_more() -> None:
    # Colours that differ from pixel to pixel, at one luma: four times the chroma that is kept when it is not halved.
    generator = torch.Generator().manual_seed(0)
    tint = torch.rand(4, 1, 64, 64, generator=generator) - 0.5
    images = 0.5 + torch.cat([0.587 * tint, -0.299 * tint, torch.zeros_like(tint)], dim=1)
    halved, whole = (REWARDS.build("compressibility", {"chroma": chroma}) for chroma in ("4:2:0", "4:4:4"))
    assert (whole(images, [""] * 4) < 2 * halved(images, [""] * 4)).all()
    assert (whole.metric(images, [""] * 4) < 2 * halved.metric(images, [""] * 4)).all()


@pytest.mark.parametrize("options", [{}, {"chroma": "4:4:4"}, {"quality": 50}, {"signal": "distance"}])
def test_incompressibility_has_the_sign_turned(scenes: Tensor, options: dict[str, Any]) -> None:
    few, many = (REWARDS.build(name, options) for name in ("compressibility", "incompressibility"))
    assert torch.equal(many(scenes[:4], [""] * 4), -few(scenes[:4], [""] * 4))
    assert torch.equal(many.metric(scenes[:4], [""] * 4), -few.metric(scenes[:4], [""] * 4))
    assert (many(scenes[:4], [""] * 4) > 0).all()
    assert (many.metric(scenes[:4], [""] * 4) > 0).all()
    assert many.value_range == (0, math.inf)
    assert few.value_range == (-math.inf, 0)


def test_the_distance_is_that_to_the_round_trip_at_its_quality(scenes: Tensor) -> None:
    decoded = round_trip(scenes[:4], quality=25)
    distance = REWARDS.build("compressibility", {"signal": "distance", "quality": 25})(scenes[:4], [""] * 4)
    torch.testing.assert_close(distance, -(scenes[:4] - decoded).square().mean(dim=(1, 2, 3)))
    assert REWARDS.build("compressibility", {"signal": "distance"})(scenes[:0], []).shape == (0,)


@pytest.mark.parametrize(
    "options", [{"chroma": "4:4:4"}, {"signal": "distance"}, {"signal": "distance", "quality": 25}]
)
@pytest.mark.parametrize("size", [(48, 48), (37, 21)])
def test_the_gradient_of_each_signal_is_the_slope(
    size: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # as the suite of every reward does
    reward = REWARDS.build("compressibility", options)
    generator = torch.Generator().manual_seed(0)
    images = 0.2 + 0.6 * torch.rand(2, 3, *size, generator=generator, dtype=torch.float64)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, ["", ""]).sum(), images)
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()
    for _ in range(4):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        # Small, lest a coefficient of the distance steps over the jump midway between two levels: with 10000 of them,
        # moved by 1e-7 of a step, one in a thousand directions has one that does.
        step = 1e-9 * direction
        rise = (reward(images + step, ["", ""]) - reward(images - step, ["", ""])).sum() / 2e-9
        # Rounding: 1e-16 * 5 bits / 1e-9 = 5e-7, far less of a distance; against slopes of 1e-4 to 1.
        assert rise.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("quality", [40, 95])
@pytest.mark.parametrize(("chroma", "subsampling"), [("4:2:0", 2), ("4:4:4", 0)])
def test_jpeg_bytes_are_those_of_the_file(scenes: Tensor, quality: int, chroma: str, subsampling: int) -> None:
    reward = REWARDS.build("jpeg_bytes", {"quality": quality, "chroma": chroma})
    buffer = io.BytesIO()
    pixels = (scenes[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    images = scenes[:1].clone().requires_grad_()
    for values in (reward(images, [""]), reward.metric(images, [""])):
        assert values.item() == pytest.approx(-buffer.tell() / 1000)
        assert not values.requires_grad
    assert not has_gradient("jpeg_bytes")


NAMES = ("compressibility", "incompressibility", "jpeg_bytes")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quality", [0, 101, 50.0, "high", True])
def test_a_quality_out_of_range_is_refused(name: str, quality: object) -> None:
    with pytest.raises(UserError, match=rf"reward '{name}': quality must be a whole number in \[1, 100\], got"):
        REWARDS.build(name, {"quality": quality})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chroma", ["4:2:2", 444, None, ["4:4:4"]])
def test_another_chroma_is_refused(name: str, chroma: object) -> None:
    with pytest.raises(UserError, match=f"reward '{name}': chroma must be '4:2:0' or '4:4:4', got"):
        REWARDS.build(name, {"chroma": chroma})


@pytest.mark.parametrize("name", NAMES[:2])
def test_another_signal_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"reward '{name}': signal must be 'bits' or 'distance', got 'bytes'"):
        REWARDS.build(name, {"signal": "bytes"})
    with pytest.raises(UserError, match=f"reward '{name}': chroma must be '4:2:0' with signal 'distance', .* '4:4:4'"):
        REWARDS.build(name, {"signal": "distance", "chroma": "4:4:4"})
