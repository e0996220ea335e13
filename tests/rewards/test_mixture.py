"""The weighted sum of standardised rewards against the formula, and what it says when a reward misbehaves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rltune.errors import NonFiniteError, RunError, UserError
from rltune.rewards.base import REWARDS, Card, Ready, Reward
from rltune.rewards.mixture import Calibration, Mixture, Shape, calibrate, measure, score
from rltune.rewards.scalarise import Chebyshev, WinRate
from rltune.rewards.trust import fit_trust

PROMPTS = ("a cat", "a dog")
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class Scored:
    """A score that a function of the images gives, and a metric of ten times that."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images_B3HW)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return 10 * self.function(images_B3HW)


def fake(function: Callable[[Tensor], Tensor], **known: Any) -> Reward:
    return Ready(Scored(function), Card(**known))


def mean_of(images_B3HW: Tensor) -> Tensor:
    return images_B3HW.mean(dim=(1, 2, 3))


def make_mixture(**changes: Any) -> Mixture:
    arguments: dict[str, Any] = {
        "rewards": {"bright": REWARDS.build("brightness", {}), "square": fake(lambda x: mean_of(x) ** 2)},
        "weights": {"bright": 3.0, "square": 1.0},
        "calibration": {"bright": Calibration(0.5, 0.1), "square": Calibration(0.2, 0.05)},
    }
    return Mixture(**(arguments | changes))


def test_the_total_is_the_weighted_sum_of_standardised_scores() -> None:
    result = make_mixture()(IMAGES, PROMPTS)
    means = [float(image.double().mean()) for image in IMAGES]
    expected = [0.75 * (mean - 0.5) / 0.1 + 0.25 * (mean**2 - 0.2) / 0.05 for mean in means]
    assert result.total_B.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)  # float32, a difference over 0.05
    assert result.raw["square"].tolist() == pytest.approx([mean**2 for mean in means], rel=1e-6)
    assert result.standardised["bright"].tolist() == pytest.approx([(m - 0.5) / 0.1 for m in means], abs=1e-5)


def test_the_gradient_is_the_weighted_sum_of_gradients() -> None:
    images = IMAGES.clone().requires_grad_()
    make_mixture()(images, PROMPTS).total_B.sum().backward()
    means = IMAGES.mean(dim=(1, 2, 3), keepdim=True)
    expected = (0.75 / 0.1 + 0.25 / 0.05 * 2 * means).expand_as(IMAGES) / 192
    torch.testing.assert_close(images.grad, expected, rtol=1e-5, atol=0)


def test_weights_are_normalised() -> None:
    assert make_mixture().weights == {"bright": 0.75, "square": 0.25}
    assert make_mixture(weights={"bright": 0.0, "square": 2.0}).weights == {"bright": 0.0, "square": 1.0}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"bright": 1.0, "square": -1.0}, "not all zero, got"),
        ({"bright": 0.0, "square": 0.0}, "not all zero, got"),
        ({"bright": math.nan, "square": 1.0}, "not all zero, got"),
        ({"bright": math.inf, "square": 1.0}, "not all zero, got"),
        ({"bright": 1.0}, "weights must name the rewards"),
        ({"bright": 1.0, "square": 1.0, "other": 1.0}, "weights must name the rewards"),
    ],
)
def test_wrong_weights_are_the_callers_fault(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mixture(weights=weights)


def test_a_missing_calibration_is_the_callers_fault() -> None:
    with pytest.raises(ValueError, match=r"\['square'\] are missing"):
        make_mixture(calibration={"bright": Calibration(0.0, 1.0)})


def test_a_reward_that_is_the_same_for_every_base_image_is_named() -> None:
    calibration = {"bright": Calibration(0.5, 0.1), "square": Calibration(0.2, 0.0)}
    with pytest.raises(RunError, match="reward 'square': it gives the same score to every base image"):
        make_mixture(calibration=calibration)


def test_a_watched_reward_without_a_scale_is_watched_in_its_own_unit() -> None:
    calibration = {"bright": Calibration(0.5, 0.1), "square": Calibration(0.2, 0.0)}
    result = make_mixture(weights={"bright": 1.0, "square": 0.0}, calibration=calibration)(IMAGES, PROMPTS)
    assert result.standardised["square"].tolist() == pytest.approx(
        [float(image.mean()) ** 2 - 0.2 for image in IMAGES], abs=1e-6
    )


SCORES = torch.tensor([-1.5, 0.25, 2.0, 2.5, 7.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (Shape(), [-1.5, 0.25, 2.0, 2.5, 7.0]),
        (Shape("hinge", 2.0), [-1.5, 0.25, 2.0, 2.0, 2.0]),
        (Shape("target", 2.0), [-1.5, 0.25, 2.0, 1.5, -3.0]),
        (Shape("hinge", -3.0), [-3.0] * 5),
        (Shape("target", 100.0), [-1.5, 0.25, 2.0, 2.5, 7.0]),
    ],
)
def test_a_shape_says_what_of_a_score_is_trained_on(shape: Shape, expected: list[float]) -> None:
    assert shape(SCORES).tolist() == expected  # halves and quarters: no rounding


def test_a_shape_is_its_loss_negated_up_to_a_constant() -> None:
    torch.testing.assert_close(2.0 - Shape("hinge", 2.0)(SCORES), (2.0 - SCORES).relu(), rtol=0, atol=0)
    torch.testing.assert_close(2.0 - Shape("target", 2.0)(SCORES), (2.0 - SCORES).abs(), rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["linear", "hinge", "target"])
def test_the_gradient_of_a_shape_is_its_slope(loss: Any) -> None:
    shape = Shape(loss, 2.0)
    scores = SCORES[SCORES != 2.0].requires_grad_()  # the kink has no slope
    (gradient,) = torch.autograd.grad(shape(scores).sum(), scores)
    step = 1e-6
    slope = (shape(scores.detach() + step) - shape(scores.detach() - step)) / (2 * step)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=0)  # double: 1e-16 * 7 / 1e-6
    assert (gradient == 0).tolist() == [False, False, loss == "hinge", loss == "hinge"]


@pytest.mark.parametrize("loss", ["linear", "hinge", "target"])
def test_a_mixture_trains_on_the_shaped_score_in_the_unit_of_the_raw_one(loss: Any) -> None:
    target = float(mean_of(IMAGES).mean())  # one image is above it, one below
    images = IMAGES.clone().requires_grad_()
    mixture = make_mixture(shapes={"bright": Shape(loss, target)})
    result = mixture(images, PROMPTS)
    means = mean_of(IMAGES).double()
    aims = {"linear": means, "hinge": means.clamp(max=target), "target": target - (target - means).abs()}
    slopes = {
        "linear": [1.0, 1.0],
        "hinge": [float(m < target) for m in means],
        "target": [1 - 2.0 * (m > target) for m in means],
    }
    # the other reward is linear, and neither raw scores nor calibration know of shapes
    expected = 0.75 * (aims[loss] - 0.5) / 0.1 + 0.25 * (means**2 - 0.2) / 0.05
    assert result.total_B.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert result.standardised["bright"].tolist() == pytest.approx(((aims[loss] - 0.5) / 0.1).tolist(), abs=1e-5)
    assert result.raw["bright"].tolist() == pytest.approx(means.tolist(), rel=1e-6)
    assert mixture.calibration == make_mixture().calibration
    result.total_B.sum().backward()
    slope_B111 = torch.tensor(slopes[loss]).view(2, 1, 1, 1)
    square_B111 = 0.25 / 0.05 * 2 * mean_of(IMAGES).view(2, 1, 1, 1)
    torch.testing.assert_close(
        images.grad, ((0.75 / 0.1 * slope_B111 + square_B111) / 192).expand_as(IMAGES), rtol=1e-5, atol=0
    )


def test_metrics_and_the_scores_of_a_reward_that_is_watched_have_their_own_shape_too() -> None:
    shapes = {"square": Shape("hinge", 0.0)}
    watched = make_mixture(weights={"bright": 1.0, "square": 0.0}, shapes=shapes)
    assert torch.equal(watched.metrics(IMAGES, PROMPTS)["square"], make_mixture().metrics(IMAGES, PROMPTS)["square"])
    result = watched(IMAGES, PROMPTS)
    assert torch.equal(result.total_B, result.standardised["bright"])
    assert result.standardised["square"].tolist() == pytest.approx([-0.2 / 0.05] * 2)


@pytest.mark.parametrize(
    ("losses", "weights", "may_saturate"),
    [
        (("linear", "linear"), (1.0, 1.0), False),
        (("linear", "target"), (1.0, 1.0), False),
        (("hinge", "hinge"), (1.0, 2.0), True),
        (("hinge", "linear"), (1.0, 0.0), True),
        (("hinge", "linear"), (1.0, 1.0), False),
        (("linear", "hinge"), (1.0, 0.0), False),
    ],
)
def test_a_mixture_may_saturate_where_what_it_trains_on_is_capped(
    losses: tuple[Any, Any], weights: tuple[float, float], may_saturate: bool
) -> None:
    shapes = dict(zip(("bright", "square"), (Shape(loss, 0.3) for loss in losses), strict=True))
    mixture = make_mixture(shapes=shapes, weights=dict(zip(("bright", "square"), weights, strict=True)))
    assert mixture.may_saturate == may_saturate


def test_a_reward_of_weight_0_is_scored_without_gradient_or_not_at_all() -> None:
    images = IMAGES.clone().requires_grad_()
    weights = {"bright": 1.0, "square": 0.0}
    result = make_mixture(weights=weights)(images, PROMPTS)
    assert not result.raw["square"].requires_grad
    assert result.raw["square"].tolist() == pytest.approx((mean_of(IMAGES) ** 2).tolist())
    assert torch.equal(result.total_B, result.standardised["bright"])
    quiet = make_mixture(weights=weights, calibration={"bright": Calibration(0.5, 0.1)}, score_all=False)
    assert set(quiet(images, PROMPTS).raw) == set(quiet.metrics(images, PROMPTS)) == {"bright"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_names_reward_and_prompt(bad: float) -> None:
    rewards = {"bright": REWARDS.build("brightness", {}), "square": fake(lambda x: torch.tensor([1.0, bad]))}
    mixture = make_mixture(rewards=rewards)
    with pytest.raises(NonFiniteError, match=rf"^reward 'square': not finite, got {bad} for 'a dog';"):
        mixture(IMAGES, PROMPTS)
    with pytest.raises(NonFiniteError, match=r"^metric of reward 'square': not finite"):
        mixture.metrics(IMAGES, PROMPTS)


def test_many_scores_that_are_not_finite_are_counted() -> None:
    with pytest.raises(NonFiniteError, match="nan for 'p2' and 2 more"):
        score(
            "bad", fake(lambda x: x.mean(dim=(1, 2, 3)) * math.nan), torch.ones(5, 3, 2, 2), [f"p{i}" for i in range(5)]
        )


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (3,)])
def test_a_score_of_another_shape_names_the_reward(shape: tuple[int, ...]) -> None:
    rewards = {"bright": REWARDS.build("brightness", {}), "square": fake(lambda x: torch.ones(shape))}
    with pytest.raises(ValueError, match=r"reward 'square': must be of shape \(2,\), got"):
        make_mixture(rewards=rewards)(IMAGES, PROMPTS)


def test_rewards_run_in_float32_whatever_autocast_is_on() -> None:
    def matmul(images_B3HW: Tensor) -> Tensor:
        flat_BN = images_B3HW.flatten(1)
        return (flat_BN @ flat_BN.T).diagonal()

    rewards = {"bright": REWARDS.build("brightness", {}), "square": fake(matmul)}
    mixture = make_mixture(rewards=rewards)
    expected = mixture(IMAGES, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul(IMAGES).dtype == torch.bfloat16
        actual = mixture(IMAGES, PROMPTS)
    assert torch.equal(actual.total_B, expected.total_B)
    assert actual.raw["square"].dtype == torch.float32
    low = score("square", fake(lambda x: x.mean(dim=(1, 2, 3))), IMAGES.bfloat16(), PROMPTS)
    assert low.dtype == torch.float32


def test_metrics_are_the_rewards_own() -> None:
    assert make_mixture().metrics(IMAGES, PROMPTS)["square"].tolist() == pytest.approx(
        (10 * mean_of(IMAGES) ** 2).tolist()
    )
    assert torch.equal(measure("bright", REWARDS.build("brightness", {}), IMAGES, PROMPTS), mean_of(IMAGES))


def test_a_mixture_is_differentiable_where_its_weights_are() -> None:
    rewards = {"bright": REWARDS.build("brightness", {}), "square": fake(mean_of, is_differentiable=False)}
    assert not make_mixture(rewards=rewards).is_differentiable
    assert make_mixture(rewards=rewards, weights={"bright": 1.0, "square": 0.0}).is_differentiable


def test_a_mixture_moves_its_rewards() -> None:
    mixture = make_mixture()
    assert mixture.to(torch.device("cpu")) is mixture


def test_a_calibration_is_mean_and_population_deviation() -> None:
    assert calibrate(torch.tensor([1.0, 3.0, 5.0, 7.0])) == Calibration(
        mean=4.0, std=pytest.approx(math.sqrt(5)), values=(1.0, 3.0, 5.0, 7.0)
    )


@pytest.mark.parametrize("value", [0.1, -3.3e4, 0.0])
def test_a_calibration_of_equal_scores_has_deviation_0(value: float) -> None:
    # In float64 the mean of equal numbers is off by a rounding, and so would be the deviation.
    assert calibrate(torch.full((7,), value)).std == 0.0
    nearly = torch.tensor([value, value * (1 + 1e-7)])  # neighbours in float32
    assert calibrate(nearly).std == 0.0


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_a_calibration_needs_finite_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one finite value"):
        calibrate(torch.tensor(values))


@dataclass
class Seeing(Scored):
    def features(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return images_B3HW.mean(dim=(2, 3))


def test_images_are_compared_without_trust_which_weighs_the_loss() -> None:
    """By the mean of the rewards' trusts, 1 for one that is not in question."""
    trust = fit_trust(torch.rand(50, 3, generator=torch.Generator().manual_seed(1)), slope=1.0, offset=1.5, ceiling=9.0)
    rewards = {"bright": REWARDS.build("brightness", {}), "square": Ready(Seeing(lambda x: mean_of(x) ** 2), Card())}
    weight = trust(IMAGES.mean(dim=(2, 3)))
    both = make_mixture(rewards=rewards, trusts={"square": trust})(IMAGES, PROMPTS)
    assert torch.equal(both.compared_B, make_mixture(rewards=rewards)(IMAGES, PROMPTS).total_B)
    assert not torch.equal(both.compared_B, both.total_B)
    assert both.trust_B is not None
    torch.testing.assert_close(both.trust_B, 0.75 + 0.25 * weight)
    alone = {"rewards": rewards, "weights": {"bright": 0.0, "square": 1.0}}
    score = make_mixture(**alone, trusts={"square": trust})(IMAGES, PROMPTS)
    assert score.trust_B is not None
    assert torch.equal(score.trust_B, weight)
    assert torch.equal(score.compared_B, make_mixture(**alone)(IMAGES, PROMPTS).total_B)
    none = make_mixture(**alone)(IMAGES, PROMPTS)
    assert none.trust_B is None
    assert none.compared_B is none.total_B


def test_trust_weighs_what_is_trained_on_and_leaves_what_is_reported() -> None:
    rewards = {"bright": REWARDS.build("brightness", {}), "square": Ready(Seeing(lambda x: mean_of(x) ** 2), Card())}
    trust = fit_trust(torch.rand(50, 3, generator=torch.Generator().manual_seed(1)), slope=1.0, offset=1.5, ceiling=9.0)
    plain = make_mixture(rewards=rewards)(IMAGES, PROMPTS)
    images = IMAGES.clone().requires_grad_()
    trusted = make_mixture(rewards=rewards, trusts={"square": trust})(images, PROMPTS)
    weight = trust(IMAGES.mean(dim=(2, 3)))
    assert 1 < weight.min() < weight.max() < 9  # neither end, or the test would not see the weights
    expected = 0.75 * plain.standardised["bright"] + 0.25 * weight * plain.standardised["square"]
    torch.testing.assert_close(trusted.total_B, expected)
    assert torch.equal(trusted.standardised["square"], plain.standardised["square"])
    (slope,) = torch.autograd.grad(trusted.total_B.sum(), images)
    size = 3 * 8 * 8
    by_hand = 0.75 / 0.1 / size + 0.25 * weight * 2 * mean_of(IMAGES) / 0.05 / size  # the weight is a constant
    torch.testing.assert_close(slope, by_hand[:, None, None, None].expand_as(slope), rtol=1e-4, atol=0)


def test_trust_in_a_reward_that_says_nothing_of_what_it_sees_is_refused() -> None:
    trust = fit_trust(torch.rand(50, 3))
    with pytest.raises(UserError, match="has no features to measure trust by"):
        make_mixture(trusts={"bright": trust})(IMAGES, PROMPTS)


def test_a_mixture_is_made_as_it_is_told() -> None:
    mixture = make_mixture(scalarise=Chebyshev(ideal=1.0, rho=0.0))
    result = mixture(IMAGES, PROMPTS)
    lags = [0.75 * (result.standardised["bright"] - 1), 0.25 * (result.standardised["square"] - 1)]
    torch.testing.assert_close(result.total_B, torch.minimum(*lags))


def test_a_win_rate_is_against_the_calibration_images() -> None:
    values = {"bright": (0.3, 0.5, 0.7), "square": (0.2, 0.25)}
    units = {"bright": Calibration(0.5, 0.1, values["bright"]), "square": Calibration(0.2, 0.05, values["square"])}
    result = make_mixture(calibration=units, scalarise=WinRate())(IMAGES, PROMPTS)
    rates = {
        name: torch.sigmoid((result.raw[name][:, None] - torch.tensor(values[name])) / units[name].std).mean(dim=1)
        for name in units
    }
    torch.testing.assert_close(result.total_B, 0.75 * rates["bright"] + 0.25 * rates["square"])


def test_an_image_that_is_not_finite_is_named_before_any_reward_sees_it() -> None:
    images = torch.rand(5, 3, 4, 4)
    images[1, 0, 2, 2], images[3:, 0, 0, 0] = math.nan, math.inf
    prompts = [f"p{i}" for i in range(5)]
    mixture = make_mixture(rewards={"bright": fake(lambda x: x.new_zeros(5)), "square": fake(lambda x: x.new_zeros(5))})
    with pytest.raises(NonFiniteError, match="images that are not finite, for 'p1', 'p3', 'p4'; lower"):
        mixture(images, prompts)


def test_every_reward_is_given_the_same_tensor() -> None:
    seen: list[Tensor] = []
    watch = fake(lambda x: (seen.append(x), mean_of(x))[1])  # type: ignore[func-returns-value]
    mixture = make_mixture(rewards={"bright": watch, "square": watch})
    mixture(IMAGES.bfloat16(), PROMPTS)
    assert seen[0] is seen[1]  # by which rewards on one tower share the embedding of an image
    assert seen[0].dtype == torch.float32
