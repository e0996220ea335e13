"""DAG's residual written out by hand, its densities by torch's normal distribution."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rltune.estimators.dag import DAG
from rltune.estimators.heads import StateHead
from tests.toys import ByHand, Toy, flat_gradient, gradients_of, make_round, make_state, perceptron_toy

N, T = 5, 4
GUIDANCE = 2.0


def with_opinion(toy: Toy, estimator: DAG) -> StateHead:
    """Return a flow network that tells states apart."""
    state = make_state(toy, estimator)
    assert isinstance(state, StateHead)
    torch.manual_seed(4)
    nn.init.normal_(state.network.out[-1].weight)
    return state


class Residuals:
    """F(x_k) + log p_F - log p_B - F(x_{k+1}), with F = beta r(x0_hat) + the network's, and beta r(x_0) at the end."""

    def __init__(self, toy: Toy, network: nn.Module, beta: float, eta: float, num_steps: int, **schedule: Any) -> None:
        self.known = ByHand(toy, num_images=N, guidance=GUIDANCE, eta=eta, **schedule)
        self.network, self.beta, self.num_steps = network, beta, num_steps

    def flow(self, k: int) -> Tensor:
        known = self.known
        if k == self.num_steps:
            return self.beta * known.reward(known.states[-1])
        t_B = known.scheduler.timesteps[k].repeat(N)
        learned = self.network(known.states[k], t_B, known.toy.texts(known.prompts).float().mean(1))
        return self.beta * known.reward(known.cleans[k]) + learned

    def loss(self, steps: list[int], output_weight: float) -> Tensor:
        terms = []
        for k in steps:
            known = self.known
            residual = self.flow(k) + known.log_prob(k) - known.log_prob_back(k) - self.flow(k + 1)
            moved = (known.predict(k) - known.outputs[k]).square().mean((1, 2, 3))
            terms.append(residual.square() + output_weight * moved)
        return torch.stack(terms).mean()


@pytest.mark.parametrize(
    ("eta", "schedule", "num_steps"),
    [(1.0, {}, T), (0.5, {}, T), (1.0, {"set_alpha_to_one": True}, T - 1)],
    ids=["eta 1", "eta 0.5", "last step without noise"],
)
def test_updates_are_those_of_the_residual_written_out(eta: float, schedule: dict[str, Any], num_steps: int) -> None:
    """Two updates of adapters and flow; where the last step is no choice, the state before is worth the reward."""
    beta, output_weight, lr, flow_lr = 3.0, 0.7, 0.01, 1e-3
    estimator = DAG(beta, output_weight=output_weight, epochs=2, flow_lr=flow_lr)
    toy, reference = perceptron_toy(), perceptron_toy()
    state = with_opinion(toy, estimator)
    network = copy.deepcopy(state.network)
    settings = {"guidance": GUIDANCE, "eta": eta, "schedule": schedule, "lr": lr, "micro_batch": 3}
    gradients = gradients_of(estimator, make_round(toy, estimator, num_images=N, state=state, **settings))
    assert len(gradients) == 2

    residuals = Residuals(reference, network, beta, eta, num_steps, **schedule)
    weights = list(network.parameters())
    optimizer = torch.optim.AdamW(weights, lr=flow_lr, weight_decay=1e-4)
    for gradient in gradients:
        loss = residuals.loss(list(range(num_steps)), output_weight)
        expected = flat_gradient(loss, [*reference.parameters, *weights])
        own, flow = expected.split([gradient.numel(), expected.numel() - gradient.numel()])
        # the flow network is float32
        torch.testing.assert_close(gradient, own.double(), rtol=1e-5, atol=1e-5 * float(own.norm()))
        assert float(flow.norm()) > 1  # so that it is clipped to a norm of 1
        start = 0
        for parameter in weights:
            parameter.grad = (flow / flow.norm())[start : start + parameter.numel()].view_as(parameter).float()
            start += parameter.numel()
        optimizer.step()
        start = 0
        for parameter in reference.parameters:
            parameter.data -= lr * own[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(state.network.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in state.parameters)


@pytest.mark.parametrize(("anneal", "shares"), [(0, (1, 1, 1)), (2, (0.5, 1, 1)), (4, (0.25, 0.5, 0.75))])
def test_beta_rises_over_the_first_rounds(anneal: int, shares: tuple[float, ...]) -> None:
    estimator, toy = DAG(beta=50.0, anneal=anneal, flow_lr=0.0), perceptron_toy()
    state = with_opinion(toy, estimator)
    for share in shares:
        settings = {"num_images": N, "guidance": GUIDANCE, "state": state}
        (gradient,) = gradients_of(estimator, make_round(toy, estimator, **settings))
        loss = Residuals(toy, state.network, 50.0 * share, 1.0, T).loss(list(range(T)), 1.0)
        expected = flat_gradient(loss, toy.parameters)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.norm()))


def test_a_share_of_the_steps_is_trained() -> None:
    estimator, toy = DAG(beta=2.0, fraction=0.5), perceptron_toy()
    state = with_opinion(toy, estimator)
    loss = Residuals(toy, copy.deepcopy(state.network), 2.0, 1.0, T)
    steps = sorted(np.random.default_rng(5).choice(T, 2, replace=False).tolist())
    expected = flat_gradient(loss.loss(steps, 1.0), toy.parameters)
    round = make_round(toy, estimator, num_images=N, guidance=GUIDANCE, state=state, seed=5)
    (gradient,) = gradients_of(estimator, round)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.norm()))


def test_it_queries_the_reward_at_every_step() -> None:
    estimator, toy = DAG(epochs=2, fraction=0.5), perceptron_toy()
    round = make_round(toy, estimator, num_images=N, micro_batch=2)
    estimator.train(round)
    assert round.tally.num_queries == N * (1 + T)
    assert round.tally.num_calls == N * (T + 2 * 2 * 2)  # the trajectory; two epochs of two steps, forward and back
    assert round.tally.num_active == 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("beta", 2e6),
        ("anneal", -1),
        ("output_weight", 2e6),
        ("epochs", 0),
        ("fraction", 1.1),
        ("flow_lr", 1.1),
    ],
)
def test_settings_out_of_range_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{setting} must be in .*, got {value}"):
        DAG(**{setting: value}).check(T)
