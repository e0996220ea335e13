"""The proof of a reward, on rewards that are wrong in one way each."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rltune.errors import NonFiniteError
from rltune.rewards.base import REWARDS, Card, Ready, Reward
from rltune.training.checking import networks_of, prove

PROMPTS = ["a", "b", "c"]


class Toy:
    """The mean of squares of an image, but for what a test puts in its place."""

    def __init__(
        self, score: Callable[[Tensor], Tensor], value_range: tuple[float, float] = (0.0, 1.0), **more: Any
    ) -> None:
        self._score, self.value_range = score, value_range
        vars(self).update(more)

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score(images_B3HW)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return 2 * self._score(images_B3HW)


def toy(*what: Any, **more: Any) -> Reward:
    return Ready(Toy(*what, **more), Card())


def make_images() -> Tensor:
    return torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def squares(images: Tensor) -> Tensor:
    return images.square().mean(dim=(1, 2, 3))


def test_a_right_reward_has_no_faults_and_its_numbers_are_those_of_the_formula() -> None:
    images = make_images()
    proof = prove("toy", toy(squares), images, PROMPTS)
    assert proof.faults == ()
    assert proof.scores == pytest.approx(squares(images).tolist())
    assert proof.metrics == pytest.approx((2 * squares(images)).tolist())
    assert proof.gradient_norms == pytest.approx((2 * images / 60).flatten(1).norm(dim=1).tolist())
    assert proof.leak < 1e-6
    # images.square() keeps its input of 3 * 3 * 4 * 5 floats; a number an image may be kept besides
    assert proof.activation_bytes == pytest.approx(3 * 3 * 4 * 5 * 4, abs=3 * 4)
    assert proof.weights_bytes == 0


WRONG = {
    "range": (toy(squares, (0.0, 0.1)), "the score 0.3.* is outside the stated range 0 to 0.1"),
    "flat": (toy(lambda x: 0 * squares(x) + 0.5), "gradient is exactly zero"),
    "steep": (toy(lambda x: (x - x).abs().sqrt().mean(dim=(1, 2, 3))), "gradient is not finite, got a norm of nan"),
    "batch": (toy(lambda x: squares(x) - squares(x).mean(), (-1.0, 1.0)), "depends on the other images of the batch"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_training_would_stumble_over_is_named(fault: str) -> None:
    reward, message = WRONG[fault]
    faults = prove("toy", reward, make_images(), PROMPTS).faults
    assert faults
    assert any(re.search(message, text) for text in faults), faults


def test_a_reward_that_compares_images_may() -> None:
    reward = toy(lambda x: squares(x) * squares(x).mean(), sees_group=True)
    assert prove("toy", reward, make_images(), PROMPTS).faults == ()


def test_a_score_that_is_not_finite_stops_the_proof() -> None:
    with pytest.raises(NonFiniteError, match="reward 'toy': not finite, got nan for 'a'"):
        prove("toy", toy(lambda x: squares(x) * math.nan), make_images(), PROMPTS)


def test_a_reward_without_gradient_is_not_asked_for_one() -> None:
    proof = prove("toy", toy(squares, is_differentiable=False), make_images(), PROMPTS)
    assert (proof.gradient_norms, proof.backward_ms, proof.activation_bytes) == (None, None, None)
    assert proof.faults == ()


def test_the_networks_of_a_reward_are_found_through_what_it_holds() -> None:
    inner = toy(squares, head=nn.Linear(3, 4))
    outer = toy(squares, inner=inner, again=inner, network=nn.Linear(2, 2))
    assert {network.in_features for network in networks_of(outer)} == {3, 2}  # type: ignore[union-attr]
    assert prove("toy", outer, make_images(), PROMPTS).weights_bytes == 4 * (3 * 4 + 4 + 2 * 2 + 2)


def test_two_built_in_rewards_on_one_tower_show_it() -> None:
    aesthetic, alignment = REWARDS.build("aesthetic", {}), REWARDS.build("alignment", {})
    tower = {id(network) for network in networks_of(aesthetic)} & {id(network) for network in networks_of(alignment)}
    assert len(tower) == 1
