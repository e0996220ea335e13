"""AlignProp (arXiv:2310.03739): backpropagation through the last K steps, K drawn once a round."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np

from rltune.diffusion.chain import GradientPlan
from rltune.estimators.backprop import follow
from rltune.estimators.base import ESTIMATORS, Round, check_count, check_settings
from rltune.registry import Within

DRAWS = ("fixed", "uniform", "gaussian", "per_step")
GAUSSIAN_MEAN = 8
"""The authors' last code starts the gradient at step N(42, 5) of 50."""


@ESTIMATORS.register("alignprop")
@dataclass(frozen=True)
class AlignProp:
    """Truncated backpropagation through time with a random truncation depth.

    A round's images share one draw, over all micro-batches and workers; the authors' code draws anew for every batch
    that a GPU holds, so that one of their updates averages over several K.

    Attributes:
        k: K itself (``fixed``), its greatest value (``uniform``; left out: T), or its mean (``gaussian``; left out: 8).
        draw: ``uniform`` is the paper's choice: K ~ U{1..k}. ``gaussian`` is the authors' last code, K ~ N(8, 5) of 50
            steps, drawn again until it lies in [1, T]. There the step that gradient starts at, N(42, 5), is cut to a
            whole number, which makes K half a step more on average; here K is rounded. ``per_step`` is their first
            code and TRL's default: step i of 0..T-1 carries gradient with probability (i + 1) / (T + 1), each
            independently, k unused; a draw without any step is drawn again.
        std: Standard deviation of the ``gaussian`` draw, in steps.
    """

    k: Annotated[int, Within(1, 1000)] | None = None
    draw: Literal["fixed", "uniform", "gaussian", "per_step"] = "uniform"
    std: Annotated[float, Within(1e-6, 1000)] = 5.0
    needs_gradient: ClassVar[bool] = True
    has_serial_mode: ClassVar[bool] = False

    def check(self, num_steps: int) -> None:
        """Check that K fits the chain.

        Raises:
            ValueError: ``k`` is not in [1, num_steps], or missing where it is drawn from nothing; ``draw`` is unknown;
                ``std`` is not positive.
        """
        if self.draw not in DRAWS:
            raise ValueError(f"draw must be one of {', '.join(DRAWS)}, got {self.draw!r}")
        if self.k is None and self.draw == "fixed":
            raise ValueError("draw: fixed needs k, got none")
        check_count("k", self._k(num_steps), 1, num_steps)
        check_settings(self)

    def train(self, round: Round) -> None:
        """Backpropagate through the last K steps of every trajectory of the round."""
        follow(round, self.plan(round.sampler.num_steps, round.rng))

    def plan(self, num_steps: int, rng: np.random.Generator) -> GradientPlan:
        """Return the steps that carry gradient: the last K, or those drawn one by one."""
        if self.draw == "per_step":
            while True:  # at T = 1 a draw is empty half the time, at T = 50 never
                is_active = rng.integers(0, num_steps, num_steps, endpoint=True) <= np.arange(num_steps)
                if is_active.any():
                    return GradientPlan(frozenset(np.flatnonzero(is_active).tolist()))
        return GradientPlan.last(self.draw_k(num_steps, rng), num_steps)

    def draw_k(self, num_steps: int, rng: np.random.Generator) -> int:
        """Draw K in [1, num_steps].

        Raises:
            ValueError: ``check``'s reasons.
        """
        self.check(num_steps)
        k = self._k(num_steps)
        if self.draw == "fixed":
            return k
        if self.draw == "uniform":
            return int(rng.integers(1, k, endpoint=True))
        while True:  # ends: the mean lies in [1, T], so a draw is accepted with a probability well above 0
            drawn = round(rng.normal(k, self.std))
            if 1 <= drawn <= num_steps:
                return drawn

    def deepest(self, num_steps: int) -> int:
        """Return the greatest K that may be drawn."""
        return self._k(num_steps) if self.draw in ("fixed", "uniform") else num_steps

    def _k(self, num_steps: int) -> int:
        if self.k is not None:
            return self.k
        return min(GAUSSIAN_MEAN, num_steps) if self.draw == "gaussian" else num_steps
