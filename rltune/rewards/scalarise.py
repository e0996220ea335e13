"""From several standardised rewards to the one number that is trained on.

Trust in a reward weighs its term in the number, and so its pull on the image; it decides neither which reward is worst
nor which image is beaten, and no score is multiplied by it before it is compared.

B: images in the batch. K: rewards. N: base-model images. H, W: image rows and columns. Weights sum to 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol

import numpy as np
import torch
from scipy.optimize import nnls  # type: ignore[import-untyped]
from torch import Tensor

Scores = Mapping[str, Tensor]
Weights = Mapping[str, float] | Mapping[str, Tensor]
TRUSTED: Scores = MappingProxyType({})
"""Every reward as it is."""


class Scalarisation(Protocol):
    """A way to make one number of several; every score is standardised on the base model."""

    sees_batch: ClassVar[bool]
    """Whether an image's number depends on the other images of the batch."""
    needs_gradient: ClassVar[bool]
    """Whether it looks at gradients with respect to the images, or weighs them, so that it serves backpropagation
    alone."""

    def __call__(
        self,
        scores: Scores,
        weights: Weights,
        images_B3HW: Tensor,
        base_scores: Scores,
        trust: Scores = TRUSTED,
    ) -> Tensor:
        """Return ``(B,)``, larger is better, differentiable.

        Args:
            scores: ``(B,)`` of every reward of positive weight.
            weights: Of the same names; ``(B,)`` where every image has its own, which a sum and Chebyshev take.
            images_B3HW: What was scored.
            base_scores: ``(N,)`` of the same rewards on images of the base model.
            trust: ``(B,)`` weights, constants, of the terms of some of the rewards; of the others they are 1.
        """
        ...


@dataclass(frozen=True)
class WeightedSum:
    """``sum_k w_k z_k``."""

    sees_batch: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False

    def __call__(
        self,
        scores: Scores,
        weights: Weights,
        images_B3HW: Tensor,
        base_scores: Scores,
        trust: Scores = TRUSTED,
    ) -> Tensor:
        """Return the weighted sum ``(B,)``."""
        terms = [weights[name] * _trusted(trust, name, score_B) for name, score_B in scores.items()]
        return torch.stack(terms).sum(dim=0)


def _trusted(trust: Scores, name: str, term_B: Tensor) -> Tensor:
    return trust[name] * term_B if name in trust else term_B


@dataclass(frozen=True)
class Chebyshev:
    """``min_k w_k (z_k - ideal) + rho * sum_k w_k (z_k - ideal)``: raise what lags behind most.

    The augmented weighted Chebyshev norm (Steuer and Choo, 1983, Mathematical Programming 26): unlike a sum it can
    reach a front that is not convex. Each image is pulled by the one reward that is worst there, and a little by all.
    """

    ideal: float = 3.0
    """What every reward should come to, in standard deviations of the base model; beyond reach, or nearly."""
    rho: float = 0.05
    sees_batch: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False

    def __call__(
        self,
        scores: Scores,
        weights: Weights,
        images_B3HW: Tensor,
        base_scores: Scores,
        trust: Scores = TRUSTED,
    ) -> Tensor:
        """Return minus the augmented distance to the ideal, ``(B,)``."""
        lag_KB = torch.stack([weights[name] * (score_B - self.ideal) for name, score_B in scores.items()])
        trust_KB = torch.stack([_trusted(trust, name, torch.ones_like(score_B)) for name, score_B in scores.items()])
        trust_of_worst_B = trust_KB.gather(0, lag_KB.argmin(dim=0, keepdim=True))[0]
        return trust_of_worst_B * lag_KB.amin(dim=0) + self.rho * (trust_KB * lag_KB).sum(dim=0)


@dataclass(frozen=True)
class WinRate:
    """``sum_k w_k mean_j sigmoid(z_k - z_kj)``: how often an image would beat one of the base model's, in [0, 1].

    The calibration of CaPO (arXiv:2502.02588, section 3): win rates compare over rewards, and saturate once won, so
    that no reward is driven without end. CaPO compares images of one prompt; we compare with the base model's
    calibration images, which are of several prompts, so that an image's number depends on that image alone.
    """

    sees_batch: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False

    def __call__(
        self,
        scores: Scores,
        weights: Weights,
        images_B3HW: Tensor,
        base_scores: Scores,
        trust: Scores = TRUSTED,
    ) -> Tensor:
        """Return the weighted win rate ``(B,)``."""
        rates = {
            name: torch.sigmoid(score_B[:, None] - base_scores[name].to(score_B)).mean(dim=1)
            for name, score_B in scores.items()
        }
        return WeightedSum()(rates, weights, images_B3HW, base_scores, trust)


@dataclass(frozen=True)
class NonDominated:
    """The weighted sum over the images of the batch that no other one beats in every reward; the others count 0.

    Parrot (arXiv:2401.05675, section 3.2) learns from the non-dominated set of a batch alone. The mean over the batch
    is the mean over that set, so that the gradient does not shrink with it.
    """

    sees_batch: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = True

    def __call__(
        self,
        scores: Scores,
        weights: Weights,
        images_B3HW: Tensor,
        base_scores: Scores,
        trust: Scores = TRUSTED,
    ) -> Tensor:
        """Return the weighted sum times ``B / size of the set`` or 0, ``(B,)``."""
        is_kept_B = non_dominated(torch.stack([score_B.detach() for score_B in scores.values()], dim=1))
        total_B = WeightedSum()(scores, weights, images_B3HW, base_scores, trust)
        share = is_kept_B.to(total_B) * (len(total_B) / is_kept_B.sum().clamp(min=1))
        return total_B * share


def non_dominated(values_BK: Tensor) -> Tensor:
    """Return which rows no other row beats or equals everywhere and beats somewhere, ``(B,)`` bool."""
    at_least_BB = (values_BK[:, None] >= values_BK[None]).all(dim=2)
    better_BB = (values_BK[:, None] > values_BK[None]).any(dim=2)
    is_beaten_B: Tensor = (at_least_BB & better_BB).any(dim=0)
    return ~is_beaten_B


@dataclass(frozen=True)
class GradientBalance:
    """The weighted sum, each reward's image gradient scaled to the same length: a weight is then a share of the pull.

    A reward with steep, noisy gradients drowns the others however it is standardised. For every image the gradients
    g_k are normalised, mixed by weight and trust t_k, and given back the weighted mean of their lengths:
    ``(sum_k w_k t_k g_k / |g_k|) * (sum_k w_k |g_k|)``. The idea is GradNorm's (arXiv:1711.02257), per image and
    without its learnt weights; the number itself is the weighted sum, only its gradient differs.
    """

    sees_batch: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = True

    def __call__(
        self,
        scores: Scores,
        weights: Weights,
        images_B3HW: Tensor,
        base_scores: Scores,
        trust: Scores = TRUSTED,
    ) -> Tensor:
        """Return the weighted sum ``(B,)`` with the balanced gradient; the graph of the rewards is not needed again."""
        total_B = WeightedSum()(scores, weights, images_B3HW, base_scores, trust)
        if not (torch.is_grad_enabled() and images_B3HW.requires_grad):
            return total_B
        mixed_B3HW = torch.zeros_like(images_B3HW)
        length_B = torch.zeros_like(total_B)
        for name, score_B in scores.items():
            (slope_B3HW,) = torch.autograd.grad(score_B.sum(), images_B3HW, retain_graph=True)
            norm_B = torch.linalg.vector_norm(slope_B3HW.flatten(1), dim=1)
            tiny = torch.finfo(norm_B.dtype).tiny  # a reward without slope at an image pulls nowhere there
            pull_B3HW = weights[name] * slope_B3HW / norm_B.clamp(min=tiny)[:, None, None, None]
            if name in trust:
                pull_B3HW = trust[name][:, None, None, None] * pull_B3HW
            mixed_B3HW = mixed_B3HW + pull_B3HW
            length_B = length_B + weights[name] * norm_B
        return _with_slope(total_B, images_B3HW, mixed_B3HW * length_B[:, None, None, None])


def _with_slope(total_B: Tensor, images_B3HW: Tensor, slope_B3HW: Tensor) -> Tensor:
    """Return the same numbers with another gradient; the rewards are not passed through a second time."""
    zero_B = ((images_B3HW - images_B3HW.detach()) * slope_B3HW).sum(dim=(1, 2, 3))
    return total_B.detach() + zero_B


@dataclass(frozen=True)
class MinNorm:
    """The weighted sum, with the shortest mix of the rewards' image gradients as its gradient, whatever the weights.

    Of all ``sum_k a_k g_k`` with a on the simplex, the shortest rises at least by its own squared length along every
    g_k, so that no reward is paid for with another; it is zero where no direction raises all (MGDA: Desideri, 2012,
    Comptes Rendus Mathematique 350; Sener and Koltun, arXiv:1810.04650). Solved for every image, exactly. A reward
    without slope at an image, such as one past its hinge, has no say there; a trusted one's pull counts by its trust.
    """

    sees_batch: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = True

    def __call__(
        self,
        scores: Scores,
        weights: Weights,
        images_B3HW: Tensor,
        base_scores: Scores,
        trust: Scores = TRUSTED,
    ) -> Tensor:
        """Return the weighted sum ``(B,)`` with that gradient; the graph of the rewards is not needed again."""
        total_B = WeightedSum()(scores, weights, images_B3HW, base_scores, trust)
        if not (torch.is_grad_enabled() and images_B3HW.requires_grad):
            return total_B
        slopes = {
            name: torch.autograd.grad(score_B.sum(), images_B3HW, retain_graph=True)[0]
            for name, score_B in scores.items()
        }
        shares_BK = min_norm_shares(torch.stack([slope.flatten(1) for slope in slopes.values()], dim=1))
        pulls = [
            _trusted(trust, name, share_B)[:, None, None, None] * slopes[name]
            for name, share_B in zip(slopes, shares_BK.to(images_B3HW).unbind(dim=1), strict=True)
        ]
        return _with_slope(total_B, images_B3HW, torch.stack(pulls).sum(dim=0))


def min_norm_shares(slopes_BKN: Tensor) -> Tensor:
    """Return the shares ``(B, K)`` of which ``sum_k a_k g_k`` is shortest for every image, float64 on the CPU.

    0 for a slope that is 0. The least of ``|s sum_k a_k g_k|^2 + (s - 1)^2`` over s >= 0 grows with the length of the
    mix, so that the least over all ``u = s a >= 0`` has the proportions of the shares: a least squares problem without
    negative parts (Lawson and Hanson, 1974, chapter 23).
    """
    factors_BKK = torch.linalg.qr(slopes_BKN.detach().double().cpu().mT, mode="r").R  # all of their lengths and angles
    shares_BK = np.zeros(slopes_BKN.shape[:2])
    for factor, shares in zip(factors_BKK.numpy(), shares_BK, strict=True):
        lengths = np.linalg.norm(factor, axis=0)
        sloped = np.flatnonzero(lengths)
        if len(sloped):
            a = factor[:, sloped] / lengths.max()
            u, _ = nnls(np.vstack([a, np.ones(len(sloped))]), np.append(np.zeros(len(a)), 1.0))
            shares[sloped] = u / u.sum()
    return torch.from_numpy(shares_BK)


SCALARISATIONS: Mapping[str, Callable[..., Scalarisation]] = {
    "sum": WeightedSum,
    "chebyshev": Chebyshev,
    "win_rate": WinRate,
    "non_dominated": NonDominated,
    "gradient_balance": GradientBalance,
    "min_norm": MinNorm,
}
"""What ``mixture.method`` names."""
