import math

import numpy as np
import pytest

from rltune.search.gaussian import JITTER, Process, fit


def test_a_prediction_is_the_closed_form() -> None:
    """Two points of two features: k = exp(-(dx^2 / 0.5^2 + dy^2 / 2^2) / 2), noise 0.3, and a 2x2 inverse by hand."""
    process = Process(
        np.array([[0.0, 0.0], [0.5, 1.0]]), np.array([0, 1]), np.array([1.0, -2.0]), 7.0, 3.0, np.log([0.5, 2.0, 0.3])
    )
    between = math.exp(-0.5 * (1.0 + 0.25))
    to_first, to_second = math.exp(-0.5 * 0.25), math.exp(-0.5 * (0.25 + 0.25))  # from (0.25, 0) to both
    diagonal = 1 + 0.3**2 + JITTER
    det = diagonal**2 - between**2
    alpha = ((diagonal * 1.0 - between * -2.0) / det, (diagonal * -2.0 - between * 1.0) / det)
    variance = (1.0 * alpha[0] - 2.0 * alpha[1] + 2) / (2 + 2)
    explained = (diagonal * (to_first**2 + to_second**2) - 2 * between * to_first * to_second) / det
    mean, deviation = process.predict(np.array([[0.25, 0.0]]))
    # (0.25, 0) is 0.25 from the first in x; 0.25 in x and 1 in y from the second
    assert mean == pytest.approx([7 + 3 * (to_first * alpha[0] + to_second * alpha[1])], rel=1e-9)
    assert deviation == pytest.approx([3 * math.sqrt((1 - explained) * variance)], rel=1e-9)


def test_believing_its_own_mean_changes_no_mean_and_leaves_less_to_learn_there() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((8, 2))
    process = fit(points, [0, 1], np.sin(3 * points[:, 0]))
    new, elsewhere = np.array([[0.9, 0.1]]), rng.random((5, 2))
    told = process.believing(new)
    assert told.predict(elsewhere)[0] == pytest.approx(process.predict(elsewhere)[0], abs=1e-5)
    assert told.predict(new)[1] < process.predict(new)[1]


def test_a_fit_finds_what_matters_and_predicts_it() -> None:
    rng = np.random.default_rng(1)
    points, others = rng.random((30, 3)), rng.random((100, 3))

    def wave(x: np.ndarray) -> np.ndarray:
        return 5 + 2 * np.sin(5 * x[:, 0])

    process = fit(points, [0, 1, 1], wave(points))
    wave_length, idle_length = process.log_scales[:2]
    assert wave_length < idle_length - 1
    mean, deviation = process.predict(others)
    # the wave is from 3 to 7; it is smooth, so that 30 points leave little open
    assert np.abs(mean - wave(others)).max() < 0.3
    assert np.median(deviation) < 0.1


def test_values_that_are_all_the_same_can_be_fitted() -> None:
    process = fit(np.random.default_rng(2).random((6, 2)), [0, 1], np.full(6, 4.0))
    mean, deviation = process.predict(np.full((1, 2), 0.5))
    assert mean == pytest.approx([4.0])
    assert np.isfinite(deviation).all()
