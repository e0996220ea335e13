import itertools

import numpy as np
import pytest
from scipy import stats

from rltune.estimators.alignprop import AlignProp
from rltune.estimators.base import ESTIMATORS
from tests.toys import line_toy, make_round, make_table

T = 12


def draws(estimator: AlignProp, count: int = 4000) -> list[int]:
    return [estimator.draw_k(T, np.random.default_rng(i)) for i in range(count)]


def test_fixed_is_k() -> None:
    assert set(draws(AlignProp(k=5, draw="fixed"), 20)) == {5}


@pytest.mark.slow
def test_uniform_is_uniform_on_1_to_k() -> None:
    counts = np.bincount(draws(AlignProp(k=6, draw="uniform")), minlength=T + 1)
    assert counts[0] == counts[7:].sum() == 0
    assert stats.chisquare(counts[1:7]).pvalue > 1e-4


@pytest.mark.slow
def test_uniform_is_over_the_whole_chain_by_default() -> None:
    counts = np.bincount(draws(AlignProp()), minlength=T + 1)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("k", "mean", "std"), [(8, 8, 3.0), (None, 8, 5.0), (2, 2, 5.0)])
def test_gaussian_is_the_rounded_normal_cut_to_1_to_t(k: int | None, mean: int, std: float) -> None:
    counts = np.bincount(draws(AlignProp(k=k, draw="gaussian", std=std)), minlength=T + 1)
    assert counts[0] == 0
    edges = np.arange(0.5, T + 1)
    mass = np.diff(stats.norm(mean, std).cdf(edges))
    assert stats.chisquare(counts[1:], mass / mass.sum() * counts.sum()).pvalue > 1e-4


def test_gaussian_s_mean_fits_a_chain_shorter_than_8() -> None:
    estimator = AlignProp(draw="gaussian", std=0.1)
    estimator.check(5)
    assert {estimator.draw_k(5, np.random.default_rng(i)) for i in range(20)} == {5}


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_per_step_draws_every_step_by_itself(num_steps: int) -> None:
    """Every set of steps is as likely as its steps' own coins make it, step i with (i + 1) / (T + 1), none left out."""
    rng = np.random.default_rng(0)
    estimator = AlignProp(draw="per_step")
    drawn = [estimator.plan(num_steps, rng).active for _ in range(6000)]
    counts, mass = [], []
    for coins in itertools.product([False, True], repeat=num_steps):
        share = [(i + 1) / (num_steps + 1) for i in range(num_steps)]
        active = frozenset(i for i in range(num_steps) if coins[i])
        counts.append(sum(plan == active for plan in drawn))
        mass.append(np.prod([p if coin else 1 - p for p, coin in zip(share, coins, strict=True)]))
    assert counts[0] == 0  # the empty set is drawn again
    expected = np.array(mass[1:]) / sum(mass[1:]) * len(drawn)
    assert num_steps == 1 or stats.chisquare(counts[1:], expected).pvalue > 1e-4


def test_per_step_gives_late_steps_gradient_more_often() -> None:
    """Over T = 12 a draw is empty once in 50 000 times; 25 of TRL's 50 steps carry gradient on average."""
    rng = np.random.default_rng(1)
    drawn = [AlignProp(draw="per_step").plan(T, rng).active for _ in range(4000)]
    for i in range(T):
        count, expected = sum(i in active for active in drawn), len(drawn) * (i + 1) / (T + 1)
        assert stats.chisquare([count, len(drawn) - count], [expected, len(drawn) - expected]).pvalue > 1e-5
    mean = np.mean([len(AlignProp(draw="per_step").plan(50, rng).active) for _ in range(2000)])
    spread = np.sqrt(sum(i * (51 - i) / 51**2 for i in range(1, 51)) / 2000)
    assert mean == pytest.approx(25, abs=5 * spread)


@pytest.mark.parametrize(
    "estimator", [AlignProp(), AlignProp(draw="gaussian"), AlignProp(draw="per_step"), AlignProp(k=3, draw="fixed")]
)
def test_the_network_runs_with_gradient_at_the_drawn_steps_alone(estimator: AlignProp) -> None:
    timesteps = make_table(T).timesteps_T.tolist()
    for seed in range(15):
        toy = line_toy()
        estimator.train(make_round(toy, estimator, num_steps=T, num_images=1, num_kept=T, seed=seed))
        active = estimator.plan(T, np.random.default_rng(seed)).active
        assert [call.t for call in toy.calls] == timesteps
        assert [k for k, call in enumerate(toy.calls) if call.has_grad] == sorted(active)


def test_k_is_drawn_once_and_makes_the_last_steps_active() -> None:
    plan = AlignProp(k=6).plan(T, np.random.default_rng(3))
    k = AlignProp(k=6).draw_k(T, np.random.default_rng(3))
    assert plan.active == frozenset(range(T - k, T))
    assert plan.is_through_latent
    assert plan.scored is None


def test_all_images_of_a_round_share_a_draw() -> None:
    toy, estimator = line_toy(), AlignProp()
    estimator.train(make_round(toy, estimator, num_steps=T, num_images=6, micro_batch=1, num_kept=T, seed=2))
    depths = [sum(call.has_grad for call in toy.calls[i * T : (i + 1) * T]) for i in range(6)]
    assert len(toy.calls) == 6 * T
    assert set(depths) == {estimator.draw_k(T, np.random.default_rng(2))}


@pytest.mark.parametrize("k", [0, T + 1])
@pytest.mark.parametrize("draw", ["fixed", "uniform", "gaussian"])
def test_k_beyond_the_chain_is_refused(k: int, draw: str) -> None:
    estimator = AlignProp(k=k, draw=draw)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"k must be in \[1, {T}\], got {k}"):
        estimator.check(T)
    with pytest.raises(ValueError, match=rf"k must be in \[1, {T}\], got {k}"):
        estimator.plan(T, np.random.default_rng(0))


def test_fixed_needs_k() -> None:
    with pytest.raises(ValueError, match="needs k"):
        AlignProp(draw="fixed").check(T)


def test_an_unknown_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="draw"):
        AlignProp(draw="unifrom").check(T)  # type: ignore[arg-type]


def test_it_is_found_by_name() -> None:
    assert ESTIMATORS.get("alignprop")(k=2, draw="fixed", std=1.0) == AlignProp(k=2, draw="fixed", std=1.0)
