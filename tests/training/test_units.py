"""What stands for a standard deviation where the base model's prompts do not differ, by hand."""

import math

import numpy as np
import pytest
import torch

from rltune.rewards.base import REWARDS, Reward
from rltune.runs.metrics import Unit
from rltune.training.evaluation import Samples
from rltune.training.units import measure_units

OVER_PROMPTS, OVER_IMAGES = "standard deviation over prompts", "standard deviation over images"


def flat_images(*levels: int) -> np.ndarray:
    return np.stack([np.full((4, 6, 3), level, np.uint8) for level in levels])


class Scored:
    """A reward of which only what it states is asked."""

    def __init__(self, low: float, high: float, metric_unit: str = "") -> None:
        self.value_range, self.metric_unit = (low, high), metric_unit


def unit(values_N: list[float], each: int, reward: object, name: str = "score") -> Unit:
    scores = np.array(values_N)
    samples = Samples(flat_images(*range(len(values_N))), {name: scores})
    values = {name: scores.reshape(-1, each).mean(axis=1)}
    return measure_units(values, samples, each, {name: reward})[name]  # type: ignore[dict-item]


UNBOUNDED = Scored(-math.inf, math.inf)


def test_it_is_the_standard_deviation_over_prompts_where_they_differ() -> None:
    assert unit([1.0, 3.0, 4.0, 8.0], 2, UNBOUNDED) == Unit(pytest.approx(np.std([2, 6], ddof=1)), OVER_PROMPTS)


@pytest.mark.parametrize("values", [[1.0, 3.0], [1.0, 3.0, 3.0, 1.0]])
def test_of_prompts_that_do_not_differ_it_is_that_over_images(values: list[float]) -> None:
    assert unit(values, 2, UNBOUNDED) == Unit(pytest.approx(np.std(values, ddof=1)), OVER_IMAGES)


@pytest.mark.parametrize("values", [[1.0] * 4, [0.9] * 4, [1 - 2.0**-24, 1, 1, 1]])  # the last: of float32
def test_of_a_judge_at_its_ceiling_it_is_that_of_its_stated_range(values: list[float]) -> None:
    # scatter of rounding is none: 0.9 four times has a deviation of 1e-16, and would be a unit
    found = unit(values, 2, Scored(0.0, 2.0))
    assert found.size == pytest.approx(np.sqrt(np.mean(np.square(np.linspace(-1, 1, 100_001)))), rel=1e-4)
    assert found.what == "standard deviation of even scores from 0 to 2"


@pytest.mark.parametrize("reward", [UNBOUNDED, Scored(0.0, 1.0, "kB")])
def test_where_nothing_is_known_it_is_its_own_and_says_so(reward: Scored) -> None:
    assert unit([0.5, 0.5], 1, reward) == Unit(1.0, "its own unit, since nothing of it scatters")


def test_of_drift_it_is_the_distance_between_two_noises() -> None:
    pixels = flat_images(0, 51, 255, 153)  # flat images differ by their levels: 0.2 and 0.4
    zeros = {"drift": np.zeros(2)}
    found = measure_units(zeros, Samples(pixels, {}), 2, {})["drift"]
    assert found == Unit(pytest.approx(0.3), "mean distance of two images of a prompt")
    # one image a prompt: neighbours differ by 0.2, 0.8 and 0.4
    found = measure_units({"drift": np.zeros(4), "diversity": np.zeros(4)}, Samples(pixels, {}), 1, {})
    assert found["drift"] == found["diversity"]
    assert found["drift"] == Unit(pytest.approx(1.4 / 3), "mean distance of the images of two prompts")
    assert measure_units({"drift": np.zeros(1)}, Samples(pixels[:1], {}), 1, {})["drift"].size == 1.0


def test_a_share_of_images_is_counted_in_images() -> None:
    found = measure_units({"collapse": np.zeros(2)}, Samples(flat_images(0, 51, 255, 153), {}), 2, {})
    assert found["collapse"] == Unit(1.0, "share of images")


def test_a_real_reward_states_its_range() -> None:
    reward: Reward = REWARDS.build("smoothness", {})
    flat = torch.full((4, 3, 8, 8), 0.5)
    scores = reward.metric(flat, [""] * 4).double().numpy()
    samples = Samples(flat_images(9, 9, 9, 9), {"smoothness": scores})
    low, high = reward.value_range
    found = measure_units({"smoothness": scores}, samples, 1, {"smoothness": reward})["smoothness"]
    assert found.size == pytest.approx((high - low) / 12**0.5)
