"""A search space as the models of the ``surrogate`` sampler see it.

A parameter is a number in [0, 1] among candidates, and one or several features for a model. N: points. P: parameters.
F: features. C: choices.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from rltune.config.distributions import is_same
from rltune.search.gaussian import Array
from rltune.search.optuna_private import contains

Conditions = Sequence[tuple[str, Sequence[Any]]]
"""Choices, each with the options that it must have taken."""


class Features:
    """Between parameters, the unit cube and features.

    Args:
        distributions: Of every parameter.
        weight_names: Parameters that stand for weights.
        weights_of: Parameter values -> the weights that they stand for, which the models see in their place.
        conditions: Of parameters that count only where each of these choices has taken one of these options.
    """

    def __init__(
        self,
        distributions: Mapping[str, BaseDistribution],
        weight_names: Sequence[str],
        weights_of: Callable[[Sequence[float]], Sequence[float]],
        conditions: Mapping[str, Conditions] | None = None,
    ) -> None:
        self._distributions = dict(distributions)
        self._conditions = {name: kept for name, kept in (conditions or {}).items() if name in distributions}
        self._weight_names = [name for name in weight_names if name in distributions]
        self._weights_of = weights_of

    def has(self, params: Mapping[str, Any]) -> bool:
        """Whether parameters are those of this space, each where its distribution is."""
        return set(params) >= set(self._distributions) and all(
            contains(distribution, params[name]) for name, distribution in self._distributions.items()
        )

    def values(self, units: Array) -> dict[str, Any]:
        """Return the parameters that stand at a point of the unit cube."""
        pairs = zip(self._distributions.items(), units.tolist(), strict=True)
        return {name: _value(unit, distribution) for (name, distribution), unit in pairs}

    def units(self, params: Mapping[str, Any]) -> list[float]:
        """Return the point of the unit cube at which parameters stand."""
        return [_unit(params[name], distribution) for name, distribution in self._distributions.items()]

    def tried(self, params: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what a trial of these parameters is: the same for two that differ in what does not count."""
        units_1P = np.array([self.units(params)])
        return tuple((name, params[name]) for name in self._distributions if self._counts(name, units_1P)[0])

    def columns(self, units_NP: Array, share_N: Array | None = None) -> Array:
        """Return what the models see: share of the steps, knobs from 0 to 1, options without an order, the weights.

        The share is 1 for a trial that goes all the way, as every candidate might. Where a parameter does not count, it
        is the same for all.
        """
        columns: list[Array] = [np.ones(len(units_NP)) if share_N is None else share_N]
        for (name, distribution), unit_N in zip(self._distributions.items(), units_NP.T, strict=True):
            if name in self._weight_names:
                continue
            counts_N = self._counts(name, units_NP)
            if not isinstance(distribution, CategoricalDistribution):
                columns.append(np.where(counts_N, unit_N, 0.5))
                continue
            num, place_N = len(distribution.choices), _place(unit_N, distribution)
            if _has_order(distribution):
                ranks = np.argsort(np.argsort(distribution.choices))
                columns.append(np.where(counts_N, ranks[place_N] / max(num - 1, 1), 0.5))
            else:
                columns += [np.where(counts_N & (place_N == i), math.sqrt(0.5), 0.0) for i in range(num)]  # 1 apart
        if self._weight_names:
            at = [list(self._distributions).index(name) for name in self._weight_names]
            columns += list(np.array([self._weights_of(row) for row in units_NP[:, at].tolist()]).T)
        return np.column_stack(columns)

    def _counts(self, name: str, units_NP: Array) -> npt.NDArray[np.bool_]:
        """Return where a parameter counts, and what its condition names does too."""
        counts_N = np.ones(len(units_NP), dtype=bool)
        for parent, options in self._conditions.get(name, ()):
            distribution = self._distributions[parent]
            assert isinstance(distribution, CategoricalDistribution)
            place_N = _place(units_NP[:, list(self._distributions).index(parent)], distribution)
            suits_C = np.array([any(is_same(choice, one) for one in options) for choice in distribution.choices])
            counts_N &= suits_C[place_N] & self._counts(parent, units_NP)
        return counts_N

    def groups(self) -> list[int]:
        """Return a number for every feature; those of one setting, and all the weights, share theirs."""
        groups = [0]
        knobs = [name for name in self._distributions if name not in self._weight_names]
        for number, name in enumerate(knobs, start=1):
            distribution = self._distributions[name]
            is_apart = isinstance(distribution, CategoricalDistribution) and not _has_order(distribution)
            groups += [number] * (len(distribution.choices) if is_apart else 1)
        return groups + [len(knobs) + 1] * (len(self._weight_names) + 1 if self._weight_names else 0)


def _place(unit_N: Array, distribution: CategoricalDistribution) -> npt.NDArray[np.int_]:
    """Return the numbers of the choices that stand at points of [0, 1]."""
    place_N: npt.NDArray[np.int_] = np.minimum(
        (unit_N * len(distribution.choices)).astype(int), len(distribution.choices) - 1
    )
    return place_N


def _has_order(distribution: CategoricalDistribution) -> bool:
    return all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in distribution.choices)


def _value(unit: float, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(unit * len(distribution.choices)), len(distribution.choices) - 1)]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.step is not None:
        num = _num_steps(distribution)
        return min(low + distribution.step * min(int(unit * num), num - 1), high)
    if distribution.log:
        return float(min(max(low * (high / low) ** unit, low), high))
    return float(min(low + unit * (high - low), high))


def _unit(value: Any, distribution: BaseDistribution) -> float:
    """Return where a value lies; of a choice or a number in steps, the middle of its share."""
    if isinstance(distribution, CategoricalDistribution):
        return (float(distribution.to_internal_repr(value)) + 0.5) / len(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = float(distribution.low), float(distribution.high)
    if distribution.step is not None:
        return (float(round((value - low) / distribution.step)) + 0.5) / float(_num_steps(distribution))
    if distribution.log:
        return float(math.log(value / low) / math.log(high / low)) if high > low else 0.5
    return float((value - low) / (high - low)) if high > low else 0.5


def _num_steps(distribution: IntDistribution | FloatDistribution) -> int:
    num_steps: int = round((distribution.high - distribution.low) / distribution.step)
    return num_steps + 1
