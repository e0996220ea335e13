"""ReFL (ImageReward, arXiv:2304.05977): the clean prediction of one random late step is scored."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from rltune.diffusion.chain import GradientPlan
from rltune.estimators.backprop import follow
from rltune.estimators.base import ESTIMATORS, Round, check_settings
from rltune.registry import Within


@ESTIMATORS.register("refl")
@dataclass(frozen=True)
class ReFL:
    """The clean prediction of one random late step is scored, and that step alone trained.

    The published code draws the step from 30..39 of 40, runs it without guidance, and uses the loss relu(2 - r): here
    guidance is the sampler's, and the loss is the reward's own (``loss: hinge``, ``target: 2``).

    Attributes:
        window: Share of the steps, the latest, that the step is drawn from.
    """

    window: Annotated[float, Within(0, 1)] = 0.25
    needs_gradient: ClassVar[bool] = True
    has_serial_mode: ClassVar[bool] = True

    def check(self, num_steps: int) -> None:
        """Check the window.

        Raises:
            ValueError: ``window`` is not in [0, 1].
        """
        check_settings(self)

    def train(self, round: Round) -> None:
        """Backpropagate through one network call a trajectory."""
        follow(round, self.plan(round.sampler.num_steps, round.rng))

    def plan(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        """Return the plan of one step, uniform over the last ``window * num_steps``, at least the last."""
        width = max(1, round(self.window * num_steps))
        step = int(rng.integers(num_steps - width, num_steps))
        return GradientPlan(frozenset({step}), is_through_latent=False, scored=step)
