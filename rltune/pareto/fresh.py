"""The hypervolume of a front that was chosen by some measurements and is reported by others.

Who leads among many by noisy numbers leads by luck too, and a hypervolume takes the best of its points at every place:
of 12 points that are all equal to the base model in three objectives, measured on 16 prompts, it may come out as 1.8
where 1 is true, and as 1.5 if the leaders are measured again on fresh prompts. So each place is given to the point that
led there by the numbers of the choice, and counts with what that point is by the fresh ones.

N: points. D: objectives. P: prompts. B: sets of measurements.
"""

from dataclasses import dataclass

import numpy as np

from rltune.intervals import half_width
from rltune.pareto.front import Array, as_points, non_dominated


@dataclass(frozen=True)
class FreshVolume:
    """A hypervolume by fresh measurements."""

    value: float
    half_width: float | None
    """Of its 95 % interval over prompts; None of a single prompt."""
    half_width_without_effect: float | None
    """The same had no point any effect, which makes the value 1 on average: that of the base model alone."""


def fresh_volume(chosen_ND: Array, gains_PND: Array) -> FreshVolume:
    """Return the hypervolume of chosen points by their fresh gains, above the base model minus one unit.

    Without effect it is 1 on average, whatever was chosen. Otherwise it is the volume of the points' true values as far
    as the choice has put them in their places, at most (but for rare cases) that of the true front: rather too small
    than too large. What is left of bias comes from products of the objectives' errors; the jackknife takes it away to
    the order of 1 / P^2, and gives the interval, with Student's t.

    Args:
        chosen_ND: The points by what they were chosen by, the base model at 1 in every objective; larger is better.
        gains_PND: What each gained over the base model on every fresh prompt, in units.
    """
    value, half = _jackknife(chosen_ND, gains_PND)
    _, half_without_effect = _jackknife(chosen_ND, gains_PND - gains_PND.mean(axis=0))
    return FreshVolume(value, half, half_without_effect)


NUM_DRAWS = 2000
"""For a probability, whose error is then 0.011 at most, and 0.005 at 0.95."""


def prob_non_dominated(gains_PND: Array) -> Array:
    """Return how probable it is that no other point dominates each by its true values, ``(N,)``.

    A share of draws from what prompts say of the true values: their means, give or take a multivariate Student's t with
    P - 1 degrees of freedom and the covariance of everything measured on a prompt. That is the posterior of normal
    gains under Jeffreys' prior. A bootstrap over prompts would have too little scatter by (P - 1) / P, and no longer
    tails. The draws are the same each time.

    That prior takes all differences, however large, for as probable; so where true differences are smaller than their
    errors, high figures are too high. ``tests/benchmarks/front_statistics.py`` says by how much.

    Args:
        gains_PND: What each gained over the base model on every fresh prompt.

    Raises:
        ValueError: There is a single prompt, which says nothing of errors.
    """
    num, (num_points, num_objectives) = len(gains_PND), gains_PND.shape[1:]
    if num < 2:
        raise ValueError(f"gains must be of two prompts at least, got {num}")
    mean_ND = gains_PND.mean(axis=0)
    scatter = (gains_PND - mean_ND).reshape(num, -1) / np.sqrt(num * (num - 1))
    rng = np.random.default_rng(0)
    normal_BP = rng.standard_normal((NUM_DRAWS, num))
    scale_B = np.sqrt((num - 1) / rng.chisquare(num - 1, NUM_DRAWS))
    drawn_BND = mean_ND + (scale_B[:, None] * (normal_BP @ scatter)).reshape(-1, num_points, num_objectives)
    drawn_DBN = np.ascontiguousarray(drawn_BND.transpose(2, 0, 1))
    shares = []
    for i in range(num_points):
        is_as_good_BN = np.logical_and.reduce([drawn_BN >= drawn_BN[:, i : i + 1] for drawn_BN in drawn_DBN])
        is_better_BN = np.logical_or.reduce([drawn_BN > drawn_BN[:, i : i + 1] for drawn_BN in drawn_DBN])
        shares.append(1.0 - (is_as_good_BN & is_better_BN).any(axis=1).mean())
    return np.array(shares)


def _jackknife(chosen_ND: Array, gains_PND: Array) -> tuple[float, float | None]:
    """Return the volume, less the bias of order 1 / P, and half the width of its interval; Efron and Stein 1981."""
    num = len(gains_PND)
    whole, without_B = _with_and_without(chosen_ND, gains_PND)
    if num < 2:
        return whole, None
    error = float(np.sqrt((num - 1) / num * np.square(without_B - without_B.mean()).sum()))
    return num * whole - (num - 1) * float(without_B.mean()), half_width(error, num - 1)


def _with_and_without(chosen_ND: Array, gains_PND: Array) -> tuple[float, Array]:
    """Return the volume by all prompts, and by all but one of them, ``(P,)``; of a single prompt none of these."""
    num, mean_ND = len(gains_PND), gains_PND.mean(axis=0)
    without_BND = (num * mean_ND - gains_PND) / (num - 1) if num > 1 else gains_PND[:0]
    whole, *parts = volume_as_chosen(chosen_ND, 1 + np.concatenate([mean_ND[None], without_BND])).tolist()
    return whole, np.array(parts)


def volume_by_prompt(chosen_ND: Array, gains_PND: Array) -> Array:
    """Return what each prompt says of the hypervolume, ``(P,)``: Tukey's pseudo-values.

    Their mean is ``fresh_volume``'s value and their standard error its error, so that volumes of the same prompts can
    be paired. Of a single prompt it is the volume itself. Arguments are those of ``fresh_volume``.
    """
    num = len(gains_PND)
    whole, without_P = _with_and_without(chosen_ND, gains_PND)
    return num * whole - (num - 1) * without_P if num > 1 else np.array([whole])


def volume_as_chosen(chosen_ND: Array, values_BND: Array) -> Array:
    """Return the volume above 0 that points cover, ``(B,)``, with the order of their coordinates as chosen.

    Wherever a hypervolume asks which point is larger, the chosen values answer; what is added up are ``values_BND``. Of
    the chosen values themselves it is their hypervolume. A polynomial in the values, unlike a hypervolume: it has no
    maximum that errors could raise.

    Raises:
        ValueError: ``chosen_ND`` is not a matrix of finite numbers.
    """
    chosen = as_points(chosen_ND)
    is_above_N = (chosen > 0).all(axis=1)
    if not is_above_N.any():
        return np.zeros(len(values_BND))
    return _volume(chosen[is_above_N], values_BND[:, is_above_N])


def _volume(chosen_ND: Array, values_BND: Array) -> Array:
    """Add up slices along the last objective: in each, what the points that reach it cover in the others."""
    if chosen_ND.shape[1] == 1:
        return np.asarray(values_BND[:, chosen_ND[:, 0].argmax(), 0])
    front = np.flatnonzero(non_dominated(chosen_ND))
    front = front[np.argsort(-chosen_ND[front, -1], kind="stable")]
    chosen_ND, values_BND = chosen_ND[front], values_BND[:, front]
    below_BN = np.concatenate([values_BND[:, 1:, -1], np.zeros((len(values_BND), 1))], axis=1)
    thickness_BN = values_BND[:, :, -1] - below_BN
    volume_B = np.zeros(len(values_BND))
    for i in range(len(front)):
        volume_B += thickness_BN[:, i] * _volume(chosen_ND[: i + 1, :-1], values_BND[:, : i + 1, :-1])
    return volume_B
