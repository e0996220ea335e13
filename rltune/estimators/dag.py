"""DAG (arXiv:2406.00633): GFlowNet detailed balance, which samples images in proportion to p(x) exp(beta r(x)).

B: images. C, H, W: latent channels, rows, columns.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from rltune.estimators.base import ESTIMATORS, Round, Setting, check_settings
from rltune.estimators.heads import StateHead
from rltune.estimators.policy import Rollout, draw_steps, policy_pass, roll_out
from rltune.registry import Within


@ESTIMATORS.register("dag")
@dataclass(frozen=True)
class DAG:
    """GFlowNet detailed balance with a learned flow (DAG-DB): keeps more than one good image.

    For every transition the square of ``F(x_t) + log p_F(x_{t-1} | x_t) - log p_B(x_t | x_{t-1}) - F(x_{t-1})`` is
    brought to zero, in adapters and flow network alike. The flow is forward-looking, ``F(x_t) = F_phi(x_t) + beta
    r(x0_hat(x_t))``, and ``beta r(x_0)`` at the end. Log-probabilities are means over latent elements, as in the
    published code. There x0_hat is predicted again without guidance; here it is the one that the sampler itself saw.

    Costs a decode and a reward query for every step of every image.

    Attributes:
        beta: Inverse temperature of the reward, in units of the standardised mixture. The published code has 100 on
            the aesthetic score.
        anneal: Rounds over which beta rises from 0.
        output_weight: Weight of the squared distance of the network's output from the sampler's (``unetreg``).
        epochs: Updates a round.
        fraction: Share of the steps that is trained in a round, drawn at random.
        flow_lr: Learning rate of the flow network.
    """

    beta: Annotated[float, Within(0, 1_000_000)] = 100.0
    anneal: Annotated[int, Within(0, 1_000_000)] = 0
    output_weight: Annotated[float, Within(0, 1_000_000)] = 1.0
    epochs: Annotated[int, Within(1, 1000)] = 1
    fraction: Annotated[float, Within(0, 1)] = 1.0
    flow_lr: Annotated[float, Within(0, 1)] = 3e-4
    needs_gradient: ClassVar[bool] = False
    has_serial_mode: ClassVar[bool] = False

    def check(self, num_steps: int) -> None:
        """Check the ranges of all settings.

        Raises:
            ValueError: One is out of its range.
        """
        check_settings(self)

    def make_state(self, setting: Setting) -> StateHead:
        """Return a flow network that says 0 of everything."""
        return StateHead(setting, self.flow_lr)

    def train(self, round: Round) -> None:
        """Sample, score every step's clean prediction, and update adapters and flow ``epochs`` times."""
        assert isinstance(round.state, StateHead)
        flow = round.state
        flow.num_rounds += 1
        beta = self.beta * min(1.0, flow.num_rounds / max(1, self.anneal))
        rollouts = roll_out(round)
        rewards = {id(rollout): clean_rewards(round, rollout) for rollout in rollouts}

        def flow_B(rollout: Rollout, state: int) -> Tensor:
            """F of the state that step ``state`` starts from."""
            if state == rollout.stochastic_steps[-1] + 1:  # what follows is no choice any more
                return beta * rollout.reward_B
            x_BCHW = rollout.states[state]
            t_B = rollout.chain.table.timesteps_T[state].to(x_BCHW.device).expand(len(x_BCHW))
            learned_B: Tensor = flow.network(x_BCHW, t_B, rollout.chain.text_BD)
            return beta * rewards[id(rollout)][state] + learned_B

        def loss(rollout: Rollout, step: int, log_prob_B: Tensor, ratio_B: Tensor, f_BCHW: Tensor) -> Tensor:
            x_BCHW, next_BCHW = rollout.states[step : step + 2]
            chain = rollout.chain
            back_B = chain.table.log_prob_back(step, x_BCHW, next_BCHW, chain.drawn_B1HW)
            residual_B = flow_B(rollout, step) + log_prob_B - back_B - flow_B(rollout, step + 1)
            moved_B = (f_BCHW - rollout.outputs[step]).square().flatten(1).mean(1)
            return rollout.trust_B * residual_B.square() + self.output_weight * moved_B

        steps = draw_steps(round, rollouts, self.fraction)
        for _ in range(self.epochs):
            policy_pass(round, rollouts, steps, loss, is_first=True)
            round.peers.sum_gradients(flow.parameters)
            nn.utils.clip_grad_norm_(flow.parameters, 1.0)
            flow.optimizer.step()
            flow.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def clean_rewards(round: Round, rollout: Rollout) -> list[Tensor]:
    """Return the reward of the clean prediction at every step, ``(B,)`` each."""
    rewards = []
    for step, (x_BCHW, f_BCHW) in enumerate(zip(rollout.states[:-1], rollout.outputs, strict=True)):
        clean_BCHW = rollout.chain.clean(step, x_BCHW, f_BCHW)
        with round.timer.measure("reward"):
            rewards.append(round.mixture(round.sampler.decode(clean_BCHW), rollout.batch.prompts).compared_B)
        round.tally.num_queries += len(rollout.batch.prompts)
    return rewards
