"""Rewards without gradient: the stochastic chain as a policy, its steps as actions with a Gaussian density.

B: images. C, H, W: latent channels, rows, columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rltune.canvas import identity
from rltune.diffusion.sampler import Chain
from rltune.errors import UserError
from rltune.estimators.base import Batch, Round


@dataclass
class Rollout:
    """The trajectories of one micro-batch, as they were sampled."""

    chain: Chain
    batch: Batch
    states: list[Tensor]
    """x_BCHW of every step's start, and x_0 last."""
    outputs: list[Tensor]
    """The network's output f_BCHW at every step."""
    reward_B: Tensor
    """The mixed reward of the images."""
    trust_B: Tensor
    """The weight of each image's part in the loss, as PrefPaint (arXiv:2410.21966, section 3.3) has it; mostly 1."""
    first_image: int
    """Number, within the round, of the first of its images."""
    log_probs: dict[int, Tensor] = field(default_factory=dict)
    """Step -> log-probability of its action under the policy that sampled it, ``(B,)``."""

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """Steps that add noise: the actions. The last one of some schedules adds none."""
        return tuple(k for k in range(self.chain.table.num_steps) if self.chain.table.s_T[k] > 0)

    def log_prob_B(self, step: int, f_BCHW: Tensor) -> Tensor:
        """Return the log-probability of the action taken, if the network's output were ``f_BCHW``."""
        chain = self.chain
        return chain.table.log_prob(step, self.states[step], f_BCHW, self.states[step + 1], chain.drawn_B1HW)


@torch.no_grad()
def roll_out(round: Round) -> list[Rollout]:
    """Sample and score this worker's images."""
    rollouts, first_image = [], round.first_image
    for batch in round.batches:
        passed: list[tuple[Tensor, Tensor]] = []
        with round.timer.measure("sampling"):
            chain = round.open(batch)
            x_BCHW = chain.run(observe=partial(_record, passed))
        with round.timer.measure("reward"):
            score = round.mixture(round.sampler.decode(x_BCHW), batch.prompts)
        states, outputs = zip(*passed, strict=True)
        reward_B, trust_B = score.compared_B, score.trust_B
        trust_B = torch.ones_like(reward_B) if trust_B is None else trust_B
        round.tally.add(replace(score, total_B=reward_B))
        round.tally.num_queries += len(batch.prompts)
        round.tally.num_calls += len(batch.prompts) * chain.table.num_steps
        rollouts.append(Rollout(chain, batch, [*states, x_BCHW], list(outputs), reward_B, trust_B, first_image))
        first_image += len(batch.prompts)
    return rollouts


def _record(passed: list[tuple[Tensor, Tensor]], step: int, x_BCHW: Tensor, f_BCHW: Tensor) -> None:
    passed.append((x_BCHW, f_BCHW))


def draw_steps(round: Round, rollouts: Sequence[Rollout], fraction: float) -> tuple[int, ...]:
    """Return the stochastic steps that are trained in this round: a random share, the same on every worker.

    Raises:
        UserError: No step is stochastic.
    """
    steps = rollouts[0].stochastic_steps
    if not steps:
        raise UserError(
            "sampler: no step that the adapters have a part in adds noise, which policy gradients learn from; raise "
            "sampler.eta, or lower sampler.base_steps"
        )
    count = max(1, int(np.ceil(fraction * len(steps))))
    return tuple(sorted(round.rng.choice(steps, count, replace=False).tolist()))


Loss = Callable[[Rollout, int, Tensor, Tensor, Tensor], Tensor]
"""``(rollout, step, log_prob_B, ratio_B, f_BCHW) -> loss_B``"""


def policy_pass(round: Round, rollouts: Sequence[Rollout], steps: Sequence[int], loss: Loss, *, is_first: bool) -> None:
    """Add the gradient of the mean of ``loss`` over images and steps, a step at a time, and update.

    The policy that sampled is taken to be the one of the first pass, before any update: the same weights, and the same
    arithmetic as in the passes to come. A ratio of 1 is then exactly 1.
    """
    round.tally.num_active = len(steps)
    with round.timer.measure("backward"):
        for rollout in rollouts:
            for step in steps:
                f_BCHW = rollout.chain.predict(step, rollout.states[step])
                log_prob_B = rollout.log_prob_B(step, f_BCHW)
                sampled_B = rollout.log_probs.setdefault(step, log_prob_B.detach())
                loss_B = loss(rollout, step, log_prob_B, (log_prob_B - sampled_B).exp(), f_BCHW)
                for weight, value_B in round.penalties_B(rollout.chain, step, rollout.states[step], f_BCHW):
                    loss_B = loss_B + weight * value_B
                (loss_B.sum() / (round.num_images * len(steps))).backward()
                round.tally.num_calls += 2 * len(loss_B)
    round.update(may_vanish=not is_first)  # every ratio may be clipped in a later pass


def clipped_surrogate(advantage_B: Tensor, ratio_B: Tensor, clip: float) -> Tensor:
    """Return PPO's loss (arXiv:1707.06347, Eq. 7, negated), ``(B,)``: no gain from a ratio beyond 1 +- clip."""
    return -torch.minimum(advantage_B * ratio_B, advantage_B * ratio_B.clamp(1 - clip, 1 + clip))


class PromptStatistics:
    """Mean and spread of the last rewards of every prompt, so that an easy prompt is no advantage.

    As in DDPO (arXiv:2305.13301, per-prompt stat tracking): a prompt seen fewer than ``min_count`` times is compared
    with the round as a whole.
    """

    def __init__(self, size: int, min_count: int) -> None:
        self._size, self._min_count = size, min_count
        self._rewards: dict[str, list[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards: Sequence[float]) -> list[float]:
        """Take in a round's rewards and return (reward - mean) / std of each, by prompt where enough is known."""
        keys = [identity(prompt) for prompt in prompts]
        for prompt, reward in zip(keys, rewards, strict=True):
            self._rewards[prompt] = [*self._rewards.get(prompt, []), reward][-self._size :]
        advantages = []
        for prompt, reward in zip(keys, rewards, strict=True):
            own = self._rewards[prompt]
            known = np.array(own if len(own) >= self._min_count else rewards)
            advantages.append(float((reward - known.mean()) / (known.std() + 1e-6)))
        return advantages

    def state_dict(self) -> dict[str, list[float]]:
        """Return prompt -> its last rewards."""
        return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take over what ``state_dict`` returned."""
        self._rewards = {prompt: list(rewards) for prompt, rewards in state.items()}


def gathered(round: Round, rollouts: Sequence[Rollout]) -> tuple[list[str], list[float]]:
    """Return the prompts and rewards of the whole round, images in order, on every worker."""
    mine = [pair for r in rollouts for pair in zip(r.batch.prompts, r.reward_B.double().cpu().tolist(), strict=True)]
    pairs = round.peers.gather(mine)
    return [prompt for prompt, _ in pairs], [reward for _, reward in pairs]


def split(round: Round, rollouts: Sequence[Rollout], values: Sequence[float]) -> list[Tensor]:
    """Return this worker's part of a value an image of the round, ``(B,)`` a rollout."""
    return [
        torch.tensor(values[r.first_image : r.first_image + len(r.reward_B)], device=r.reward_B.device)
        for r in rollouts
    ]
