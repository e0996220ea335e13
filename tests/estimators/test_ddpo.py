"""DDPO against the score function written out by hand, and against an expected reward in closed form."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rltune.diffusion.lora import add_lora
from rltune.errors import UserError
from rltune.estimators.base import Batch, Regularisers
from rltune.estimators.ddpo import DDPO
from rltune.rewards.mixture import MixtureScore
from tests.toys import (
    Adaptable,
    ByHand,
    Toy,
    ToyMixture,
    fill,
    flat_gradient,
    gradients_of,
    make_round,
    perceptron_toy,
)

N, T = 8, 4


def advantages_of(rewards: Tensor, bound: float) -> Tensor:
    values = rewards.numpy()
    return torch.from_numpy(np.clip((values - values.mean()) / (values.std() + 1e-6), -bound, bound))


def close(gradient: Tensor, expected: Tensor) -> None:
    assert float(expected.norm()) > 0
    # advantages are float32
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6 * float(expected.norm()))


@pytest.mark.parametrize("is_one", [False, True], ids=["", "last step without noise"])
@pytest.mark.parametrize(("eta", "guidance"), [(1.0, 1.0), (0.4, 3.0)])
def test_the_first_update_is_the_score_function_s(eta: float, guidance: float, is_one: bool) -> None:
    """-mean A d log p / d theta over images and steps, log p the mean over elements."""
    toy, bound = perceptron_toy(), 0.8
    known = ByHand(toy, num_images=N, eta=eta, guidance=guidance, set_alpha_to_one=is_one)
    advantages = advantages_of(known.reward(known.states[-1]), bound)
    assert float(advantages.abs().max()) == bound
    assert float(advantages.abs().min()) < bound
    steps = range(T - 1) if is_one else range(T)
    score = torch.stack([(advantages * known.log_prob(k)).mean() for k in steps]).mean()
    estimator, schedule = DDPO(advantage_clip=bound), {"set_alpha_to_one": is_one}
    round = make_round(toy, estimator, num_images=N, eta=eta, guidance=guidance, micro_batch=5, schedule=schedule)
    (gradient,) = gradients_of(estimator, round)
    close(gradient, flat_gradient(-score, toy.parameters))


def test_later_updates_are_ppo_s() -> None:
    """Each image and step counts with A ratio, unless it has gained all it may: A > 0 above 1 + clip, or mirrored."""
    clip, lr = 1e-2, 1.0
    toy, reference = perceptron_toy(), perceptron_toy()
    estimator = DDPO(clip=clip, epochs=3, fraction=0.5)
    round = make_round(toy, estimator, num_images=N, lr=lr)
    gradients = gradients_of(estimator, round)
    steps = sorted(np.random.default_rng(0).choice(T, 2, replace=False).tolist())

    known = ByHand(reference, num_images=N)
    advantages = advantages_of(known.reward(known.states[-1]), 5.0)
    old = {k: known.log_prob(k).detach() for k in steps}
    num_clipped = num_counted = 0
    for epoch, gradient in enumerate(gradients):
        terms = []
        for k in steps:
            log_prob = known.log_prob(k)
            ratio = (log_prob - old[k]).exp().detach()
            has_gained = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
            terms.append(torch.where(has_gained, 0.0, advantages * ratio) * log_prob)
            num_clipped += int(has_gained.sum()) if epoch else 0
            num_counted += int((~has_gained).sum()) if epoch else 0
        expected = flat_gradient(-torch.stack(terms).mean(), reference.parameters)
        close(gradient, expected)
        start = 0
        for parameter in reference.parameters:
            parameter.data -= lr * expected[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
    assert num_clipped > 3
    assert num_counted > 3
    assert round.update.may_vanish == [False, True, True]  # type: ignore[attr-defined]


def test_drift_is_added_at_the_states_that_were_seen() -> None:
    toy, drift = perceptron_toy(), 0.7
    known = ByHand(toy, num_images=N, guidance=2.0)
    kept = [parameter.detach().clone() for parameter in toy.parameters]
    for parameter in toy.parameters:
        parameter.data.zero_()
    base = [known.predict(k).detach() for k in range(T)]
    for parameter, value in zip(toy.parameters, kept, strict=True):
        parameter.data.copy_(value)
    penalty = drift * torch.stack([(known.predict(k) - base[k]).square().mean() for k in range(T)]).mean()
    with_drift, without = (
        gradients_of(
            DDPO(), make_round(toy, DDPO(), num_images=N, guidance=2.0, regularisers=Regularisers(drift=weight))
        )[0]
        for weight in (drift, 0.0)
    )
    close(with_drift - without, flat_gradient(penalty, toy.parameters))


def test_a_prompt_s_rewards_are_remembered_over_rounds() -> None:
    estimator, toy = DDPO(min_count=2, buffer=4), perceptron_toy()
    first = make_round(toy, estimator, num_images=N)
    estimator.train(first)
    again = make_round(toy, estimator, num_images=N, state=first.state)
    estimator.train(again)
    assert first.state is not None
    known = ByHand(toy, num_images=N)
    rewards = known.reward(known.states[-1]).tolist()
    expected = {prompt: [rewards[i], rewards[i + 4]] * 2 for i, prompt in enumerate(known.prompts[:4])}
    state = first.state.state_dict()
    assert {prompt: pytest.approx(values, rel=1e-11) for prompt, values in expected.items()} == state


# ---- the expected reward of a linear-Gaussian chain in closed form


class Affine(Adaptable):
    """f(x) = w x + u."""

    def __init__(self) -> None:
        super().__init__()
        self.wu = nn.Linear(2, 1, bias=False)

    def forward(self, x_BCHW: Tensor, t: Tensor, text_BLD: Tensor) -> Tensor:
        return self.wu(torch.stack([x_BCHW, torch.ones_like(x_BCHW)], dim=-1)).squeeze(-1)


SHAPE = (3, 1, 1)
LINEAR, QUADRATIC = 1.0, 0.3


class Parabola:
    """r = sum_p (x_p - 0.3 x_p^2); keeps the scores."""

    rewards = {"parabola": None}  # noqa: RUF012

    def __init__(self) -> None:
        self.reward_B = torch.zeros(0)

    def __call__(self, images_B3HW: Tensor, prompts: Any) -> MixtureScore:
        self.reward_B = (LINEAR * images_B3HW - QUADRATIC * images_B3HW.square()).flatten(1).sum(1)
        return MixtureScore(self.reward_B, {}, {})


def expected_reward(toy: Toy, mean_T: float) -> Tensor:
    """x_k stays normal: mean (a + b w) mean + b u, variance (a + b w)^2 variance + s^2."""
    table = make_round(toy, DDPO(), num_steps=T).sampler.table
    a_rank, b_rank = toy.parameters
    w, u = (toy.network.wu.get_base_layer().weight + 2.0 * b_rank @ a_rank)[0]  # type: ignore[union-attr, operator]
    mean, variance = torch.tensor(mean_T, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    for k in range(T):
        factor = table.a_T[k] + table.b_T[k] * w
        mean, variance = factor * mean + table.b_T[k] * u, factor**2 * variance + table.s_T[k] ** 2
    return SHAPE[0] * (LINEAR * mean - QUADRATIC * (mean**2 + variance))


@pytest.mark.long
def test_its_gradient_is_that_of_the_expected_reward() -> None:
    """Up to what it divides by: the rewards' spread, the steps and the latent's elements."""
    network = Affine().requires_grad_(False)
    add_lora(network, rank=1, alpha=2, targets=["wu"], seed=0)
    network.double()
    network.wu.get_base_layer().weight.copy_(torch.tensor([[0.9, 0.1]]))  # type: ignore[union-attr, operator]
    toy = Toy(network, SHAPE, (2, 4))
    toy.decode = lambda x_BCHW: x_BCHW  # type: ignore[method-assign]
    fill(network, 0.3)
    mean_T, count, num_rounds = 0.5, 1000, 30
    estimator = DDPO(buffer=count, advantage_clip=1e6)
    generator = torch.Generator().manual_seed(0)

    def normal(_: int = 0) -> Tensor:
        return torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)

    estimates = []
    for _ in range(num_rounds):
        mixture = Parabola()
        round = make_round(toy, estimator, num_images=count, mixture=mixture)
        round = replace(round, batches=(Batch(("a cat",) * count, mean_T + normal(), normal),))
        (gradient,) = gradients_of(estimator, round)
        estimates.append(-gradient * float(mixture.reward_B.std()) * T * SHAPE[0])
    expected = flat_gradient(expected_reward(toy, mean_T), toy.parameters)
    estimate = torch.stack(estimates)
    mean, error = estimate.mean(0), estimate.std(0) / num_rounds**0.5
    assert float(error.norm()) < 0.05 * float(expected.norm())  # or the next lines would say little
    assert bool(((mean - expected).abs() < 5 * error).all())
    assert float(torch.cosine_similarity(mean, expected, dim=0)) > 0.995


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, r"clip must be in \[1e-08, 1\], got 0.0"),
        ({"fraction": 1.1}, r"fraction must be in \[0, 1\], got 1.1"),
        ({"epochs": 0}, r"epochs must be in \[1, 1000\], got 0"),
        ({"min_count": 1}, r"min_count must be in \[2, "),
        ({"buffer": 8, "min_count": 9}, r"buffer must be in \[9, "),
        ({"advantage_clip": 0.0}, r"advantage_clip must be in"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDPO(**options).check(T)


class AllAlike(ToyMixture):
    """A reward that is the same for every image."""

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> MixtureScore:
        score = super().__call__(images_B3HW, prompts)
        return replace(score, total_B=torch.zeros_like(score.total_B))


def test_a_round_of_equally_good_images_teaches_nothing_and_is_no_fault() -> None:
    toy, estimator = perceptron_toy(), DDPO(epochs=2)
    before = [parameter.detach().clone() for parameter in toy.parameters]
    round = replace(make_round(toy, estimator, num_images=N), mixture=AllAlike())
    estimator.train(round)
    assert round.update.may_vanish == [True, True]  # type: ignore[attr-defined]
    assert all(torch.equal(*pair) for pair in zip(before, toy.parameters, strict=True))


def test_a_chain_without_noise_is_refused() -> None:
    estimator = DDPO()
    with pytest.raises(UserError, match=r"no step .* adds noise"):
        estimator.train(make_round(perceptron_toy(), estimator, num_images=N, eta=0.0))
