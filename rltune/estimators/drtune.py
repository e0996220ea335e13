"""DRTune (arXiv:2405.00760): K steps spread over the whole chain, each cut off from the latent it starts from."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from rltune.diffusion.chain import GradientPlan
from rltune.estimators.backprop import follow
from rltune.estimators.base import ESTIMATORS, Round, check_count, check_settings
from rltune.registry import Within


@ESTIMATORS.register("drtune")
@dataclass(frozen=True)
class DRTune:
    """K steps spread over the chain, their inputs detached: nothing explodes, and early steps are trained too.

    Attributes:
        k: Steps that carry gradient, equally spaced from a random first one.
        early_stop: The chain ends at a step drawn from this last share of it, whose clean prediction is scored; 0 runs
            it to the end and scores x_0.
    """

    k: Annotated[int, Within(1, 1000)] = 3
    early_stop: Annotated[float, Within(0, 1)] = 0.4
    needs_gradient: ClassVar[bool] = True
    has_serial_mode: ClassVar[bool] = True

    def check(self, num_steps: int) -> None:
        """Check that K fits what early stopping leaves of the chain at least.

        Raises:
            ValueError: ``k`` or ``early_stop`` is out of range.
        """
        check_settings(self)
        shortest = num_steps - max(1, round(self.early_stop * num_steps)) + 1
        check_count("k", self.k, 1, shortest)

    def train(self, round: Round) -> None:
        """Backpropagate through K separate network calls."""
        follow(round, self.plan(round.sampler.num_steps, round.rng))

    def plan(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        """Return K equally spaced steps of a chain that stops at a random late one."""
        width = round(self.early_stop * num_steps)
        scored = num_steps - int(rng.integers(1, width, endpoint=True)) if width > 0 else None
        num_run = num_steps if scored is None else scored + 1
        stride = num_run // self.k
        first = int(rng.integers(0, num_run - (self.k - 1) * stride))
        active = frozenset(range(first, first + self.k * stride, stride))
        return GradientPlan(active, is_through_latent=False, scored=scored)
