"""Total ranks against counts of dominators, pair by pair, and epsilon-nets against orders worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rltune.pareto.rank import epsilon_net, total_rank

points = st.tuples(st.integers(0, 10), st.integers(1, 4)).flatmap(
    lambda shape: st.tuples(
        arrays(np.float64, shape, elements=st.integers(-2, 2).map(float)),
        arrays(np.float64, shape[:1], elements=st.integers(-1, 3).map(float)),
    )
)
"""Points with few distinct values, so that ties and copies are common, and violations."""


def beats(a: np.ndarray, b: np.ndarray, violation_a: float, violation_b: float) -> bool:
    """Constrained domination, by its definition."""
    if violation_a > 0 or violation_b > 0:
        return max(violation_a, 0) < max(violation_b, 0)
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@settings(deadline=None)
@given(points)
def test_whoever_dominates_comes_first(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    values_ND, violation_N = drawn
    place_N = total_rank(values_ND, violation_N)
    assert sorted(place_N) == list(range(len(values_ND)))
    for i, a in enumerate(values_ND):
        for j, b in enumerate(values_ND):
            if beats(a, b, violation_N[i], violation_N[j]):
                assert place_N[i] < place_N[j]


@pytest.mark.slow
@settings(deadline=None)
@given(points)
def test_fronts_follow_one_another(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    values_ND, _ = drawn

    def depth(a: np.ndarray) -> int:
        return max((1 + depth(b) for b in values_ND if beats(b, a, 0, 0)), default=0)

    depths = np.array([depth(a) for a in values_ND])
    assert (np.diff(depths[np.argsort(total_rank(values_ND))]) >= 0).all()


@pytest.mark.slow
@settings(deadline=None)
@given(points, st.integers(0, 99))
def test_units_and_order_of_objectives_do_not_matter(drawn: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    values_ND, violation_N = drawn
    rng = np.random.default_rng(seed)
    # powers of two scale whole numbers without rounding
    scaled_ND = values_ND * 2.0 ** rng.integers(-9, 10, values_ND.shape[1]) + 2.0 ** rng.integers(-3, 4)
    shuffled_ND = scaled_ND[:, rng.permutation(values_ND.shape[1])]
    assert total_rank(shuffled_ND, violation_N).tolist() == total_rank(values_ND, violation_N).tolist()


@pytest.mark.slow
@settings(deadline=None)
@given(points)
def test_a_net_takes_the_furthest_next(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    values_ND, _ = drawn
    order = epsilon_net(values_ND)
    assert sorted(order) == list(range(len(values_ND)))
    spans = np.ptp(values_ND, axis=0) if len(values_ND) else np.zeros(values_ND.shape[1])
    unit_ND = values_ND[:, spans > 0] / spans[spans > 0]

    def gap(row: int, taken: np.ndarray) -> float:
        return min(float(np.linalg.norm(unit_ND[row] - unit_ND[other])) for other in taken)

    for turn in range(1, len(order)):
        taken, rest = order[:turn], order[turn:]
        # square roots of quotients of whole numbers up to 4, rounded in the last bits
        assert gap(order[turn], taken) == pytest.approx(max(gap(row, taken) for row in rest), abs=1e-9)


@pytest.mark.parametrize(
    ("values", "order"),
    [
        ([], []),
        ([[5]], [0]),
        ([[0, 4], [1, 3], [2, 2], [4, 0]], [0, 3, 2, 1]),  # all sums are 1: the first row; then the ends, the middle
        ([[0, 10], [2, 9], [10, 0]], [1, 2, 0]),  # sums 1, 1.1 and 1; from (0.2, 0.9), (1, 0) is the further
        ([[0, 1000], [0.9, 600], [1, 0]], [1, 0, 2]),  # from (0.9, 0.6): 0.98 and 0.61; in raw units 400 and 600
        ([[3, 7], [3, 7], [3, 7]], [0, 1, 2]),  # copies, nothing varies
        ([[3, 0], [3, 2], [3, 1]], [1, 0, 2]),  # the first objective does not vary
    ],
)
def test_nets_by_hand(values: list[list[float]], order: list[int]) -> None:
    array = np.array(values, dtype=float).reshape(len(values), -1 if values else 2)
    assert epsilon_net(array).tolist() == order


def test_those_that_break_constraints_come_last_by_how_much() -> None:
    values_ND = [[9, 9], [1, 1], [8, 8], [0, 0], [7, 7]]
    assert total_rank(values_ND, [0.5, 0, 0.1, -3, 0.5]).tolist() == [3, 0, 2, 1, 4]
    assert total_rank(values_ND).tolist() == [0, 3, 1, 4, 2]


@pytest.mark.parametrize("violation", [[0.0], [0.0, float("nan")], [[0.0, 0.0]]])
def test_there_is_a_violation_a_point(violation: list[float]) -> None:
    with pytest.raises(ValueError, match="violation must be 2 numbers, got"):
        total_rank([[1, 2], [2, 1]], violation)
