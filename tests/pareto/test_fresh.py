"""Bias and coverage by simulation with known truth; the volume against the exact one."""

import numpy as np
import pytest
from scipy.special import stdtr

from rltune.intervals import half_width
from rltune.pareto.fresh import fresh_volume, prob_non_dominated, volume_as_chosen, volume_by_prompt
from rltune.pareto.front import non_dominated
from rltune.pareto.hypervolume import hypervolume


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
def test_of_the_values_that_chose_it_is_their_hypervolume(num_objectives: int) -> None:
    rng = np.random.default_rng(num_objectives)
    for _ in range(20):
        points_ND = rng.uniform(-0.3, 2.0, (int(rng.integers(1, 9)), num_objectives))
        expected = hypervolume(points_ND, np.zeros(num_objectives))
        assert volume_as_chosen(points_ND, points_ND[None])[0] == pytest.approx(expected, rel=1e-12)


def test_the_chosen_order_stands_whatever_the_values_say() -> None:
    chosen = np.array([[3.0, 1.0], [1.0, 2.0]])  # the first is wider, the second higher: 1 x 2 and, below it, 3 x 1
    fresh = np.array([[[0.5, 0.6], [0.8, 0.9]]])  # now the second is both
    # slices along the second objective: from 0.9 down to 0.6 the second's width, from 0.6 to 0 the first's
    assert volume_as_chosen(chosen, fresh) == pytest.approx([(0.9 - 0.6) * 0.8 + 0.6 * 0.5])


def test_points_chosen_below_the_reference_and_no_points_count_nothing() -> None:
    assert volume_as_chosen(np.array([[-0.1, 5.0]]), np.ones((2, 1, 2))).tolist() == [0.0, 0.0]
    assert fresh_volume(np.array([[0.0, 1.0]]), np.zeros((3, 1, 2))).value == 0.0


def test_of_a_single_prompt_there_is_no_interval() -> None:
    found = fresh_volume(np.array([[2.0, 2.0]]), np.array([[[0.5, 1.0]]]))
    assert (found.value, found.half_width, found.half_width_without_effect) == (3.0, None, None)


def test_of_one_objective_it_is_the_leaders_mean_with_students_interval() -> None:
    gains_P = np.array([0.1, 0.5, 0.3, -0.2])
    found = fresh_volume(np.array([[1.0], [1.4]]), np.stack([np.zeros(4), gains_P], axis=1)[:, :, None])
    assert found.value == pytest.approx(1 + gains_P.mean(), rel=1e-12)
    expected = half_width(float(gains_P.std(ddof=1) / 2), 3)
    assert found.half_width == pytest.approx(expected, rel=1e-9)
    assert found.half_width_without_effect == pytest.approx(expected, rel=1e-9)  # a mean's error is that of any shift


def test_what_two_objectives_have_in_common_on_a_prompt_is_no_volume() -> None:
    gains_PD = np.random.default_rng(0).normal(0.3, 1.0, (6, 2)) + np.random.default_rng(1).normal(0, 1.0, (6, 1))
    found = fresh_volume(np.array([[1.5, 1.5]]), gains_PD[:, None])
    # the mean of x times that of y is their product and the P-th part of their covariance: unbiased without it, which
    # is the mean over pairs of different prompts
    x_P, y_P = 1 + gains_PD.T
    pairs = [x_P[i] * y_P[j] for i in range(6) for j in range(6) if i != j]
    assert found.value == pytest.approx(np.mean(pairs), rel=1e-9)


def test_without_effect_the_interval_is_that_of_the_errors_alone() -> None:
    noise_PD = 0.01 * np.random.default_rng(2).normal(0.0, 1.0, (8, 2))
    found = fresh_volume(np.array([[5.0, 2.0]]), (np.array([4.0, 1.0]) + noise_PD - noise_PD.mean(axis=0))[:, None])
    assert found.value == pytest.approx(5 * 2, rel=1e-3)
    # slopes of x * y: y and x, which are 2 and 5, and both 1 without effect; straight to 1 % of noise
    for half, slopes in ((found.half_width, (2, 5)), (found.half_width_without_effect, (1, 1))):
        expected = half_width(float((noise_PD @ slopes).std(ddof=1)) / 8**0.5, 7)
        assert half == pytest.approx(expected, rel=1e-2)


def test_what_single_prompts_say_comes_to_the_volume_and_its_error() -> None:
    gains_PND = np.random.default_rng(5).normal(0.3, 0.5, (7, 3, 2))
    chosen_ND = np.array([[1.0, 1.0], [1.6, 0.8], [0.9, 1.5]])
    found, said_P = fresh_volume(chosen_ND, gains_PND), volume_by_prompt(chosen_ND, gains_PND)
    assert said_P.shape == (7,)
    assert said_P.mean() == pytest.approx(found.value, rel=1e-12)
    assert half_width(float(said_P.std(ddof=1) / 7**0.5), 6) == pytest.approx(found.half_width, rel=1e-12)
    only = gains_PND[:1]
    assert volume_by_prompt(chosen_ND, only).tolist() == [fresh_volume(chosen_ND, only).value]


@pytest.mark.parametrize("num_prompts", [2, 4, 40])
def test_of_two_points_the_probability_is_students(num_prompts: int) -> None:
    rng = np.random.default_rng(num_prompts)
    gains_PN = rng.normal(0.0, 1.0, (num_prompts, 2)) + rng.normal(0.0, 5.0, (num_prompts, 1))  # paired: 5 cancels
    gains_PN[:, 0] += 1.0 / num_prompts**0.5 - (gains_PN[:, 0] - gains_PN[:, 1]).mean()
    apart_P = gains_PN[:, 0] - gains_PN[:, 1]
    expected = stdtr(num_prompts - 1, apart_P.mean() / (apart_P.std(ddof=1) / num_prompts**0.5))
    assert 0.6 < expected < 0.95
    # four standard deviations of a share of 2,000 draws
    assert prob_non_dominated(gains_PN[:, :, None]) == pytest.approx([expected, 1 - expected], abs=4 * 0.5 / 2000**0.5)


def test_what_is_certain_has_probability_one_or_none_and_copies_do_not_dominate_each_other() -> None:
    noise_PD = 0.01 * np.random.default_rng(0).normal(0.0, 1.0, (8, 2))
    places = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, -1.0], [0.0, 0.0]])
    gains_PND = places + noise_PD[:, None]  # the same error for all: nobody's place is in doubt
    assert prob_non_dominated(gains_PND).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="two prompts at least, got 1"):
        prob_non_dominated(gains_PND[:1])


def test_what_objectives_of_a_prompt_have_in_common_is_kept() -> None:
    """Two points that differ by as much in both objectives: one is ahead in both, or the other is."""
    apart_P = np.random.default_rng(3).normal(0.0, 1.0, 16)
    gains_PND = np.stack([np.stack([apart_P, apart_P], axis=1), np.zeros((16, 2))], axis=1)
    assert prob_non_dominated(gains_PND).sum() == pytest.approx(1.0)  # unrelated ones would come to 1.5


NUM_TRIALS, NUM_PROMPTS, NUM_OBJECTIVES, NOISE, NUM_SWEEPS = 12, 16, 3, 0.6, 200
"""A sweep as mix.yaml's: gains of single prompts scatter by 0.6 deviations of the base model. Over 2,000 sweeps and in
more settings: tests/benchmarks/front_statistics.py."""


@pytest.mark.slow
@pytest.mark.parametrize("effect", [0.0, 0.5])
def test_a_sweep_is_reported_without_luck_and_covered_as_often_as_it_says(effect: float) -> None:
    rng = np.random.default_rng(4)
    rows = []
    for _ in range(NUM_SWEEPS):
        true_ND = effect * rng.uniform(-1, 1, (NUM_TRIALS + 1, NUM_OBJECTIVES))
        true_ND[0] = 0.0  # the base model, of which no measurement differs
        shape = (2, NUM_PROMPTS, NUM_TRIALS + 1, NUM_OBJECTIVES)
        noise = NOISE * rng.standard_normal(shape) + NOISE / 2 * rng.standard_normal((*shape[:3], 1))  # correlated
        noise[:, :, 0] = 0.0
        search_PND, fresh_PND = true_ND + noise
        chosen_ND = 1 + search_PND.mean(axis=0)
        members = np.flatnonzero(non_dominated(chosen_ND))
        found = fresh_volume(chosen_ND[members], fresh_PND[:, members])
        placed = volume_as_chosen(chosen_ND[members], 1 + true_ND[None, members])[0]
        fresh_ND = 1 + fresh_PND[:, members].mean(axis=0)
        best = members[chosen_ND[members, 0].argmax()]  # by the search's numbers
        best_P = fresh_PND[:, best, 0]
        half = half_width(float(best_P.std(ddof=1)) / NUM_PROMPTS**0.5, NUM_PROMPTS - 1)
        assert half is not None
        assert found.half_width is not None
        rows.append(
            {
                "true": hypervolume(1 + true_ND[members], np.zeros(NUM_OBJECTIVES)),
                "placed": placed,
                "value": found.value,
                "fresh points": hypervolume(fresh_ND, np.zeros(NUM_OBJECTIVES)),
                "is covered": abs(found.value - placed) <= found.half_width,
                "gain": best_P.mean() - true_ND[best, 0],
                "gain is covered": abs(best_P.mean() - true_ND[best, 0]) <= half,
            }
        )
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    error = float(np.std([row["value"] - row["placed"] for row in rows])) / NUM_SWEEPS**0.5
    assert abs(means["value"] - means["placed"]) < 3 * error < 0.2  # unbiased
    assert means["placed"] <= means["true"] + 1e-12
    if effect == 0:
        assert means["true"] == pytest.approx(1.0)
        assert means["placed"] == pytest.approx(1.0)
        assert means["fresh points"] > 1.4  # what the fresh points' own hypervolume would claim
    assert abs(means["gain"]) < 3 * NOISE * 1.25**0.5 / (NUM_PROMPTS * NUM_SWEEPS) ** 0.5
    for name in ("is covered", "gain is covered"):
        assert 0.90 <= means[name] <= 0.995, name  # 0.95, give or take three standard deviations of a share of 200
