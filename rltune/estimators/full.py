"""Full backpropagation through all T steps: the baseline whose collapse truncation was invented against."""

from dataclasses import dataclass
from typing import ClassVar

from rltune.diffusion.chain import GradientPlan
from rltune.estimators.backprop import follow
from rltune.estimators.base import ESTIMATORS, Round


@ESTIMATORS.register("full")
@dataclass(frozen=True)
class FullBackprop:
    """Backpropagation through all T steps: the exact gradient, and AlignProp and DRaFT without truncation."""

    needs_gradient: ClassVar[bool] = True
    has_serial_mode: ClassVar[bool] = False

    def check(self, num_steps: int) -> None:
        """Nothing can be wrong."""

    def train(self, round: Round) -> None:
        """Backpropagate through every step."""
        follow(round, self.plan(round.sampler.num_steps))

    def plan(self, num_steps: int) -> GradientPlan:
        """Return the plan of all steps."""
        return GradientPlan.last(num_steps, num_steps)
