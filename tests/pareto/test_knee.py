"""Knees where geometry says they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rltune.pareto.front import non_dominated
from rltune.pareto.knee import knee

points = st.tuples(st.integers(1, 10), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-3, 3).map(float))
)


def test_an_arc_bends_most_at_its_middle() -> None:
    angles = np.linspace(0, np.pi / 2, 21)
    assert knee(np.stack([np.cos(angles), np.sin(angles)], axis=1)) == 10


def test_a_power_curve_has_its_knee_where_its_slope_is_that_of_the_chord() -> None:
    x = np.linspace(0, 1, 1001)  # y = 1 - x^4 has slope -1 at x = (1/4)^(1/3)
    assert x[knee(np.stack([x, 1 - x**4], axis=1))] == pytest.approx(0.25 ** (1 / 3), abs=1e-3)  # the grid


def test_the_distance_to_the_chord_is_what_decides() -> None:
    front = np.array([[0.0, 10.0], [1.0, 9.5], [2.5, 8.0], [3.0, 4.0], [4.0, 0.0]])
    scaled = front / [4, 10]
    start, along = scaled[0], scaled[-1] - scaled[0]
    distances = np.abs(along[0] * (scaled - start)[:, 1] - along[1] * (scaled - start)[:, 0])  # of a line in the plane
    assert knee(front) == distances.argmax() == 2


def test_a_sphere_bends_most_along_its_diagonal() -> None:
    grid = [(a, b) for a in np.linspace(0, np.pi / 2, 19) for b in np.linspace(0, np.pi / 2, 19)]
    sphere = np.array([[np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)] for a, b in grid])
    best = sphere[knee(sphere)]
    assert np.abs(best - 3**-0.5).max() < 0.05  # half a step of the grid, 5 degrees


def test_with_three_objectives_the_plane_goes_through_the_extremes() -> None:
    # The first end has some of the second objective, so that the plane is not the one through the unit points, from
    # which row 4 would be furthest.
    front = np.array([[1.0, 0.6, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.2, 0.8, 0.55], [0.5, 0.7, 0.5]])
    normal = np.cross(front[1] - front[0], front[2] - front[0])
    distances = np.abs((front - front[0]) @ normal / np.linalg.norm(normal))
    assert knee(front) == knee(7 * front - 10) == distances.argmax() == 3


def test_a_plane_that_slopes_up_gives_way_to_the_one_through_the_unit_points() -> None:
    # Row 0 is nearly best in everything; the plane through the first three rows would make more of objective 0 worse.
    assert knee([[1.0, 0.8, 0.8], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.9, 0.9]]) == 0


def test_extremes_that_coincide_leave_the_plane_through_the_unit_points() -> None:
    # Row 0 is best in two objectives, so that three extremes span no plane; of the rest, row 2 has the greatest sum.
    assert knee([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.9, 0.9, 0.5]]) == 2


def test_a_front_that_bends_inwards_has_its_knee_at_an_end() -> None:
    assert knee([[0.2, 0.2], [0.0, 1.0], [1.0, 0.0]]) == 1


def test_a_straight_front_has_its_knee_at_the_first_row() -> None:
    x = np.linspace(0, 1, 30)
    assert knee(np.stack([x, 1 - x], axis=1)) == 0


def test_one_objective_has_its_best_point() -> None:
    assert knee([[1.0], [3.0], [2.0]]) == 1


def test_an_objective_that_does_not_vary_is_left_out() -> None:
    assert knee([[0.0, 1.0, 5.0], [0.8, 0.8, 5.0], [1.0, 0.0, 5.0]]) == 1


@pytest.mark.slow
@settings(deadline=None)
@given(points)
def test_the_knee_is_on_the_front_whatever_the_units(values_ND: np.ndarray) -> None:
    row = knee(values_ND)
    assert non_dominated(values_ND)[row]
    # Powers of two, so that scaling rounds nothing.
    assert knee(values_ND * 2.0 ** np.arange(values_ND.shape[1]) + 8) == row


def test_no_points_have_no_knee() -> None:
    with pytest.raises(ValueError, match="at least one point"):
        knee(np.zeros((0, 2)))
