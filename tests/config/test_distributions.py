import math

import pytest

from rltune.config.distributions import (
    MAX_LISTED,
    Choice,
    Distribution,
    FloatRange,
    IntRange,
    LogFloatRange,
    Simplex,
    looks_like_distribution,
    parse_distribution,
    show,
)


@pytest.mark.parametrize(
    ("raw", "distribution"),
    [
        ({"choice": ["a", 1, 1.0, True, None]}, Choice(("a", 1, 1.0, True, None))),
        ({"int": [-2, 3]}, IntRange(-2, 3, 1)),
        ({"int": [2, 8], "step": 3}, IntRange(2, 8, 3)),
        ({"float": [0, 1]}, FloatRange(0.0, 1.0)),
        ({"log_float": [1e-4, 1]}, LogFloatRange(1e-4, 1.0)),
        ({"simplex": True}, Simplex()),
    ],
)
def test_each_kind_is_read(raw: dict[str, object], distribution: Distribution) -> None:
    assert looks_like_distribution(raw)
    assert parse_distribution(raw) == distribution


def test_range_bounds_become_floats_where_floats_are_sampled() -> None:
    distribution = parse_distribution({"float": [0, 1]})
    assert isinstance(distribution, FloatRange)
    assert isinstance(distribution.low, float)
    assert isinstance(distribution.high, float)


@pytest.mark.parametrize(
    "value", [3, [1, 2], {}, {"a": 1}, {"step": 1}, {"choice": [1], "a": 1}, {"int": 1, "float": 1}]
)
def test_other_values_do_not_look_like_one(value: object) -> None:
    assert not looks_like_distribution(value)


def test_an_integer_range_lists_its_ends_and_what_lies_between() -> None:
    distribution = IntRange(2, 10, 2)
    assert list(distribution.corners()) == [("int[0]", 2), ("int[1]", 10)]
    assert [value for _, value in distribution.inner()] == [4, 6, 8]


def test_a_long_integer_range_lists_its_first_values() -> None:
    assert [value for _, value in IntRange(0, 10**9).inner()] == list(range(1, MAX_LISTED + 1))
    assert len(list(IntRange(0, MAX_LISTED + 1).inner())) == MAX_LISTED


def test_the_first_value_of_a_range_lies_in_its_middle() -> None:
    assert FloatRange(0, 1).first == 0.5
    assert LogFloatRange(1e-4, 1e-2).first == pytest.approx(1e-3)
    assert math.isfinite(LogFloatRange(1e300, 1e308).first)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "nothing"),
        (True, "true"),
        (1e-5, "1e-05"),
        ("a", "'a'"),
        ([1, None], "[1, nothing]"),
        ({"int": [1, 2]}, "{int: [1, 2]}"),
    ],
)
def test_values_are_shown_as_a_user_writes_them(value: object, text: str) -> None:
    assert show(value) == text


def test_long_values_are_cut() -> None:
    assert show("x" * 200).endswith("...")
    assert len(show("x" * 200)) == 80
