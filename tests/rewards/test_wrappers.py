"""Rewards made of rewards: turned round, relative to words, in parts, on another device."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rltune.errors import UserError
from rltune.rewards.base import REWARDS, Card, Ready, Reward
from rltune.rewards.wrappers import Elsewhere, Frugal, Negate, Relative, features_of

PROMPTS = ["a", "bb", "ccc", "dd", "e"]


class Toy:
    """The mean of the image times the length of its prompt; its metric is ten times that. Notes what it is given."""

    value_range = (0.0, 10.0)
    metric_unit = "kB"

    def __init__(self, *, most: int = 100) -> None:
        self.most = most
        self.calls: list[list[str]] = []
        self.device = torch.device("meta")

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls.append(list(prompts))
        if len(prompts) > self.most:
            raise torch.OutOfMemoryError("full")
        return images_B3HW.square().mean(dim=(1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts])

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return 10 * self(images_B3HW, prompts)

    def features(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return images_B3HW.flatten(1)[:, :2]

    def to(self, device: torch.device) -> None:
        self.device = device


def ready(toy: Toy) -> Reward:
    return Ready(toy, Card())


def make_images() -> Tensor:
    return torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def slope(reward: Any, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    return gradient


def test_negate_turns_score_metric_range_and_slope_round() -> None:
    images, toy = make_images(), Toy()
    turned = Negate(ready(toy))
    assert torch.equal(turned(images, PROMPTS), -toy(images, PROMPTS))
    assert torch.equal(turned.metric(images, PROMPTS), -10 * toy(images, PROMPTS))
    assert torch.equal(slope(turned, images), -slope(toy, images))
    assert turned.value_range == (-10.0, 0.0)
    assert (turned.metric_unit, turned.is_differentiable, turned.sees_group) == ("kB", True, False)
    assert turned.features is not None
    assert torch.equal(turned.features(images, PROMPTS), toy.features(images, PROMPTS))


def test_relative_is_the_positive_words_score_minus_the_negative_ones() -> None:
    images, toy = make_images(), Toy()
    relative = Relative(ready(toy), positive="good", negative="terrible", k=0.5)
    level = images.square().mean(dim=(1, 2, 3))
    lengths = torch.tensor([1.0, 2, 3, 2, 1])
    # "good. a" has 6 letters more than "a", "terrible. a" 10
    expected = level * (1.5 * (lengths + 6) - (lengths + 10))
    torch.testing.assert_close(relative(images, PROMPTS), expected)
    assert toy.calls[0][0] == "good. a"
    assert toy.calls[1][0] == "terrible. a"
    torch.testing.assert_close(relative.metric(images, PROMPTS), 10 * expected)
    assert relative.value_range == (1.5 * 0 - 10, 1.5 * 10 - 0)


def test_nothing_is_left_of_a_reward_that_does_not_read_the_words() -> None:
    relative = Relative(REWARDS.build("brightness", {}), positive="good", negative="bad")
    assert relative(make_images(), PROMPTS).abs().max() == 0


def test_parts_give_the_scores_and_slopes_of_the_whole() -> None:
    images, toy = make_images(), Toy()
    parts = Frugal(ready(toy), name="toy", micro_batch=2)
    assert torch.equal(parts(images, PROMPTS), Toy()(images, PROMPTS))
    assert toy.calls == [["a", "bb"], ["ccc", "dd"], ["e"]]
    torch.testing.assert_close(slope(parts, images), slope(Toy(), images), rtol=1e-6, atol=0)
    assert torch.equal(parts.metric(images, PROMPTS), Toy().metric(images, PROMPTS))
    assert parts.features is not None
    assert torch.equal(parts.features(images, PROMPTS), toy.features(images, PROMPTS))
    assert parts(images[:0], []).shape == (0,)


def test_a_part_is_computed_again_in_the_backward_pass() -> None:
    images, toy = make_images().requires_grad_(), Toy()
    total = Frugal(ready(toy), name="toy", micro_batch=3)(images, PROMPTS).sum()
    assert len(toy.calls) == 2
    total.backward()
    assert len(toy.calls) == 4
    with torch.no_grad():
        Frugal(ready(toy), name="toy", micro_batch=3)(images, PROMPTS)
    assert len(toy.calls) == 6


def test_memory_that_runs_out_halves_the_parts_once_and_for_all(caplog: pytest.LogCaptureFixture) -> None:
    images, toy = make_images(), Toy(most=2)
    frugal = Frugal(ready(toy), name="toy")
    assert torch.equal(frugal(images, PROMPTS), Toy()(images, PROMPTS))
    assert [len(call) for call in toy.calls] == [5, 2, 2, 1]
    assert "'toy': out of memory with 5 images, going on with 2 at a time" in caplog.text
    toy.calls.clear()
    torch.testing.assert_close(slope(frugal, images), slope(Toy(), images), rtol=1e-6, atol=0)
    assert max(len(call) for call in toy.calls) == 2


def test_one_image_that_does_not_fit_is_said() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        Frugal(ready(Toy(most=0)), name="toy")(make_images(), PROMPTS)


def test_the_whole_batch_goes_through_as_it_is_while_it_fits() -> None:
    images, seen = make_images(), []

    class Watch(Toy):
        def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
            seen.append(images_B3HW)
            return super().__call__(images_B3HW, prompts)

    Frugal(ready(Watch()), name="watch")(images, PROMPTS)
    assert seen[0] is images  # the very tensor, by which rewards on one tower share its embedding


WRAPPERS = (
    lambda toy: Negate(ready(toy)),
    lambda toy: Relative(ready(toy), positive="x", negative="y"),
    lambda toy: Frugal(ready(toy), name="toy"),
)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_moves_what_it_wraps(wrap: Any) -> None:
    toy = Toy()
    wrapped = wrap(toy)
    assert wrapped.to(torch.device("cpu")) is wrapped
    assert toy.device == torch.device("cpu")


def test_a_reward_without_features_is_named() -> None:
    with pytest.raises(UserError, match="has no features to measure trust by; leave `trust` out"):
        features_of(Negate(REWARDS.build("brightness", {})), make_images(), PROMPTS)


# ---- on another device


class Weighted(Toy):
    """Has a weight, as a network has; its device is the weight's."""

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return images_B3HW.square().mean(dim=(1, 2, 3)) * torch.full((), 2.0, device=self.device)

    def features(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return images_B3HW.flatten(1) * torch.full((), 2.0, device=self.device)


def test_a_reward_elsewhere_sees_images_there_and_answers_where_they_were() -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    with FakeTensorMode():  # knows devices that are not there, and refuses to compute across two
        images = torch.rand(2, 3, 4, 4, device=first)
        toy = Weighted()
        apart = Elsewhere(Frugal(ready(toy), name="toy", micro_batch=1), second)
        assert toy.device == second
        assert apart.to(first) is apart
        assert toy.device == second
        found = [apart(images, ["a", "b"]), apart.metric(images, ["a", "b"]), features_of(apart, images, ["a", "b"])]
        assert {part.device for part in found} == {first}
        with pytest.raises(RuntimeError, match="device"):
            toy(images, ["a", "b"])


def test_a_reward_elsewhere_is_the_same_reward() -> None:
    images, toy = make_images(), ready(Toy())
    apart = Elsewhere(toy, torch.device("cpu"))
    assert torch.equal(apart(images, PROMPTS), toy(images, PROMPTS))
    assert torch.equal(apart.metric(images, PROMPTS), toy.metric(images, PROMPTS))
    assert torch.equal(slope(apart, images), slope(toy, images))
    assert (apart.value_range, apart.metric_unit, apart.is_differentiable, apart.sees_group) == (
        toy.value_range, toy.metric_unit, toy.is_differentiable, toy.sees_group
    )  # fmt: skip
