import numpy as np
import pytest
from scipy import stats

from rltune.estimators.alignprop import AlignProp
from rltune.estimators.base import ESTIMATORS

T = 12


def draws(estimator: AlignProp, count: int = 4000) -> list[int]:
    return [estimator.draw_k(T, np.random.default_rng(i)) for i in range(count)]


def test_fixed_is_k() -> None:
    assert set(draws(AlignProp(k=5, draw="fixed"), 20)) == {5}


def test_uniform_is_uniform_on_1_to_k() -> None:
    counts = np.bincount(draws(AlignProp(k=6, draw="uniform")), minlength=T + 1)
    assert counts[0] == counts[7:].sum() == 0
    assert stats.chisquare(counts[1:7]).pvalue > 1e-4


def test_gaussian_is_the_rounded_normal_cut_to_1_to_t() -> None:
    counts = np.bincount(draws(AlignProp(k=8, draw="gaussian", std=3.0)), minlength=T + 1)
    assert counts[0] == 0
    edges = np.arange(0.5, T + 1)
    mass = np.diff(stats.norm(8, 3).cdf(edges))
    assert stats.chisquare(counts[1:], mass / mass.sum() * counts.sum()).pvalue > 1e-4


def test_k_is_drawn_once_and_makes_the_last_steps_active() -> None:
    plan = AlignProp(k=6).plan(T, np.random.default_rng(3))
    k = AlignProp(k=6).draw_k(T, np.random.default_rng(3))
    assert plan.active == frozenset(range(T - k, T))
    assert plan.is_through_latent


@pytest.mark.parametrize("k", [0, T + 1])
def test_k_beyond_the_chain_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be in \[1, {T}\], got {k}"):
        AlignProp(k=k, draw="fixed").plan(T, np.random.default_rng(0))


def test_it_is_found_by_name() -> None:
    assert ESTIMATORS.get("alignprop")(k=2, draw="fixed", std=1.0) == AlignProp(k=2, draw="fixed", std=1.0)
