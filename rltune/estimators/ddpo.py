"""DDPO (arXiv:2305.13301): denoising as a decision process, trained by clipped importance sampling (DDPO-IS)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from rltune.estimators.base import ESTIMATORS, Round, Setting, check_count, check_settings
from rltune.estimators.policy import (
    PromptStatistics,
    Rollout,
    clipped_surrogate,
    draw_steps,
    gathered,
    policy_pass,
    roll_out,
    split,
)
from rltune.registry import Within


@ESTIMATORS.register("ddpo")
@dataclass(frozen=True)
class DDPO:
    """Policy gradient by clipped importance sampling, images compared with others of their prompt.

    Needs no gradient of the reward, and pays in reward queries. Give every prompt several images a round
    (``prompts.images_per_prompt``), so that there is something to compare with.

    Attributes:
        clip: Half width of the interval that the ratio of probabilities (of the mean over latent elements) may move in.
        advantage_clip: Greatest absolute advantage.
        epochs: Updates a round. The first is on-policy; clipping matters from the second on.
        fraction: Share of the steps that is trained in a round, drawn at random.
        buffer: Rewards kept a prompt.
        min_count: Rewards of a prompt from which on it is compared with itself alone.
    """

    clip: Annotated[float, Within(1e-8, 1)] = 1e-4
    advantage_clip: Annotated[float, Within(1e-3, 1_000_000)] = 5.0
    epochs: Annotated[int, Within(1, 1000)] = 1
    fraction: Annotated[float, Within(0, 1)] = 1.0
    buffer: Annotated[int, Within(2, 1_000_000)] = 32
    min_count: Annotated[int, Within(2, 1_000_000)] = 16
    needs_gradient: ClassVar[bool] = False
    has_serial_mode: ClassVar[bool] = False

    def check(self, num_steps: int) -> None:
        """Check the ranges of all settings, and that the buffer holds what is to be counted.

        Raises:
            ValueError: One is out of its range.
        """
        check_settings(self)
        check_count("buffer", self.buffer, self.min_count, 1_000_000)

    def make_state(self, setting: Setting) -> PromptStatistics:
        """Return empty statistics."""
        return PromptStatistics(self.buffer, self.min_count)

    def train(self, round: Round) -> None:
        """Sample, compare, and update ``epochs`` times."""
        assert isinstance(round.state, PromptStatistics)
        rollouts = roll_out(round)
        everyone = round.state.advantages(*gathered(round, rollouts))
        advantages = split(round, rollouts, everyone)
        bound = self.advantage_clip
        advantage_of = {
            id(r): r.trust_B * values_B.clamp(-bound, bound) for r, values_B in zip(rollouts, advantages, strict=True)
        }

        def loss(rollout: Rollout, step: int, log_prob_B: Tensor, ratio_B: Tensor, f_BCHW: Tensor) -> Tensor:
            return clipped_surrogate(advantage_of[id(rollout)], ratio_B, self.clip)

        steps = draw_steps(round, rollouts, self.fraction)
        for epoch in range(self.epochs):
            # where every image is as good as its prompt's others there is nothing to learn, and nothing wrong
            policy_pass(round, rollouts, steps, loss, is_first=epoch == 0 and any(everyone))
