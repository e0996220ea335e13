"""Policy gradients on a flow model: densities of both rules from their formulas, gradients from finite differences.

B: images. C, H, W: latent channels, rows, columns.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.diffusion.sampler import Sampler
from rltune.diffusion.schedulers.base import Rule
from rltune.estimators.base import Batch, Round, Setting, Stateful, Tally
from rltune.estimators.dag import DAG
from rltune.estimators.ddpo import DDPO
from rltune.estimators.dpok import DPOK
from tests.tiny_families import PIPELINES, family_of, fresh
from tests.toys import Alone, NoTimer, Recorder, ToyMixture, fill, toy_reward

PROMPTS = ("a cat", "two red birds")
T, GUIDANCE = 3, 2.0
CPU = torch.device("cpu")


def small_flow() -> ModelFamily:
    """A tiny Z-Image with adapters, in float64."""
    model = family_of(fresh(PIPELINES["z_image"]))
    for part in (model.network, model.decoder):
        part.double()
    add_lora(model.network, rank=2, alpha=2, targets=model.lora_layers("attention"), seed=0)
    fill(model.network, 0.05)
    for parameter in lora_parameters(model.network):
        parameter.data = parameter.data.double()
    return model


class ByFormula:
    """Trajectories of a flow and the density of each action, from the formulas of the two rules."""

    def __init__(self, model: ModelFamily, rule: Rule, eta: float, x: Tensor, noises: list[Tensor]) -> None:
        self.model, self.rule, self.eta = model, rule, eta
        self.text = model.collate(model.encode_prompts(PROMPTS), CPU)
        self.without = model.collate(model.encode_prompts(["", ""]), CPU)
        linear = np.linspace(1.0, 1 / T, T)
        self.sigmas = [*(3 * linear / (1 + 2 * linear)).tolist(), 0.0]  # shifted by 3
        self.states, self.cleans = [x], []
        for k in range(T):
            f = self.predict(k).detach()
            self.cleans.append(self.states[k] - self.sigmas[k] * f)
            mean, std = self.step(k, f)
            self.states.append(self.cleans[k] if k == T - 1 else mean + std * noises[k])

    def predict(self, k: int) -> Tensor:
        x, t = self.states[k], torch.tensor(1000 * self.sigmas[k])
        negative = self.model.predict(x, t, self.without)
        return negative + GUIDANCE * (self.model.predict(x, t, self.text) - negative)

    def step(self, k: int, f: Tensor) -> tuple[Tensor, float]:
        """Mean and deviation: DDIM's sigma (arXiv:2010.02502, Eq. 16) on this process; Flow-GRPO (arXiv:2505.05470)."""
        x, sigma, after = self.states[k], self.sigmas[k], self.sigmas[k + 1]
        noise = x + (1 - sigma) * f
        if self.rule == "flow_grpo":
            level = self.eta * (sigma / (1 - (self.sigmas[1] if sigma == 1 else sigma))) ** 0.5
            dt = after - sigma
            return x + dt * (f + level**2 / (2 * sigma) * noise), level * (-dt) ** 0.5
        kept = (1 - sigma) / (1 - after) * after
        std = self.eta * after / sigma * (sigma**2 - kept**2) ** 0.5
        return (1 - after) * (x - sigma * f) + (after**2 - std**2) ** 0.5 * noise, std

    def log_prob(self, k: int) -> Tensor:
        mean, std = self.step(k, self.predict(k))
        return torch.distributions.Normal(mean, std).log_prob(self.states[k + 1]).flatten(1).mean(1)

    def log_prob_back(self, k: int) -> Tensor:
        ratio = (1 - self.sigmas[k]) / (1 - self.sigmas[k + 1])
        std = (self.sigmas[k] ** 2 - (ratio * self.sigmas[k + 1]) ** 2) ** 0.5
        forward = torch.distributions.Normal(ratio * self.states[k + 1], std)
        return forward.log_prob(self.states[k]).flatten(1).mean(1)

    def reward(self, x: Tensor) -> Tensor:
        return toy_reward(self.model.decode(x), PROMPTS)


def ddpo_loss(known: ByFormula) -> Callable[[], Tensor]:
    reward = known.reward(known.states[-1])
    advantage = (reward - reward.mean()) / (reward.std(correction=0) + 1e-6)
    return lambda: -torch.stack([(advantage * known.log_prob(k)).mean() for k in range(T - 1)]).mean()


def dpok_loss(known: ByFormula) -> Callable[[], Tensor]:
    reward = known.reward(known.states[-1])  # the value network says 0 at first
    return lambda: -torch.stack([(3.0 * reward * known.log_prob(k)).mean() for k in range(T - 1)]).mean()


def dag_loss(known: ByFormula) -> Callable[[], Tensor]:
    """The flow network says 0 at first; the state after the last action is worth the image's reward."""
    flows = [2.0 * known.reward(clean) for clean in known.cleans[:-1]] + [2.0 * known.reward(known.states[-1])]
    backs = [known.log_prob_back(k) for k in range(T - 1)]

    def loss() -> Tensor:
        residuals = [flows[k] + known.log_prob(k) - backs[k] - flows[k + 1] for k in range(T - 1)]
        return torch.stack([residual.square().mean() for residual in residuals]).mean()

    return loss


METHODS: dict[str, tuple[Any, Callable[[ByFormula], Callable[[], Tensor]]]] = {
    "ddpo": (DDPO(), ddpo_loss),
    "dpok": (DPOK(3.0, 0.0, epochs=1, value_steps=0), dpok_loss),
    "dag": (DAG(2.0, flow_lr=0.0), dag_loss),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("rule", "eta"), [("posterior", 0.8), ("flow_grpo", 1.3)])
def test_an_update_is_that_of_the_formulas_by_finite_differences(name: str, rule: Rule, eta: float) -> None:
    estimator, make_loss = METHODS[name]
    model = small_flow()
    shape, parameters = model.latent_shape(16, 16), lora_parameters(model.network)
    generator = torch.Generator().manual_seed(1)
    x, *noises = torch.randn(T + 1, 2, *shape, generator=generator, dtype=torch.float64).unbind(0)
    table = model.read_table(num_steps=T, eta=eta, shape=shape, rule=rule)
    assert [bool(s > 0) for s in table.s_T] == [True] * (T - 1) + [False]
    state = estimator.make_state(Setting(shape, 16, CPU, seed=0)) if isinstance(estimator, Stateful) else None
    round = Round(
        sampler=Sampler(model, PromptEmbeddings(model), table, GUIDANCE),
        mixture=ToyMixture(),  # type: ignore[arg-type]
        batches=(Batch(PROMPTS, x, noises.__getitem__),),
        num_images=2,
        rng=np.random.default_rng(0),
        parameters=parameters,
        peers=Alone(),
        timer=NoTimer(),
        update=Recorder(parameters, Alone()),
        tally=Tally(("reward", "toy", "toy_z")),
        state=state,
    )
    estimator.train(round)
    (gradient,) = round.update.gradients  # type: ignore[attr-defined]
    direction = torch.randn(len(gradient), generator=generator, dtype=torch.float64)

    with torch.no_grad():
        loss, ends = make_loss(ByFormula(model, rule, eta, x, noises)), []
        for sign in (1, -1):
            start = 0
            for parameter in parameters:
                part = direction[start : start + parameter.numel()].view_as(parameter)
                parameter.add_(part, alpha=sign * 1e-4 * (1 if sign > 0 else 2))
                start += parameter.numel()
            ends.append(float(loss()))
    # the network's norms and places are in float32 whatever it is given
    assert float(gradient @ direction) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-2)
