from collections import Counter

import numpy as np
import pytest
from scipy import stats

from rltune.estimators.drtune import DRTune
from tests.toys import line_toy, make_round, make_table


@pytest.mark.parametrize(
    ("k", "early_stop", "num_steps"), [(3, 0.4, 10), (2, 0.0, 7), (1, 1.0, 4), (4, 0.1, 10), (3, 0.5, 9), (2, 0.04, 10)]
)
def test_stop_and_first_step_are_uniform_and_the_spacing_equal(k: int, early_stop: float, num_steps: int) -> None:
    """Every pair of a stop in the last share of the chain and a first step that leaves room for the others."""
    estimator = DRTune(k=k, early_stop=early_stop)
    estimator.check(num_steps)
    width = round(early_stop * num_steps)
    mass: dict[tuple[int | None, int], float] = {}
    for scored in range(num_steps - width, num_steps) if width else [None]:
        num_run = num_steps if scored is None else scored + 1
        firsts = range(num_run - (k - 1) * (num_run // k))
        mass |= {(scored, first): 1 / max(1, width) / len(firsts) for first in firsts}
    rng = np.random.default_rng(0)
    counts: Counter[tuple[int | None, int]] = Counter()
    for _ in range(4000):
        plan = estimator.plan(num_steps, rng)
        steps, num_run = sorted(plan.active), num_steps if plan.scored is None else plan.scored + 1
        assert len(steps) == k
        assert set(np.diff(steps)) <= {num_run // k}
        assert 0 <= steps[0] <= steps[-1] < num_run
        assert not plan.is_through_latent
        counts[plan.scored, steps[0]] += 1
    assert set(counts) <= set(mass)
    observed, expected = [counts[pair] for pair in mass], [4000 * share for share in mass.values()]
    assert sum(mass.values()) == pytest.approx(1)
    assert stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.parametrize("early_stop", [0.0, 0.5])
def test_the_network_runs_to_the_stop_with_gradient_at_the_drawn_steps_alone(early_stop: float) -> None:
    num_steps, estimator = 8, DRTune(k=2, early_stop=early_stop)
    timesteps = make_table(num_steps).timesteps_T.tolist()
    for seed in range(15):
        toy = line_toy()
        estimator.train(make_round(toy, estimator, num_steps=num_steps, num_images=1, num_kept=2, seed=seed))
        plan = estimator.plan(num_steps, np.random.default_rng(seed))
        num_run = num_steps if plan.scored is None else plan.scored + 1
        assert [call.t for call in toy.calls] == timesteps[:num_run]
        assert {k for k, call in enumerate(toy.calls) if call.has_grad} == plan.active


@pytest.mark.parametrize("early_stop", [0.0, 0.1, 0.4, 1.0])
def test_the_greatest_k_fits_the_shortest_chain(early_stop: float) -> None:
    num_steps = 10
    shortest = {0.0: 10, 0.1: 10, 0.4: 7, 1.0: 1}[early_stop]
    estimator = DRTune(k=shortest, early_stop=early_stop)
    estimator.check(num_steps)
    for seed in range(50):
        assert len(estimator.plan(num_steps, np.random.default_rng(seed)).active) == shortest
    with pytest.raises(ValueError, match=rf"k must be in \[1, {shortest}\], got {shortest + 1}"):
        DRTune(k=shortest + 1, early_stop=early_stop).check(num_steps)


def test_early_stop_above_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"early_stop must be in \[0, 1\], got 1.1"):
        DRTune(k=1, early_stop=1.1).check(10)
