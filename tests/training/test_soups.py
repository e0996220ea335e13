import pytest

from rltune.errors import UserError
from rltune.training.soups import check_method, even_weights


def test_two_loras_have_a_line_and_three_a_triangle() -> None:
    assert even_weights(2, 3) == [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    assert even_weights(1, 2) == [(1.0,)]
    rows = even_weights(3, 4)
    assert len(rows) == len(set(rows)) == 10  # of the multiples of a third
    assert all(sum(row) == pytest.approx(1) and min(row) >= 0 for row in rows)
    assert {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)} <= set(rows)
    with pytest.raises(UserError, match="--points: must be 2 at least, the ends, got 1"):
        even_weights(2, 1)


def test_a_method_is_known_and_takes_its_weights() -> None:
    check_method("exact", [(2.0, -0.5)])
    check_method("draw", even_weights(3, 4))
    with pytest.raises(UserError, match="--method: must be exact, factors, predictions, draw, got 'soup'"):
        check_method("soup", [(0.5, 0.5)])
    for odd in ((1.5, -0.5), (0.5, 0.6)):
        with pytest.raises(UserError, match="--weights: for draw they are probabilities"):
            check_method("draw", [(0.5, 0.5), odd])
