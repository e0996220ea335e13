"""A target in the unit that is reported is a target in the unit of the score."""

import math
import random

import pytest
import torch
from torch import Tensor

from rltune.builtin.render import render
from rltune.builtin.scenes import distinct_scenes
from rltune.errors import UserError
from rltune.rewards.base import REWARDS, Reward
from rltune.rewards.jpeg import (
    encode_jpeg,
    estimate_bits,
    estimate_of_kilobytes,
    estimated_kilobytes,
    file_sizes,
    header_bytes,
)
from rltune.rewards.scale import score_of
from rltune.rewards.wrappers import Frugal, Negate, Relative

SIZE_PX = 64
SCENES = distinct_scenes(0, 48, is_heldout=True)
PROMPTS = [scene.caption(random.Random(i)) for i, scene in enumerate(SCENES)]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return render(SCENES)


def wrapped(name: str, wrapper: str) -> Reward:
    reward = REWARDS.build(name, {})
    return {"": reward, "negate": Negate(reward), "both": Frugal(Negate(reward), name=name)}[wrapper]


@pytest.mark.parametrize("wrapper", ["", "negate", "both"])
@pytest.mark.parametrize("name", ["presence", "brightness", "aesthetic"])
def test_the_score_of_an_image_s_metric_is_its_score(images: Tensor, name: str, wrapper: str) -> None:
    reward = wrapped(name, wrapper)
    scores, metrics = reward(images[:8], PROMPTS[:8]), reward.metric(images[:8], PROMPTS[:8])
    for score, metric in zip(scores.tolist(), metrics.tolist(), strict=True):
        assert score_of(reward, metric, num_pixels=SIZE_PX**2) == pytest.approx(score, abs=1e-6)  # float32 of exp
    assert name != "presence" or not torch.allclose(scores, metrics)


def test_a_chance_is_one(images: Tensor) -> None:
    presence = REWARDS.build("presence", {})
    assert score_of(presence, 0.9, num_pixels=1) == math.log(0.9)
    assert score_of(Negate(presence), -0.1, num_pixels=1) == -math.log(0.1)
    for chance in (0.0, -0.5, 1.5, math.nan):
        with pytest.raises(UserError, match="reward 'presence': a target is a chance, above 0 and at most 1, got"):
            score_of(presence, chance, num_pixels=1)


def test_a_difference_takes_a_target_where_it_is_reported_as_it_is_scored() -> None:
    words = {"positive": "good", "negative": "bad"}
    assert score_of(Relative(REWARDS.build("brightness", {}), **words), 0.25, num_pixels=1) == 0.25
    with pytest.raises(UserError, match="takes no target"):
        score_of(Relative(REWARDS.build("presence", {}), **words), 0.25, num_pixels=1)


@pytest.mark.parametrize("chroma", ["4:2:0", "4:4:4"])
def test_a_header_is_what_the_standard_has_of_it(chroma: str) -> None:
    # start, JFIF, two quantisation tables, the frame, Huffman tables of 12 and 162 codes twice, the scan, and the end
    assert header_bytes(chroma) == 2 + 18 + 2 * 69 + 19 + 2 * (33 + 183) + 14 + 2
    flat = len(encode_jpeg(torch.full((3, 64, 64), 0.5), quality=95, chroma=chroma))
    assert header_bytes(chroma) < flat < header_bytes(chroma) + 200  # blocks of nothing take 2 to 6 bits each


def coloured(exponent: float, size_px: int) -> Tensor:
    """Noise with a spectrum of 1 / f^exponent, much as photographs have at 2, and channels that go together."""
    generator = torch.Generator().manual_seed(0)
    f_squared = torch.fft.fftfreq(size_px)[:, None] ** 2 + torch.fft.rfftfreq(size_px)[None] ** 2
    white = torch.randn(2, 3, size_px, size_px, generator=generator)
    z = torch.fft.irfft2(torch.fft.rfft2(white) * (f_squared + size_px**-2) ** (-exponent / 2))
    channels = torch.tensor([[1, 0.15, 0.05], [1, -0.05, -0.15], [1, -0.1, 0.15]])
    return (0.5 + 0.18 * torch.einsum("ck,bkhw->bchw", channels, z / z.std())).clamp(0, 1)


@pytest.mark.parametrize("chroma", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("kind", ["scenes", "rough", "photograph", "smooth"])
def test_kilobytes_are_estimated_within_what_is_said(images: Tensor, kind: str, chroma: str) -> None:
    shown = {
        "scenes": lambda: images,
        "rough": lambda: coloured(0.8, 64),
        "photograph": lambda: coloured(1.6, 256),
        "smooth": lambda: coloured(2.0, 512),
    }[kind]()
    num_pixels = shown.shape[-1] * shown.shape[-2]
    bits = estimate_bits(shown, quality=95, chroma=chroma)
    for file, bits_per_pixel in zip(file_sizes(shown, quality=95, chroma=chroma).tolist(), bits.tolist(), strict=True):
        estimated = estimated_kilobytes(bits_per_pixel, num_pixels=num_pixels, chroma=chroma)
        assert 0.89 < estimated / file < 1.12
        back = estimate_of_kilobytes(estimated, num_pixels=num_pixels, chroma=chroma)
        assert back == pytest.approx(bits_per_pixel, rel=1e-9)


@pytest.mark.parametrize(("name", "sign"), [("compressibility", -1), ("incompressibility", 1)])
def test_a_target_in_kilobytes_parts_images_as_their_files_do(images: Tensor, name: str, sign: int) -> None:
    reward = REWARDS.build(name, {})
    metrics, scores = reward.metric(images, PROMPTS), reward(images, PROMPTS)
    target = float(metrics.median())
    parted = (scores >= score_of(reward, target, num_pixels=SIZE_PX**2)) == (metrics >= target)
    assert float(parted.float().mean()) > 0.9
    # the score is no kilobytes: as such the target would part nothing
    assert bool(((scores >= target) == (sign < 0)).all())


@pytest.mark.parametrize("options", [{"quality": 50}, {"signal": "distance"}])
def test_a_signal_that_does_not_look_at_the_file_takes_no_target(options: dict[str, object]) -> None:
    reward = REWARDS.build("compressibility", options)
    with pytest.raises(UserError, match="a target is in kilobytes of the file that is reported, at quality 95"):
        score_of(reward, -1.5, num_pixels=1)
