"""Gaussian processes small enough to be fitted between two trials: numpy alone, some tens of points, milliseconds.

N, M: points. F: features, about 1 wide. G: groups of features that share a length scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]

LENGTH = 1.5
"""Length scale that is expected before any data: trials change smoothly over the whole range of a knob."""
NOISE = 0.1
"""Standard deviation of the noise that is expected, in that of what is modelled."""
JITTER = 1e-6


@dataclass(frozen=True)
class Process:
    """A Gaussian process with a squared exponential kernel, conditioned on points (Rasmussen and Williams 2006)."""

    points_NF: Array
    groups_F: npt.NDArray[np.intp]
    scaled_N: Array
    """What was measured, less ``mean``, over ``spread``."""
    mean: float
    spread: float
    log_scales: Array
    """Logarithms of the length scale of every group, then of the noise's share of the standard deviation."""

    def predict(self, points_MF: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation at other points, noise left out."""
        inverse_NN = np.linalg.inv(_cholesky(self.points_NF, self.groups_F, self.log_scales))
        whitened_N = inverse_NN @ self.scaled_N
        cross_NM = inverse_NN @ _kernel(self.points_NF, points_MF, self.groups_F, self.log_scales)
        share_M = np.maximum(1.0 - (cross_NM**2).sum(axis=0), 1e-9)
        deviation_M = np.sqrt(share_M * _variance(whitened_N))
        return self.mean + self.spread * (whitened_N @ cross_NM), self.spread * deviation_M

    def believing(self, points_MF: Array) -> "Process":
        """Return the process that has been told its own mean at more points: of trials that still run."""
        scaled_M = (self.predict(points_MF)[0] - self.mean) / self.spread
        points = np.vstack([self.points_NF, points_MF])
        together = np.concatenate([self.scaled_N, scaled_M])
        return Process(points, self.groups_F, together, self.mean, self.spread, self.log_scales)


def fit(points_NF: Array, groups: Sequence[int], values_N: Array) -> Process:
    """Return the process whose length scales and noise are the most likely, by a descent one scale at a time.

    With a handful of points the data say little: a prior, log-normal around ``LENGTH`` and ``NOISE``, holds the scales.
    The variance is not searched but what is best at those scales, as with an inverse-gamma prior of two observations.

    Args:
        points_NF: Where it was measured.
        groups: Of every feature; those of a group have one length scale.
        values_N: What was measured.
    """
    groups_F = np.array(groups, dtype=np.intp)
    mean, spread = float(values_N.mean()), float(values_N.std()) or 1.0
    scaled_N = (values_N - mean) / spread
    expected = np.log([LENGTH] * (int(groups_F.max()) + 1) + [NOISE])

    def loss(log_scales: Array) -> float:
        lower_NN = _cholesky(points_NF, groups_F, log_scales)
        variance = _variance(np.linalg.solve(lower_NN, scaled_N))
        unlikely = 0.5 * (len(scaled_N) + 2) * np.log(variance) + np.log(np.diag(lower_NN)).sum()
        return float(unlikely + 0.5 * ((log_scales - expected) ** 2).sum())

    scales, least = expected, loss(expected)
    for step in (1.0, 0.5, 0.5):
        for i in range(len(scales)):
            for direction in (step, -step):
                while True:
                    moved = scales.copy()
                    moved[i] += direction
                    if not (moved_loss := loss(moved)) < least - 1e-6:
                        break
                    scales, least = moved, moved_loss
    return Process(points_NF, groups_F, scaled_N, mean, spread, scales)


def _kernel(points_NF: Array, points_MF: Array, groups_F: npt.NDArray[np.intp], log_scales: Array) -> Array:
    scales_F = np.exp(log_scales[:-1])[groups_F]
    left_NF, right_MF = points_NF / scales_F, points_MF / scales_F
    squares_NM = (left_NF**2).sum(1)[:, None] + (right_MF**2).sum(1) - 2.0 * left_NF @ right_MF.T
    kernel_NM: Array = np.exp(-0.5 * np.maximum(squares_NM, 0.0))
    return kernel_NM


def _cholesky(points_NF: Array, groups_F: npt.NDArray[np.intp], log_scales: Array) -> Array:
    kernel_NN = _kernel(points_NF, points_NF, groups_F, log_scales)
    kernel_NN[np.diag_indices(len(kernel_NN))] += np.exp(2.0 * log_scales[-1]) + JITTER
    return np.linalg.cholesky(kernel_NN)


def _variance(whitened_N: Array) -> float:
    return float((whitened_N @ whitened_N + 2.0) / (len(whitened_N) + 2.0))
