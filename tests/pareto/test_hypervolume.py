"""Hypervolumes against inclusion and exclusion, closed forms, random points and optuna."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rltune.pareto.front import non_dominated
from rltune.pareto.hypervolume import hypervolume, reference_point

points = st.tuples(st.integers(0, 6), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-1, 4).map(float))
)


def by_inclusion_and_exclusion(values_ND: np.ndarray, reference_D: np.ndarray) -> float:
    """The volume of a union of boxes: sums of the volumes of all intersections, signs alternating."""
    boxes = [box for box in values_ND - reference_D if (box > 0).all()]
    total = 0.0
    for size in range(1, len(boxes) + 1):
        for chosen in combinations(boxes, size):
            total += (-1) ** (size + 1) * np.prod(np.min(chosen, axis=0))
    return total


@pytest.mark.slow
@settings(deadline=None)
@given(points)
def test_the_volume_is_that_of_the_union_of_boxes(values_ND: np.ndarray) -> None:
    reference_D = np.zeros(values_ND.shape[1])
    # Whole numbers below 2^53: exact on both sides.
    assert hypervolume(values_ND, reference_D) == by_inclusion_and_exclusion(values_ND, reference_D)


@pytest.mark.slow
@settings(deadline=None)
@given(points)
def test_dominated_points_and_copies_add_nothing(values_ND: np.ndarray) -> None:
    reference_D = np.full(values_ND.shape[1], -2.0)
    whole = hypervolume(values_ND, reference_D)
    assert hypervolume(values_ND[non_dominated(values_ND)], reference_D) == whole
    assert hypervolume(np.concatenate([values_ND, values_ND]), reference_D) == whole


@pytest.mark.slow
@settings(deadline=None)
@given(points, st.integers(0, 5))
def test_one_more_point_never_takes_volume(values_ND: np.ndarray, seed: int) -> None:
    more = np.random.default_rng(seed).integers(-1, 5, (1, values_ND.shape[1])).astype(float)
    reference_D = np.full(values_ND.shape[1], -1.5)
    before, after = hypervolume(values_ND, reference_D), hypervolume(np.vstack([values_ND, more]), reference_D)
    assert after >= before
    covered = any((row >= more[0]).all() for row in values_ND)
    assert (after > before) == (not covered and bool((more > reference_D).all()))


@pytest.mark.slow
@pytest.mark.parametrize("num_objectives", [2, 3, 4])
def test_the_volume_is_the_share_of_random_points_below_the_front(num_objectives: int) -> None:
    rng = np.random.default_rng(0)
    values_ND = rng.random((40, num_objectives)) ** 0.3
    num_samples = 40_000
    samples = rng.random((num_samples, num_objectives))
    share = np.mean([(values_ND >= sample).all(axis=1).any() for sample in samples])
    # A share of n draws has a standard deviation of at most 0.5 / sqrt(n); four of them, at a fixed seed.
    assert hypervolume(values_ND, np.zeros(num_objectives)) == pytest.approx(share, abs=4 * 0.5 / num_samples**0.5)


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
def test_the_volume_is_optunas(num_objectives: int) -> None:
    private = pytest.importorskip("optuna._hypervolume")
    values_ND = np.random.default_rng(1).random((25, num_objectives))
    expected = private.compute_hypervolume(-values_ND, np.zeros(num_objectives))
    assert hypervolume(values_ND, np.zeros(num_objectives)) == pytest.approx(expected, rel=1e-12)  # float64 sums


def test_the_staircase_has_its_area() -> None:
    n = 50
    steps = [[i, n - i] for i in range(1, n)]
    assert hypervolume(steps, [0, 0]) == n * (n - 1) / 2


def test_shift_and_unit_only_rescale() -> None:
    values_ND = np.random.default_rng(2).random((10, 3))
    unit_D = np.array([2.0, 0.5, 10.0])
    plain = hypervolume(values_ND, [0.1, 0.1, 0.1])
    assert hypervolume(values_ND * unit_D - 5, np.full(3, 0.1) * unit_D - 5) == pytest.approx(10 * plain, rel=1e-12)


def test_points_on_or_below_the_reference_add_nothing() -> None:
    assert hypervolume([[1, 0], [0, 1], [-1, 5], [0, 0]], [0, 0]) == 0
    assert hypervolume(np.zeros((0, 3)), [0, 0, 0]) == 0
    assert hypervolume([[2], [5]], [1]) == 4


def test_the_reference_is_one_deviation_below_the_base() -> None:
    assert reference_point([5.0, -2.5], [0.5, 0.25]).tolist() == [4.5, -2.75]
    # The base itself covers the product of the deviations.
    assert hypervolume([[5.0, -2.5]], reference_point([5.0, -2.5], [0.5, 0.25])) == 0.125


@pytest.mark.parametrize("scale_D", [[1.0], [1.0, -0.1], [1.0, float("nan")]])
def test_a_wrong_scale_is_the_callers_fault(scale_D: list[float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        reference_point([0.0, 0.0], scale_D)


def test_a_reference_of_another_length_is_the_callers_fault() -> None:
    with pytest.raises(ValueError, match="reference must have 2 numbers, got 3"):
        hypervolume([[1, 2]], [0, 0, 0])


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 100))
def test_a_hundred_points_of_four_objectives_are_quick(seed: int) -> None:
    values_ND = np.random.default_rng(seed).random((100, 4))
    assert 0 < hypervolume(values_ND, np.zeros(4)) < 1
