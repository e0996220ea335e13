"""The ``surrogate`` sampler: a model of every objective and constraint over knobs and reward weights together.

Each is a small Gaussian process. The next trial is where the hypervolume is expected to grow most, times the
probability that every constraint holds. That expectation is a mean over directions: the hypervolume of a set is, up to
a constant, the mean over directions of the positive orthant of the largest min_d (y_d / direction_d)^D in the set
(Golovin and Zhang 2020, arXiv:2006.04655, the hypervolume scalarisation), so that what one more point adds takes no
more than a maximum in every direction.

N: trials. M: candidates. D: objectives. L: directions. S: draws. F: features.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rltune.orchestration.gaussian import Array, Process, fit

STARTUP = 8
"""Ended trials before the first model; until then trials are spread evenly."""
SHARE = "share"
"""Attribute of a trial that was stopped: the share of its steps that it took."""
MAX_TRIALS = 150
"""Of more than these the latest are modelled: the time for a fit grows with the cube."""
CANDIDATES = 800
DIRECTIONS = 96
DRAWS = 16
DOUBT = 0.5
"""What a model's standard deviation counts for: a sweep has few trials to explore with."""
BELOW = 0.5
"""How far below the worst feasible trial the reference point lies, in the range of the feasible ones."""
OUTLIER = 3.0
"""Interquartile ranges below the median at which values are cut: what broke down would flatten all the rest."""


class SurrogateSampler(BaseSampler):  # type: ignore[misc]  # Optuna's types are not followed
    """See the module.

    Args:
        seed: Of its draws.
        distributions: Of every parameter of the search.
        weights_of: Parameter values -> the weights that they stand for, which the models see in their place.
        weight_names: Parameters that stand for weights.
    """

    def __init__(
        self,
        seed: int,
        distributions: Mapping[str, BaseDistribution],
        weight_names: Sequence[str],
        weights_of: Callable[[Sequence[float]], Sequence[float]],
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=seed)
        self._distributions = dict(distributions)
        self._weight_names = list(weight_names)
        self._weights_of = weights_of
        self._shift = self._rng.random(len(self._distributions))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return every parameter: they are drawn together."""
        return self._distributions

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        """Return a random value; asked for only where a parameter has one value."""
        return self._random.sample_independent(study, trial, name, distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the parameters of the next trial."""
        trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        ended = [t for t in trials if t.state == TrialState.COMPLETE]
        if len(ended) < STARTUP:
            return self._at(even_spread(trial.number, self._shift))
        running = [t for t in trials if t.state == TrialState.RUNNING and t.params]
        signs_D = np.array([1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in study.directions])
        worth = self._worth(ended, running, signs_D)
        units = self._rng.random((CANDIDATES, len(self._distributions)))
        for deviation in (0.1, 0.03):
            best = units[np.argsort(-worth(self._features(units)), kind="stable")[:8]]
            moved = np.repeat(best, 20, axis=0)
            moved = np.clip(moved + deviation * self._rng.standard_normal(moved.shape), 0.0, 1.0)
            units = np.vstack([best, moved])
        return self._at(units[int(worth(self._features(units)).argmax())])

    def _worth(
        self, ended: Sequence[FrozenTrial], running: Sequence[FrozenTrial], signs_D: Array
    ) -> Callable[[Array], Array]:
        """Return what tells the worth of candidates from their features."""
        values_ND = np.array([trial.values for trial in ended]) * signs_D
        names = sorted({name for trial in ended for name in trial.constraints})
        broken_N = [[trial.constraints.get(name, 0.0) for name in names] for trial in ended]
        margins = -np.array(broken_N).reshape(len(ended), len(names))
        is_feasible_N = (margins >= 0).all(axis=1)

        share_N = np.array([trial.user_attrs.get(SHARE, 1.0) for trial in ended[-MAX_TRIALS:]])
        seen_NF = self._features(np.array([self._units(trial.params) for trial in ended[-MAX_TRIALS:]]), share_N)
        groups = self._groups()
        kept_ND, kept_margins = values_ND[-MAX_TRIALS:], margins[-MAX_TRIALS:]
        objectives = [fit(seen_NF, groups, _without_outliers(column)) for column in kept_ND.T]
        # cut no higher than where it begins to hold: what is broken must not look as if it held
        constraints = [fit(seen_NF, groups, _without_outliers(column, highest=0.0)) for column in kept_margins.T]
        front_ND = values_ND[is_feasible_N]
        if running:
            out_NF = self._features(np.array([self._units(trial.params) for trial in running]))
            likely = _probability(constraints, out_NF) > 0.5
            expected_ND = np.array([process.predict(out_NF)[0] for process in objectives]).T
            objectives = [process.believing(out_NF) for process in objectives]
            constraints = [process.believing(out_NF) for process in constraints]
            front_ND = np.vstack([front_ND, expected_ND[likely]])
        if not is_feasible_N.any():
            return lambda points_MF: _probability(constraints, points_MF)

        feasible_ND = values_ND[is_feasible_N] if is_feasible_N.sum() > 1 else values_ND
        low_D, range_D = feasible_ND.min(axis=0), np.ptp(feasible_ND, axis=0)
        range_D = np.where(range_D > 0, range_D, 1.0)
        reference_D = low_D - BELOW * range_D
        num_objectives = len(signs_D)
        directions_LD = np.abs(self._rng.standard_normal((DIRECTIONS, num_objectives)))
        directions_LD /= np.linalg.norm(directions_LD, axis=1, keepdims=True)
        draws_SD = self._rng.standard_normal((DRAWS // 2, num_objectives))
        draws_SD = DOUBT * np.vstack([draws_SD, -draws_SD])
        heights_ND = np.maximum((front_ND - reference_D) / range_D, 0.0)
        reached_L = (heights_ND[:, None] / directions_LD).min(axis=2).max(axis=0)

        def worth(points_MF: Array) -> Array:
            mean_DM, deviation_DM = (
                np.array(part) for part in zip(*(process.predict(points_MF) for process in objectives), strict=True)
            )
            drawn_MSD = mean_DM.T[:, None] + deviation_DM.T[:, None] * draws_SD
            drawn_MSD = np.maximum((drawn_MSD - reference_D) / range_D, 0.0)
            growth_M = np.zeros(len(points_MF))
            for direction_D, reached in zip(directions_LD, reached_L, strict=True):
                beyond_MS = (drawn_MSD / direction_D).min(axis=2) ** num_objectives - reached**num_objectives
                growth_M += np.maximum(beyond_MS, 0.0).mean(axis=1)
            return growth_M * _probability(constraints, points_MF)

        return worth

    # ---- a parameter is a unit in [0, 1] among candidates, and one or several features for a model

    def _at(self, units: Array) -> dict[str, Any]:
        pairs = zip(self._distributions.items(), units.tolist(), strict=True)
        return {name: _value(unit, distribution) for (name, distribution), unit in pairs}

    def _units(self, params: Mapping[str, Any]) -> list[float]:
        return [_unit(params[name], distribution) for name, distribution in self._distributions.items()]

    def _features(self, units_NP: Array, share_N: Array | None = None) -> Array:
        """Return what the models see: share of the steps, knobs from 0 to 1, options without an order, the weights.

        The share is 1 for a trial that goes all the way, as every candidate might.
        """
        columns: list[Array] = [np.ones(len(units_NP)) if share_N is None else share_N]
        for (name, distribution), unit_N in zip(self._distributions.items(), units_NP.T, strict=True):
            if name in self._weight_names:
                continue
            if not isinstance(distribution, CategoricalDistribution):
                columns.append(unit_N)
                continue
            num = len(distribution.choices)
            place_N = np.minimum((unit_N * num).astype(int), num - 1)
            if _has_order(distribution):
                ranks = np.argsort(np.argsort(distribution.choices))
                columns.append(ranks[place_N] / max(num - 1, 1))
            else:
                columns += [np.where(place_N == i, math.sqrt(0.5), 0.0) for i in range(num)]  # 1 apart
        if self._weight_names:
            at = [list(self._distributions).index(name) for name in self._weight_names]
            columns += list(np.array([self._weights_of(row) for row in units_NP[:, at].tolist()]).T)
        return np.column_stack(columns)

    def _groups(self) -> list[int]:
        """Return a number for every feature; those of one setting, and all the weights, share theirs."""
        groups = [0]
        knobs = [name for name in self._distributions if name not in self._weight_names]
        for number, name in enumerate(knobs, start=1):
            distribution = self._distributions[name]
            is_apart = isinstance(distribution, CategoricalDistribution) and not _has_order(distribution)
            groups += [number] * (len(distribution.choices) if is_apart else 1)
        return groups + [len(knobs) + 1] * (len(self._weight_names) + 1 if self._weight_names else 0)


def even_spread(number: int, shift: Array) -> Array:
    """Return a point of an additive recurrence in the unit cube: any first few of them lie evenly.

    x_n = shift + n (p^-1, p^-2, ..) modulo 1, where p^(d + 1) = p + 1: the golden ratio in one dimension (Roberts 2018,
    "The unreasonable effectiveness of quasirandom sequences").
    """
    root = 2.0
    for _ in range(40):
        root = (1.0 + root) ** (1.0 / (len(shift) + 1))
    steps = root ** -np.arange(1.0, len(shift) + 1)
    point: Array = (shift + (number + 1) * steps) % 1.0
    return point


def _probability(constraints: Sequence[Process], points_MF: Array) -> Array:
    """Return the probability that every margin is at least 0."""
    probability_M = np.ones(len(points_MF))
    for process in constraints:
        mean_M, deviation_M = process.predict(points_MF)
        probability_M *= [0.5 * math.erfc(-x / math.sqrt(2)) for x in (mean_M / deviation_M).tolist()]
    return probability_M


def _without_outliers(values_N: Array, *, highest: float = math.inf) -> Array:
    """Return values, those far below the median raised to a bound that is at most ``highest``."""
    low, middle, high = np.quantile(values_N, [0.25, 0.5, 0.75])
    bound = min(middle - OUTLIER * (high - low), highest)
    return np.maximum(values_N, bound) if high > low else values_N


def _has_order(distribution: CategoricalDistribution) -> bool:
    return all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in distribution.choices)


def _value(unit: float, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(unit * len(distribution.choices)), len(distribution.choices) - 1)]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = distribution.low, distribution.high
    if isinstance(distribution, IntDistribution):
        num = (distribution.high - distribution.low) // distribution.step + 1
        return distribution.low + distribution.step * min(int(unit * num), num - 1)
    if distribution.log:
        return float(min(max(low * (high / low) ** unit, low), high))
    return float(min(low + unit * (high - low), high))


def _unit(value: Any, distribution: BaseDistribution) -> float:
    """Return where a value lies; of a choice or a whole number, the middle of its share."""
    if isinstance(distribution, CategoricalDistribution):
        return (float(distribution.to_internal_repr(value)) + 0.5) / len(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = float(distribution.low), float(distribution.high)
    if isinstance(distribution, IntDistribution):
        num = (distribution.high - distribution.low) // distribution.step + 1
        return (float((value - low) // distribution.step) + 0.5) / float(num)
    if distribution.log:
        return float(math.log(value / low) / math.log(high / low)) if high > low else 0.5
    return float((value - low) / (high - low)) if high > low else 0.5
