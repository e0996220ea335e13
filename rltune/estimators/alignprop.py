"""AlignProp (arXiv:2310.03739): backpropagation through the last K steps, K drawn once per trajectory."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rltune.diffusion.chain import GradientPlan
from rltune.estimators.base import ESTIMATORS


@ESTIMATORS.register("alignprop")
@dataclass(frozen=True)
class AlignProp:
    """Truncated backpropagation through time with a random truncation depth.

    Attributes:
        k: K itself (``fixed``), its greatest value (``uniform``), or its mean (``gaussian``).
        draw: ``uniform`` is the paper's choice: K ~ U{1..k}. ``gaussian`` is the authors' last code: there the first
            differentiated step is N(42, 5) of 50, that is K ~ N(8, 5), drawn again until it lies in [1, T].
        std: Standard deviation of the ``gaussian`` draw, in steps.
    """

    k: int
    draw: Literal["fixed", "uniform", "gaussian"] = "uniform"
    std: float = 5.0

    def plan(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        """Return the plan of the last K of ``num_steps`` steps."""
        return GradientPlan.last(self.draw_k(num_steps, rng), num_steps)

    def draw_k(self, num_steps: int, rng: np.random.Generator) -> int:
        """Draw K in [1, num_steps].

        Raises:
            ValueError: ``k`` is not in [1, num_steps].
        """
        if not 1 <= self.k <= num_steps:
            raise ValueError(f"k must be in [1, {num_steps}], got {self.k}")
        if self.draw == "fixed":
            return self.k
        if self.draw == "uniform":
            return int(rng.integers(1, self.k, endpoint=True))
        while True:  # ends: the mean lies in [1, T], so a draw is accepted with a probability well above 0
            k = round(rng.normal(self.k, self.std))
            if 1 <= k <= num_steps:
                return k
