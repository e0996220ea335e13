"""Coverage by simulation with known truth, and scipy.stats, which computes the same another way."""

import numpy as np
import pytest
from scipy import stats

from rltune.intervals import difference, half_width, over_prompts_and_seeds, standard_error


def test_of_a_single_value_nothing_is_known() -> None:
    assert standard_error([0.3]) is None
    assert half_width(None, 0) is None
    assert half_width(0.0, 0) is None  # as runs of before recorded it
    assert over_prompts_and_seeds([[0.3]]) == (0.3, None)


def test_the_interval_of_a_mean_is_scipys() -> None:
    values_P = np.random.default_rng(0).normal(1.0, 2.0, 6)
    expected = stats.ttest_1samp(values_P, 0.0).confidence_interval(0.95)
    half = half_width(standard_error(values_P), len(values_P) - 1)
    assert half == pytest.approx((expected.high - expected.low) / 2, rel=1e-9)
    mean, half = over_prompts_and_seeds(values_P[None])  # of one seed, over prompts alone
    assert (mean - half, mean + half) == pytest.approx(tuple(expected), rel=1e-9)  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("num_prompts", [2, 4, 6, 16])
def test_an_interval_over_prompts_covers_the_truth_as_often_as_it_says(num_prompts: int) -> None:
    values_NP = np.random.default_rng(num_prompts).normal(0.3, 1.0, (20_000, num_prompts))
    halves_N = [half_width(standard_error(values_P), num_prompts - 1) for values_P in values_NP]
    covered = np.mean(np.abs(values_NP.mean(axis=1) - 0.3) <= np.array(halves_N))
    # four standard errors of a share of 20,000; 1.96 standard errors cover 0.70, 0.86, 0.89 and 0.93
    assert covered == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / 20_000) ** 0.5)


@pytest.mark.parametrize(
    ("over_seeds", "over_prompts", "both", "high"),
    [
        (1.0, 0.0, 0.0, 0.97),  # seeds alone: exact
        (0.0, 1.0, 0.0, 0.97),  # prompts alone: exact
        (0.3, 1.0, 0.3, 0.98),
        (0.0, 1.0, 1.0, 0.99),  # what is peculiar to both counts twice
    ],
)
def test_an_interval_over_prompts_and_seeds_covers_the_truth_at_least_as_often(
    over_seeds: float, over_prompts: float, both: float, high: float
) -> None:
    rng, num = np.random.default_rng(1), 3_000
    num_seeds, num_prompts = 3, 16
    covered = 0
    for _ in range(num):
        values_SP = (
            0.3
            + over_seeds * rng.standard_normal((num_seeds, 1))
            + over_prompts * rng.standard_normal((1, num_prompts))
            + both * rng.standard_normal((num_seeds, num_prompts))
        )
        mean, half = over_prompts_and_seeds(values_SP)
        assert half is not None
        covered += abs(mean - 0.3) <= half
    # 0.95 less four standard errors of a share of 3,000; 1.96 standard errors cover 0.81 where seeds dominate
    assert 0.934 <= covered / num <= high


def test_equal_values_have_no_width() -> None:
    assert over_prompts_and_seeds(np.zeros((3, 4))) == (0.0, 0.0)


def test_a_difference_is_paired_by_prompt_and_not_by_seed() -> None:
    ours, others = np.array([[1.0, 2.0, 6.0]]), np.array([[0.5, 1.8, 5.0]])
    found, half = difference(ours, others)  # of a seed each: the mean of paired differences
    apart_P = np.array([0.5, 0.2, 1.0])
    assert found == pytest.approx(apart_P.mean())
    assert half == pytest.approx(half_width(float(apart_P.std(ddof=1)) / 3**0.5, 2))
    # prompts that do not differ: Welch's test over seeds (1947)
    seeds, other_seeds = np.array([1.0, 2.0, 4.0]), np.array([0.0, 5.0])
    found, half = difference(np.repeat(seeds[:, None], 4, axis=1), np.repeat(other_seeds[:, None], 4, axis=1))
    welch = stats.ttest_ind(seeds, other_seeds, equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert found == pytest.approx(seeds.mean() - other_seeds.mean())
    assert half == pytest.approx((interval.high - interval.low) / 2)
    assert difference([[1.0]], [[2.0]]) == (-1.0, None)
