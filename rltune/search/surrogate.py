"""The ``surrogate`` sampler: a model of every objective and constraint over knobs and reward weights together.

Each is a small Gaussian process, and one more says whether trials end well at all. The next trial is where the
hypervolume is expected to grow most, times the probability that every constraint holds and that trials end well there.
That expectation is a mean over directions: the hypervolume of a set is, up to a constant, the mean over directions of
the positive orthant of the largest min_d (y_d / direction_d)^D in the set (Golovin and Zhang 2020, arXiv:2006.04655,
the hypervolume scalarisation), so that what one more point adds takes no more than a maximum in every direction.

N: trials. M: candidates. D: objectives. L: directions. S: draws. F: features.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rltune.search.features import Conditions, Features
from rltune.search.gaussian import Array, Process, fit

STARTUP = 8
"""Ended trials before the first model; until then trials are spread evenly."""
FEWEST = 3
"""Trials that ended well before objectives are modelled; with fewer, the search is for what does not fail."""
SURE = 0.75
"""Share of trials that has to end well where the next one is to be: one that fails costs as much as any other."""
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
        distributions: Of every parameter of the search; left out, of those that every trial so far had.
        weight_names: Parameters that stand for weights.
        weights_of: Parameter values -> the weights that they stand for, which the models see in their place.
        conditions: Of parameters that count only where each of these choices has taken one of these options.
        first_seed: Of the search where it was started, if this is a resume with another ``seed``: its first trials lie
            evenly beside those that it has.
    """

    def __init__(
        self,
        seed: int,
        distributions: Mapping[str, BaseDistribution] | None = None,
        weight_names: Sequence[str] = (),
        weights_of: Callable[[Sequence[float]], Sequence[float]] = list,
        conditions: Mapping[str, Conditions] | None = None,
        first_seed: int | None = None,
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=seed)
        self._distributions = None if distributions is None else dict(distributions)
        self._common = IntersectionSearchSpace()
        self._weight_names = list(weight_names)
        self._weights_of = weights_of
        self._conditions = conditions
        self._shift = self._rng.random(len(distributions or ()))
        if first_seed is not None:
            self._shift = np.random.default_rng(first_seed).random(len(self._shift))

    def reseed_rng(self) -> None:
        """Start from another seed, as Optuna asks of the samplers of parallel workers."""
        self._rng = np.random.default_rng()
        self._random.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return every parameter: they are drawn together."""
        return self._common.calculate(study) if self._distributions is None else self._distributions

    def sample_independent(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        """Return a random value; asked for where a parameter has one value, or not every trial has it."""
        return self._random.sample_independent(study, trial, name, distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the parameters of the next trial."""
        if not search_space:
            return {}
        space = Features(search_space, self._weight_names, self._weights_of, self._conditions)
        if len(self._shift) != len(search_space):
            self._shift = self._rng.random(len(search_space))
        trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number and space.has(t.params)]
        ended = [t for t in trials if t.state == TrialState.COMPLETE]
        failed = [t for t in trials if t.state == TrialState.FAIL]
        running = [t for t in trials if t.state == TrialState.RUNNING]
        known = {space.tried(t.params) for t in (*ended, *failed, *running)}
        if len(ended) + len(failed) < STARTUP:
            numbers = range(trial.number, trial.number + STARTUP * CANDIDATES, STARTUP)
            return _first_new((space.values(even_spread(n, self._shift)) for n in numbers), space, known)
        signs_D = np.array([1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in study.directions])
        ends = [_ends(space, ended, failed)] if failed else []
        worth = self._worth(space, ended, running, signs_D, ends) if len(ended) >= FEWEST else _surest(ends[0])
        anywhere = units = self._rng.random((CANDIDATES, len(search_space)))
        for deviation in (0.1, 0.03):
            best = units[np.argsort(-worth(space.columns(units)), kind="stable")[:8]]
            moved = np.repeat(best, 20, axis=0)
            moved = np.clip(moved + deviation * self._rng.standard_normal(moved.shape), 0.0, 1.0)
            units = np.vstack([best, moved])
        best_first = (
            space.values(points[i])
            for points in (units, anywhere)  # where options alone are searched, all that is near was tried soon
            for i in np.argsort(-worth(space.columns(points)), kind="stable")
        )
        return _first_new(best_first, space, known)

    def _worth(
        self,
        space: Features,
        ended: Sequence[FrozenTrial],
        running: Sequence[FrozenTrial],
        signs_D: Array,
        ends: list[Process],
    ) -> Callable[[Array], Array]:
        """Return what tells the worth of candidates from their features; ``ends`` is one more constraint."""
        values_ND = np.array([trial.values for trial in ended]) * signs_D
        names = sorted({name for trial in ended for name in trial.constraints})
        broken_N = [[trial.constraints.get(name, 0.0) for name in names] for trial in ended]
        margins = -np.array(broken_N).reshape(len(ended), len(names))
        is_feasible_N = (margins >= 0).all(axis=1)

        share_N = np.array([trial.user_attrs.get(SHARE, 1.0) for trial in ended[-MAX_TRIALS:]])
        seen_NF = space.columns(np.array([space.units(trial.params) for trial in ended[-MAX_TRIALS:]]), share_N)
        groups = space.groups()
        kept_ND, kept_margins = values_ND[-MAX_TRIALS:], margins[-MAX_TRIALS:]
        objectives = [fit(seen_NF, groups, _without_outliers(column)) for column in kept_ND.T]
        # cut no higher than where it begins to hold: what is broken must not look as if it held
        constraints = [fit(seen_NF, groups, _without_outliers(column, highest=0.0)) for column in kept_margins.T] + ends
        front_ND = values_ND[is_feasible_N]
        if running:
            out_NF = space.columns(np.array([space.units(trial.params) for trial in running]))
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


def _first_new(candidates: Iterator[dict[str, Any]], space: Features, known: Collection[Any]) -> dict[str, Any]:
    """Return the first that no trial has tried, which would only say the same again; if all were, the first."""
    first = next(candidates)
    rest = itertools.chain([first], candidates)
    return next((params for params in rest if space.tried(params) not in known), first)


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


def _ends(space: Features, ended: Sequence[FrozenTrial], failed: Sequence[FrozenTrial]) -> Process:
    """Return a process of whether trials end well: the share that does less ``SURE``, of every trial 1 or 0.

    Its noise is what keeps a failure that was no property of the settings, as of a node that was lost, from closing
    what the trials around it have shown to be open.
    """
    trials = sorted((*ended, *failed), key=lambda trial: trial.number)[-MAX_TRIALS:]
    is_ended_N = np.array([1.0 if trial.state == TrialState.COMPLETE else 0.0 for trial in trials])
    seen_NF = space.columns(np.array([space.units(trial.params) for trial in trials]))
    return fit(seen_NF, space.groups(), is_ended_N - SURE)


def _surest(ends: Process) -> Callable[[Array], Array]:
    """Return what ranks candidates by the probability that they end well, also where it is next to nothing."""

    def rank(points_MF: Array) -> Array:
        mean_M, deviation_M = ends.predict(points_MF)
        return mean_M / deviation_M

    return rank


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
