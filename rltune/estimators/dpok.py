"""DPOK (arXiv:2305.16381): policy gradient with a learned value baseline and a KL penalty to the base model."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from rltune.estimators.base import ESTIMATORS, Round, Setting, check_settings
from rltune.estimators.heads import StateHead
from rltune.estimators.policy import Rollout, draw_steps, policy_pass, roll_out
from rltune.registry import Within


@ESTIMATORS.register("dpok")
@dataclass(frozen=True)
class DPOK:
    """Policy gradient with a learned value baseline and a KL penalty to the base model.

    Maximises ``reward_weight * E[r] - kl_weight * KL(policy || base)``. As in the published code the KL of a step is
    reduced to the squared distance of the network outputs, and the loss of a step is ``-reward_weight (r - V(x_t, t,
    c)) clip(ratio)``, without PPO's minimum. Two things differ from it: its transitions are minibatches of a buffer of
    the last 1000, here a round's own; and its 5 value minibatches make one step of the value network, here each does.

    Attributes:
        reward_weight: Weight of the reward.
        kl_weight: Weight of the KL penalty.
        clip: Half width of the interval that the ratio of probabilities is clamped to.
        epochs: Policy updates a round.
        fraction: Share of the steps that is trained in a round, drawn at random.
        value_steps: Updates of the value network a round, before the policy's.
        value_batch: Transitions of such an update.
        value_lr: Their learning rate.
    """

    reward_weight: Annotated[float, Within(0, 1_000_000)] = 100.0
    kl_weight: Annotated[float, Within(0, 1_000_000)] = 0.01
    clip: Annotated[float, Within(1e-8, 1)] = 1e-4
    epochs: Annotated[int, Within(1, 1000)] = 5
    fraction: Annotated[float, Within(0, 1)] = 1.0
    value_steps: Annotated[int, Within(0, 10_000)] = 5
    value_batch: Annotated[int, Within(1, 1_000_000)] = 256
    value_lr: Annotated[float, Within(0, 1)] = 1e-4
    needs_gradient: ClassVar[bool] = False
    has_serial_mode: ClassVar[bool] = False

    def check(self, num_steps: int) -> None:
        """Check the ranges of all settings.

        Raises:
            ValueError: One is out of its range.
        """
        check_settings(self)

    def make_state(self, setting: Setting) -> StateHead:
        """Return a value network that says 0 of everything."""
        return StateHead(setting, self.value_lr)

    def train(self, round: Round) -> None:
        """Sample, fit the value network to the rewards, and update the policy ``epochs`` times."""
        assert isinstance(round.state, StateHead)
        value = round.state
        rollouts = roll_out(round)
        for _ in range(self.value_steps):
            self._fit(round, value, rollouts)

        def loss(rollout: Rollout, step: int, log_prob_B: Tensor, ratio_B: Tensor, f_BCHW: Tensor) -> Tensor:
            advantage_B = rollout.reward_B - self._values(value, rollout, step, slice(None)).detach()
            kl_B = round.drift_B(rollout.chain, step, rollout.states[step], f_BCHW)
            gain_B = advantage_B * ratio_B.clamp(1 - self.clip, 1 + self.clip)
            return -self.reward_weight * rollout.trust_B * gain_B + self.kl_weight * kl_B

        steps = draw_steps(round, rollouts, self.fraction)
        for epoch in range(self.epochs):
            policy_pass(round, rollouts, steps, loss, is_first=epoch == 0)

    def _values(self, value: StateHead, rollout: Rollout, step: int, rows: slice | list[int]) -> Tensor:
        x_NCHW = rollout.states[step][rows]
        t_N = rollout.chain.table.timesteps_T[step].to(x_NCHW.device).expand(len(x_NCHW))
        estimate: Tensor = value.network(x_NCHW, t_N, rollout.chain.text_BD[rows])
        return estimate

    def _fit(self, round: Round, value: StateHead, rollouts: list[Rollout]) -> None:
        """One update on a minibatch of the round's transitions, numbered over all workers so that all draw the same."""
        num_steps = rollouts[0].chain.table.num_steps
        size = min(self.value_batch, round.num_images * num_steps)
        chosen = round.rng.choice(round.num_images * num_steps, size, replace=False)
        for rollout in rollouts:
            last = rollout.first_image + len(rollout.reward_B)
            for step in range(num_steps):
                images = [int(n // num_steps) for n in chosen if n % num_steps == step]
                rows = [image - rollout.first_image for image in images if rollout.first_image <= image < last]
                if rows:
                    error_N = self._values(value, rollout, step, rows) - rollout.reward_B[rows]
                    (error_N.square().sum() / size).backward()
        round.peers.sum_gradients(value.parameters)
        value.optimizer.step()
        value.optimizer.zero_grad(set_to_none=True)
