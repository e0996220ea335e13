"""From several rewards to one number: values by hand, gradients by the formula."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from rltune.pareto import front
from rltune.rewards.scalarise import (
    SCALARISATIONS,
    Chebyshev,
    GradientBalance,
    MinNorm,
    NonDominated,
    WeightedSum,
    WinRate,
    min_norm_shares,
    non_dominated,
)

WEIGHTS = {"a": 0.75, "b": 0.25}
NONE = torch.zeros(1)  # images that the method does not look at


def scores(a: list[float], b: list[float]) -> dict[str, Tensor]:
    return {
        name: torch.tensor(values, dtype=torch.float32, requires_grad=True) for name, values in (("a", a), ("b", b))
    }


def test_a_weighted_sum() -> None:
    assert WeightedSum()(scores([1, 2], [-4, 8]), WEIGHTS, NONE, {}).tolist() == [-0.25, 3.5]


def test_chebyshev_follows_what_lags_behind() -> None:
    both = scores([1, 2], [-5, 2.5])
    total = Chebyshev(ideal=3.0, rho=0.1)(both, WEIGHTS, NONE, {})
    # image 0: lags .75 * -2 = -1.5 and .25 * -8 = -2; image 1: -.75 and -.125
    assert total.tolist() == pytest.approx([-2 - 0.35, -0.75 - 0.0875])
    total.sum().backward()
    assert both["a"].grad is not None
    assert both["b"].grad is not None
    assert both["a"].grad.tolist() == pytest.approx([0.1 * 0.75, 1.1 * 0.75])
    assert both["b"].grad.tolist() == pytest.approx([1.1 * 0.25, 0.1 * 0.25])


def test_chebyshev_reaches_the_middle_of_a_front_that_bends_inwards() -> None:
    # On the arc a^2 + b^2 = 1 seen from below, a sum has its best at an end and Chebyshev where the lags are equal.
    angle = torch.linspace(0, torch.pi / 2, 1001)
    arc = {"a": 1 - angle.sin(), "b": 1 - angle.cos()}
    even = {"a": 0.5, "b": 0.5}
    assert WeightedSum()(arc, even, NONE, {}).argmax().item() in (0, 1000)
    assert Chebyshev(ideal=1.0, rho=0.0)(arc, even, NONE, {}).argmax().item() == 500


def test_a_win_rate_is_the_chance_against_the_base_models_images() -> None:
    base = {"a": torch.tensor([0.0, np.log(3)]), "b": torch.tensor([0.0])}
    total = WinRate()(scores([np.log(3), 1e4], [0, 1e4]), WEIGHTS, NONE, base)
    # sigmoid(log 3) = 3/4 and sigmoid(0) = 1/2
    assert total.tolist() == pytest.approx([0.75 * (0.75 + 0.5) / 2 + 0.25 * 0.5, 1.0])


def test_the_non_dominated_are_those_of_the_definition() -> None:
    values = torch.randint(0, 4, (40, 3), generator=torch.Generator().manual_seed(0)).double()
    kept = set(np.flatnonzero(non_dominated(values).numpy()).tolist())
    assert 0 < len(kept) < 40
    expected = {
        i
        for i in range(40)
        if not any((values[j] >= values[i]).all() and (values[j] > values[i]).any() for j in range(40))
    }
    assert kept == expected
    assert kept == set(np.flatnonzero(front.non_dominated(values.numpy())).tolist())


def test_only_the_non_dominated_count_and_their_mean_is_the_batchs() -> None:
    both = scores([1, 2, 0], [1, 0, 0.5])  # the last is beaten by the first
    total = NonDominated()(both, WEIGHTS, NONE, {})
    assert total.tolist() == pytest.approx([1.0 * 3 / 2, 1.5 * 3 / 2, 0])
    assert total.mean().item() == pytest.approx((1.0 + 1.5) / 2)
    total.sum().backward()
    assert both["a"].grad is not None
    assert both["a"].grad.tolist() == pytest.approx([1.125, 1.125, 0])


def make_images() -> Tensor:
    return torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def test_balanced_gradients_have_the_length_of_their_weights() -> None:
    images = make_images()
    directions = torch.randn(2, *images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    steepness = torch.tensor([[1.0, 100.0], [5.0, 0.01]], dtype=torch.float64)
    values = {name: steepness[k] * (images * directions[k]).sum(dim=(1, 2, 3)) for k, name in enumerate(WEIGHTS)}
    total = GradientBalance()(values, WEIGHTS, images, {})
    torch.testing.assert_close(total, WeightedSum()(values, WEIGHTS, images, {}), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(total.sum(), images)
    for i in range(2):
        slopes = [steepness[k, i] * directions[k, i] for k in range(2)]
        lengths = [slope.norm() for slope in slopes]
        mixed = sum(w * slope / n for w, slope, n in zip(WEIGHTS.values(), slopes, lengths, strict=True))
        length = sum(w * n for w, n in zip(WEIGHTS.values(), lengths, strict=True))
        torch.testing.assert_close(gradient[i], mixed * length, rtol=1e-12, atol=0)


def test_one_reward_alone_keeps_its_own_gradient() -> None:
    images = make_images()
    value = {"a": images.square().sum(dim=(1, 2, 3))}
    (gradient,) = torch.autograd.grad(GradientBalance()(value, {"a": 1.0}, images, {}).sum(), images)
    torch.testing.assert_close(gradient, 2 * images.detach(), rtol=1e-12, atol=0)


def test_a_reward_that_is_flat_at_an_image_does_not_spoil_the_balance() -> None:
    images = make_images()
    flat = {"a": images.sum(dim=(1, 2, 3)), "b": (0 * images).sum(dim=(1, 2, 3))}
    (gradient,) = torch.autograd.grad(GradientBalance()(flat, WEIGHTS, images, {}).sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, 0.75 * 0.75), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", [GradientBalance(), MinNorm()])
def test_without_gradient_a_balance_is_a_sum(method: GradientBalance | MinNorm) -> None:
    images = make_images().detach()
    values = {name: images.sum(dim=(1, 2, 3)) for name in WEIGHTS}
    assert torch.equal(method(values, WEIGHTS, images, {}), WeightedSum()(values, WEIGHTS, images, {}))


@pytest.mark.parametrize(
    ("slopes", "shares"),
    [
        ([[1, 0], [0, 2]], [0.8, 0.2]),  # at right angles: shares as the other's squared length
        ([[1, 0], [3, 1]], [1, 0]),  # the shorter one already raises the other
        ([[1, 0], [-2, 0]], [2 / 3, 1 / 3]),  # against each other: nothing raises both
        ([[0, 0], [3, 1]], [0, 1]),  # without slope, without a say
        ([[0, 0], [0, 0]], [0, 0]),
        ([[2e-30, 0], [0, 2e-30]], [0.5, 0.5]),
        ([[1, 0], [0, 1], [2, 2]], [0.5, 0.5, 0]),
    ],
)
def test_shares_of_the_shortest_mix(slopes: list[list[float]], shares: list[float]) -> None:
    found = min_norm_shares(torch.tensor([slopes], dtype=torch.float64))
    assert found[0].tolist() == pytest.approx(shares, abs=1e-12)


def test_the_shortest_mix_is_shorter_than_others_and_raises_every_reward() -> None:
    generator = torch.Generator().manual_seed(4)
    slopes_BKN = torch.randn(40, 4, 7, generator=generator, dtype=torch.float64)
    slopes_BKN = slopes_BKN * torch.rand(40, 4, 1, generator=generator, dtype=torch.float64) * 10 + 1
    shares_BK = min_norm_shares(slopes_BKN)
    torch.testing.assert_close(shares_BK.sum(dim=1), torch.ones(40, dtype=torch.float64), rtol=1e-12, atol=0)
    assert bool((shares_BK >= 0).all())
    mix_BN = (shares_BK[:, :, None] * slopes_BKN).sum(dim=1)
    length_B = mix_BN.square().sum(dim=1)
    assert bool(((slopes_BKN * mix_BN[:, None]).sum(dim=2) >= length_B[:, None] - 1e-10).all())
    others = torch.from_numpy(np.random.default_rng(0).dirichlet([1.0] * 4, size=2000))
    lengths = torch.einsum("ok,bkn->obn", others, slopes_BKN).square().sum(dim=2)
    assert bool((lengths.amin(dim=0) >= length_B - 1e-10).all())


def test_min_norm_has_the_shortest_mix_as_its_gradient_and_the_sum_as_its_number() -> None:
    images = make_images()
    directions = torch.randn(2, *images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = {name: (images * directions[k]).sum(dim=(1, 2, 3)) for k, name in enumerate(WEIGHTS)}
    trust = torch.tensor([2.0, 1.2], dtype=torch.float64)
    total = MinNorm()(values, WEIGHTS, images, {}, {"b": trust})
    torch.testing.assert_close(total, WeightedSum()(values, WEIGHTS, images, {}, {"b": trust}), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(total.sum(), images)
    for i in range(2):
        a, b = directions[0, i].flatten(), directions[1, i].flatten()
        share = float(((b - a) @ b / (b - a).square().sum()).clamp(0, 1))  # of a: Sener and Koltun's two-task case
        expected = share * directions[0, i] + float(trust[i]) * (1 - share) * directions[1, i]
        torch.testing.assert_close(gradient[i], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", SCALARISATIONS)
def test_an_image_counts_by_itself_unless_the_method_says_otherwise(method: str) -> None:
    images = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    base = {"a": torch.randn(5, generator=torch.Generator().manual_seed(3)), "b": torch.zeros(3)}
    combine = SCALARISATIONS[method]()

    def total_and_slope(chosen: list[int]) -> tuple[Tensor, Tensor]:
        part = images.detach()[chosen].requires_grad_()
        values = {"a": part.square().sum(dim=(1, 2, 3)), "b": part.amax(dim=(1, 2, 3))}
        total = combine(values, WEIGHTS, part, base)
        return total.detach(), torch.autograd.grad(total.sum(), part)[0]

    whole, slope = total_and_slope([0, 1, 2, 3])
    alone = [total_and_slope([i]) for i in range(4)]
    is_same = torch.allclose(whole, torch.cat([total for total, _ in alone])) and torch.allclose(
        slope, torch.cat([each for _, each in alone])
    )
    assert is_same != combine.sees_batch


@pytest.mark.parametrize("method", SCALARISATIONS)
def test_more_of_everything_is_never_worth_less(method: str) -> None:
    steps = torch.linspace(-2, 2, 5)
    combine = SCALARISATIONS[method]()
    if combine.sees_batch:
        pytest.skip("an image's number depends on the others")
    for a, b in itertools.product(steps.tolist(), repeat=2):
        low, high = (combine(scores([a + d], [b + d]), WEIGHTS, NONE, {"a": steps, "b": steps}) for d in (0.0, 0.5))
        assert high.item() > low.item()


# ---- trust in a reward weighs its term


@pytest.mark.parametrize("method", SCALARISATIONS)
def test_trust_in_the_only_reward_is_the_weight_of_an_images_gradient(method: str) -> None:
    """2.21 times it, PrefPaint's ceiling; of a score times 2.21, a win rate at z = 1.8 has 0.33 of the gradient."""
    images = torch.tensor([1.8, -1.0, 0.5]).view(3, 1, 1, 1).expand(3, 3, 2, 2).contiguous().requires_grad_()
    value = {"a": images.mean(dim=(1, 2, 3))}
    base = {"a": torch.zeros(1)}
    combine = SCALARISATIONS[method]()

    def slopes(trust: dict[str, Tensor]) -> Tensor:
        total = combine(value, {"a": 1.0}, images, base, trust)
        return torch.autograd.grad(total.sum(), images, retain_graph=True)[0]

    plain, weights = slopes({}), torch.tensor([2.21, 1.0, 1.5])
    assert torch.equal(slopes({"a": torch.ones(3)}), plain)
    torch.testing.assert_close(slopes({"a": weights}), weights.view(3, 1, 1, 1) * plain, rtol=1e-6, atol=0)
    if method == "win_rate":
        sigmoid = 1 / (1 + np.exp(-np.array([1.8, -1.0, 0.5])))
        rates = weights.numpy() * sigmoid * (1 - sigmoid)  # d sigmoid(z) / dz, base images at 0
        assert slopes({"a": weights}).sum(dim=(1, 2, 3)).tolist() == pytest.approx(rates.tolist(), rel=1e-5)


def test_trust_in_one_of_two_weighs_its_term_alone() -> None:
    both, base = scores([1, 2], [-4, 8]), {"a": torch.zeros(1), "b": torch.zeros(1)}
    trust = {"b": torch.tensor([2.0, 1.5])}
    assert WeightedSum()(both, WEIGHTS, NONE, {}, trust).tolist() == pytest.approx([0.75 - 2, 1.5 + 3])
    rates = {z: 1 / (1 + np.exp(-z)) for z in (1, 2, -4, 8)}
    expected = [0.75 * rates[1] + 2 * 0.25 * rates[-4], 0.75 * rates[2] + 1.5 * 0.25 * rates[8]]
    assert WinRate()(both, WEIGHTS, NONE, base, trust).tolist() == pytest.approx(expected)


def test_trust_does_not_decide_which_reward_lags() -> None:
    both = scores([1, 2], [-4, 2.5])  # lags: .75 * -2 and .25 * -7; .75 * -1 and .25 * -.5
    total = Chebyshev(ideal=3.0, rho=0.1)(both, WEIGHTS, NONE, {}, {"b": torch.tensor([2.0, 10.0])})
    # ten times its lag, b would be the worst of the second image
    assert total.tolist() == pytest.approx([2 * -1.75 + 0.1 * (-1.5 - 3.5), -0.75 + 0.1 * (-0.75 - 1.25)])
    total.sum().backward()
    assert both["b"].grad is not None
    assert both["b"].grad.tolist() == pytest.approx([2 * 1.1 * 0.25, 10 * 0.1 * 0.25])


def test_trust_does_not_decide_which_image_is_beaten() -> None:
    both = scores([1, 2, 0], [1, 0, 0.5])
    # three times its second score, the last image would not be beaten
    total = NonDominated()(both, WEIGHTS, NONE, {}, {"b": torch.tensor([1.0, 1.0, 3.0])})
    assert total.tolist() == pytest.approx([1.0 * 3 / 2, 1.5 * 3 / 2, 0])


def test_trust_is_kept_where_gradients_are_brought_to_one_length() -> None:
    images = make_images()
    directions = torch.randn(2, *images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = {name: (images * directions[k]).sum(dim=(1, 2, 3)) for k, name in enumerate(WEIGHTS)}
    trust = torch.tensor([2.0, 1.2], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(GradientBalance()(values, WEIGHTS, images, {}, {"b": trust}).sum(), images)
    for i in range(2):
        lengths = [directions[k, i].norm() for k in range(2)]
        mixed = 0.75 * directions[0, i] / lengths[0] + trust[i] * 0.25 * directions[1, i] / lengths[1]
        expected = mixed * (0.75 * lengths[0] + 0.25 * lengths[1])
        torch.testing.assert_close(gradient[i], expected, rtol=1e-12, atol=0)
