"""Fronts and ranks against the definition of dominance, pair by pair."""

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rltune.pareto.front import as_points, non_dominated, ranks

# Few distinct values, so that ties and copies are common.
points = st.tuples(st.integers(0, 12), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-2, 2).map(float))
)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@settings(deadline=None)
@given(points)
def test_the_front_is_what_nothing_dominates(values_ND: np.ndarray) -> None:
    expected = [not any(dominates(b, a) for b in values_ND) for a in values_ND]
    assert non_dominated(values_ND).tolist() == expected


@pytest.mark.slow
@settings(deadline=None)
@given(points)
def test_a_rank_is_the_longest_chain_of_dominators(values_ND: np.ndarray) -> None:
    def depth(a: np.ndarray) -> int:
        return max((1 + depth(b) for b in values_ND if dominates(b, a)), default=0)

    assert ranks(values_ND).tolist() == [depth(a) for a in values_ND]


@pytest.mark.slow
@settings(deadline=None)
@given(points)
def test_order_and_scale_do_not_matter(values_ND: np.ndarray) -> None:
    order = np.random.default_rng(0).permutation(len(values_ND))
    assert non_dominated(values_ND)[order].tolist() == non_dominated(3 * values_ND[order] + 7).tolist()


def test_all_copies_of_a_front_point_are_on_the_front() -> None:
    assert non_dominated([[1, 0], [1, 0], [0, 1], [0, 0], [0, 0]]).tolist() == [True, True, True, False, False]
    assert ranks([[1, 0], [1, 0], [0, 1], [0, 0], [0, 0]]).tolist() == [0, 0, 0, 1, 1]


def test_the_front_is_optunas() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize"] * 3)
    values_ND = np.random.default_rng(0).integers(0, 5, (40, 3)).astype(float)
    study.add_trials([optuna.trial.create_trial(values=row.tolist()) for row in values_ND])
    assert np.flatnonzero(non_dominated(values_ND)).tolist() == sorted(trial.number for trial in study.best_trials)


def test_one_objective_has_its_maxima() -> None:
    assert non_dominated([[1], [3], [2], [3]]).tolist() == [False, True, False, True]


@pytest.mark.parametrize("bad", [[1.0, 2.0], [[]], [[1.0, float("nan")]], [[float("inf"), 1.0]]])
def test_values_must_be_a_matrix_of_finite_numbers(bad: object) -> None:
    with pytest.raises(ValueError, match="values must be"):
        as_points(bad)
