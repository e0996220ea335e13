"""DPOK's loss and value fit written out by hand."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rltune.estimators.dpok import DPOK
from rltune.estimators.heads import StateHead
from tests.toys import ByHand, Toy, flat_gradient, gradients_of, make_round, make_state, perceptron_toy

N, T = 6, 4
GUIDANCE = 2.0


def with_opinion(toy: Toy, estimator: DPOK) -> StateHead:
    """Return a value network that tells states apart."""
    state = make_state(toy, estimator)
    assert isinstance(state, StateHead)
    torch.manual_seed(4)
    torch.nn.init.normal_(state.network.out[-1].weight)
    return state


def values(known: ByHand, network: torch.nn.Module, k: int) -> Tensor:
    t_B = known.scheduler.timesteps[k].repeat(N)
    return network(known.states[k], t_B, known.toy.texts(known.prompts).float().mean(1))


def base_outputs(toy: Toy, known: ByHand) -> list[Tensor]:
    kept = [parameter.detach().clone() for parameter in toy.parameters]
    for parameter in toy.parameters:
        parameter.data.zero_()
    outputs = [known.predict(k).detach() for k in range(T)]
    for parameter, value in zip(toy.parameters, kept, strict=True):
        parameter.data.copy_(value)
    return outputs


def close(gradient: Tensor, expected: Tensor) -> None:
    assert float(expected.norm()) > 0
    # the value network is float32
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.norm()))


@pytest.mark.parametrize("weights", [(100.0, 0.0), (0.0, 1.0), (3.0, 0.5)])
def test_updates_are_those_of_the_loss_written_out(weights: tuple[float, float]) -> None:
    """-w_r (r - V) clip(ratio) + w_kl mean (f - f_base)^2, the mean over images and steps; no PPO minimum.

    Outside the interval the clamp leaves no gradient, whichever way the ratio has gone.
    """
    reward_weight, kl_weight = weights
    clip, lr = 1e-2, 0.01 / (reward_weight + kl_weight)
    estimator = DPOK(reward_weight, kl_weight, clip, epochs=3, value_steps=0)
    toy, reference = perceptron_toy(), perceptron_toy()
    state = with_opinion(toy, estimator)
    round = make_round(toy, estimator, num_images=N, guidance=GUIDANCE, lr=lr, state=state, micro_batch=4)
    gradients = gradients_of(estimator, round)

    known = ByHand(reference, num_images=N, guidance=GUIDANCE)
    base = base_outputs(reference, known)
    advantages = [known.reward(known.states[-1]) - values(known, state.network, k).detach().double() for k in range(T)]
    old = [known.log_prob(k).detach() for k in range(T)]
    num_outside = 0
    for epoch, gradient in enumerate(gradients):
        terms = []
        for k in range(T):
            log_prob = known.log_prob(k)
            ratio = (log_prob - old[k]).exp().detach()
            is_inside = (ratio - 1).abs() <= clip
            num_outside += int((~is_inside).sum())
            gain = torch.where(is_inside, advantages[k] * ratio, 0.0) * log_prob
            penalty = (known.predict(k) - base[k]).square().mean((1, 2, 3))
            terms.append(-reward_weight * gain + kl_weight * penalty)
        expected = flat_gradient(torch.stack(terms).mean(), reference.parameters)
        close(gradient, expected)
        start = 0
        for parameter in reference.parameters:
            parameter.data -= lr * expected[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        assert epoch > 0 or num_outside == 0
    assert reward_weight == 0 or 3 < num_outside < 2 * N * T - 3
    assert round.update.may_vanish == [False, True, True]  # type: ignore[attr-defined]


def test_the_baseline_gets_no_gradient_from_the_policy_s_loss() -> None:
    toy, estimator = perceptron_toy(), DPOK(value_steps=0, epochs=1)
    state = with_opinion(toy, estimator)
    before = copy.deepcopy(state.network.state_dict())
    gradients_of(estimator, make_round(toy, estimator, num_images=N, state=state))
    assert all(parameter.grad is None for parameter in state.parameters)
    assert all(torch.equal(value, before[name]) for name, value in state.network.state_dict().items())


@pytest.mark.parametrize("size", [7, 10_000])
def test_the_value_network_is_fitted_to_the_rewards(size: int) -> None:
    """AdamW on the mean of (V - r)^2 over drawn transitions, number n being image n // T at step n % T."""
    estimator = DPOK(value_steps=3, value_batch=size, value_lr=1e-2, epochs=1)
    toy = perceptron_toy()
    state = with_opinion(toy, estimator)
    network = copy.deepcopy(state.network)
    gradients_of(estimator, make_round(toy, estimator, num_images=N, micro_batch=4, state=state))

    known, rng = ByHand(toy, num_images=N), np.random.default_rng(0)
    rewards = known.reward(known.states[-1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-4)
    for _ in range(3):
        drawn = rng.choice(N * T, min(size, N * T), replace=False).tolist()
        assert len(set(drawn)) == min(size, N * T)
        errors = torch.stack([values(known, network, k) - rewards for k in range(T)], dim=1).flatten()
        optimizer.zero_grad()
        errors[drawn].square().mean().backward()
        optimizer.step()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(state.network.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_fitting_brings_the_value_to_the_reward() -> None:
    estimator = DPOK(value_steps=80, value_lr=1e-2, epochs=1, reward_weight=1.0)
    toy = perceptron_toy()
    round = make_round(toy, estimator, num_images=2)
    estimator.train(round)
    known = ByHand(toy, num_images=2)
    rewards = known.reward(known.states[-1])
    assert isinstance(round.state, StateHead)
    t_B = known.scheduler.timesteps[3].repeat(2)
    with torch.no_grad():
        fitted = round.state.network(known.states[3], t_B, toy.texts(known.prompts).float().mean(1)).double()
    spread = float((rewards[0] - rewards[1]).abs())
    assert float((fitted - rewards).abs().max()) < 0.2 * spread


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("reward_weight", 2e6),
        ("kl_weight", 2e6),
        ("clip", 1.5),
        ("epochs", 1001),
        ("fraction", 1.1),
        ("value_steps", 10_001),
        ("value_batch", 0),
        ("value_lr", 1.1),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{setting} must be in .*, got {value}"):
        DPOK(**{setting: value}).check(T)
