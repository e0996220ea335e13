"""DRaFT-K and DRaFT-LV (arXiv:2309.17400): a fixed truncation, and a last step that is learned from n more copies."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from rltune.diffusion.chain import GradientPlan
from rltune.estimators.backprop import add_gradient, descend, follow
from rltune.estimators.base import ESTIMATORS, Round, check_count, check_settings
from rltune.registry import Within


@ESTIMATORS.register("draft")
@dataclass(frozen=True)
class DRaFT:
    """DRaFT-K: backpropagation through the last K steps, K fixed.

    Attributes:
        k: K, the last steps that carry gradient; the paper's default is 1.
    """

    k: Annotated[int, Within(1, 1000)] = 1
    needs_gradient: ClassVar[bool] = True
    has_serial_mode: ClassVar[bool] = False

    def check(self, num_steps: int) -> None:
        """Check that K fits the chain.

        Raises:
            ValueError: ``k`` is not in [1, num_steps].
        """
        check_count("k", self.k, 1, num_steps)

    def deepest(self, num_steps: int) -> int:
        """Return K."""
        return self.k

    def train(self, round: Round) -> None:
        """Backpropagate through the last K steps."""
        follow(round, GradientPlan.last(self.k, round.sampler.num_steps))


@ESTIMATORS.register("draft_lv")
@dataclass(frozen=True)
class DRaFTLV:
    """DRaFT-LV: DRaFT-1, averaged with n re-noised copies of the image, each denoised by the last step again.

    A copy is x' = signal x_0 + noise eps at the level of the last step; its clean prediction is scored too. One
    trajectory gives 1 + n gradients of low variance for n more network calls, decodes and reward queries.

    Attributes:
        n: Copies; the paper uses 2.
    """

    n: Annotated[int, Within(0, 64)] = 2
    needs_gradient: ClassVar[bool] = True
    has_serial_mode: ClassVar[bool] = True

    def check(self, num_steps: int) -> None:
        """Check n.

        Raises:
            ValueError: ``n`` is negative, or large.
        """
        check_settings(self)

    def deepest(self, num_steps: int) -> int:
        """Return 1."""
        return 1

    def train(self, round: Round) -> None:
        """Backpropagate through the last step of every trajectory and of its copies."""
        descend(round, partial(self._accumulate, round))

    def _accumulate(self, round: Round) -> None:
        num_steps, share = round.sampler.num_steps, 1 / (1 + self.n)
        for batch in round.batches:
            chain = round.open(batch)
            x_BCHW = add_gradient(round, GradientPlan.last(1, num_steps), chain, batch, share=share)
            signal, noise = float(chain.table.signal_U[-2]), float(chain.table.noise_U[-2])
            for copy in range(self.n):
                assert batch.extra_noise is not None
                noised_BCHW = signal * x_BCHW + noise * batch.extra_noise(copy)
                last = chain.starting(num_steps - 1, noised_BCHW)
                plan = GradientPlan(frozenset({0}), is_through_latent=False, scored=0)
                add_gradient(round, plan, last, batch, share=share, is_counted=False)
