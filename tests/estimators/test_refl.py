from collections import Counter

import numpy as np
import pytest
from scipy import stats

from rltune.estimators.refl import ReFL
from tests.toys import line_toy, make_round, make_table


@pytest.mark.parametrize(
    ("window", "num_steps", "steps"),
    [(0.25, 40, range(30, 40)), (1.0, 6, range(6)), (0.5, 4, range(2, 4)), (0.0, 4, range(3, 4)), (0.25, 1, range(1))],
)
def test_the_step_is_uniform_over_the_last_ones(window: float, num_steps: int, steps: range) -> None:
    """The published code draws from 30..39 of 40."""
    rng = np.random.default_rng(0)
    plans = [ReFL(window).plan(num_steps, rng) for _ in range(3000)]
    for plan in plans:
        assert plan.active == {plan.scored}
        assert not plan.is_through_latent
    counts = Counter(plan.scored for plan in plans)
    assert set(counts) == set(steps)
    assert len(steps) == 1 or stats.chisquare([counts[step] for step in steps]).pvalue > 1e-4


def test_the_chain_ends_at_the_step_and_only_it_has_gradient() -> None:
    num_steps, estimator = 8, ReFL(window=0.5)
    timesteps = make_table(num_steps).timesteps_T.tolist()
    for seed in range(15):
        toy = line_toy()
        estimator.train(make_round(toy, estimator, num_steps=num_steps, num_images=1, num_kept=1, seed=seed))
        step = estimator.plan(num_steps, np.random.default_rng(seed)).scored
        assert step is not None
        assert [call.t for call in toy.calls] == timesteps[: step + 1]
        assert [call.has_grad for call in toy.calls] == [False] * step + [True]


def test_a_window_above_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window must be in \[0, 1\], got 1.5"):
        ReFL(1.5).check(10)
