"""What a reward-gradient estimator is: a choice of which sampling steps carry gradient."""

from typing import Protocol

import numpy as np

from rltune.diffusion.chain import GradientPlan
from rltune.registry import Registry


class Estimator(Protocol):
    """Decides, once per trajectory, how much of the chain is differentiated."""

    def plan(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        """Return the steps that carry gradient in this trajectory of ``num_steps`` steps.

        ``rng`` is a function of (seed, training step) alone, so every worker draws the same plan.
        """
        ...


ESTIMATORS: Registry[Estimator] = Registry("estimator", "rltune.estimators")
"""Built from ``k``, ``draw``, ``std`` and the options of an experiment's ``estimator`` section."""
