"""Attainment surfaces against counting, point by point."""

from itertools import product

import numpy as np
import pytest

from rltune.pareto.attainment import attainment_surfaces
from rltune.pareto.front import non_dominated


def attains(front_ND: np.ndarray, point_D: np.ndarray) -> bool:
    return bool((front_ND >= point_D).all(axis=1).any())


@pytest.mark.parametrize(("num_fronts", "num_objectives"), [(1, 2), (2, 2), (3, 2), (5, 2), (3, 3), (4, 1)])
def test_the_k_th_surface_bounds_what_k_fronts_attain(num_fronts: int, num_objectives: int) -> None:
    rng = np.random.default_rng(num_fronts)
    fronts = [rng.integers(0, 7, (int(rng.integers(0, 5)), num_objectives)).astype(float) for _ in range(num_fronts)]
    surfaces = attainment_surfaces(fronts)
    assert len(surfaces) == num_fronts
    for point in product(np.arange(-0.5, 7.5), repeat=num_objectives):  # between the whole numbers of the points
        point_D = np.array(point)
        count = sum(attains(front, point_D) for front in fronts)
        assert [attains(surface, point_D) for surface in surfaces] == [count >= k for k in range(1, num_fronts + 1)]
    assert all(non_dominated(surface).all() for surface in surfaces)


def test_by_hand() -> None:
    once, twice = attainment_surfaces([[[1.0, 3.0]], [[2.0, 1.0]]])
    assert (once.tolist(), twice.tolist()) == ([[1.0, 3.0], [2.0, 1.0]], [[1.0, 1.0]])


@pytest.mark.parametrize("fronts", [[], [[[1.0, 2.0]], [[1.0]]], [[[np.nan]]]])
def test_what_is_no_fronts_is_refused(fronts: list[list[list[float]]]) -> None:
    with pytest.raises(ValueError, match="must be"):
        attainment_surfaces(fronts)
