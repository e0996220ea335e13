from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rltune.config.yamlfile import read_yaml, write_yaml

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
TRICKY = st.sampled_from(
    ["1e-3", "no", "010", "2026-01-01", "12:30", "~", "", "null", "0x10", ".nan", "<<", "=", "1_0"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | TRICKY,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | TRICKY, inner, max_size=4),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2E5", 2e5),
        ("1.5e+2", 150.0),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("1e", "1e"),
        ("e3", "e3"),
        ("12", 12),
        ("+3", 3),
        ("010", "010"),
        ("12:30", "12:30"),
        ("no", "no"),
        ("true", True),
        ("2026-01-01", "2026-01-01"),
        ("~", None),
        ("", None),
        (".inf", float("inf")),
        ('"1e-3"', "1e-3"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    data, _, _ = read_yaml(f"x: {text}")
    assert data == {"x": value}
    assert type(data["x"]) is type(value)


@pytest.mark.long
@given(data=st.dictionaries(TEXT, VALUES, max_size=4))
def test_what_is_written_reads_back_equal(data: dict[str, Any]) -> None:
    assert read_yaml(write_yaml(data))[0] == data


def test_keys_keep_their_order() -> None:
    assert write_yaml({"b": 1, "a": [{"d": 2, "c": 3}]}) == "b: 1\na:\n- d: 2\n  c: 3\n"


@given(text=TRICKY)
def test_text_stays_text_for_readers_of_yaml_1_1(text: str) -> None:
    assert yaml.safe_load(write_yaml({"x": text})) == {"x": text}


def test_every_path_has_the_line_it_stands_on() -> None:
    _, lines, faults = read_yaml("a: 1\n\n# b\nb:\n  c: [x,\n      y]\n  d:\n  - e: 1\n    f: 2\n")
    assert not faults
    assert lines == {
        ("a",): 1,
        ("b",): 4,
        ("b", "c"): 5,
        ("b", "c", "0"): 5,
        ("b", "c", "1"): 6,
        ("b", "d"): 7,
        ("b", "d", "0"): 8,
        ("b", "d", "0", "e"): 8,
        ("b", "d", "0", "f"): 9,
    }


@pytest.mark.parametrize(
    ("text", "dotted"),
    [
        ("a: {int: [1, 2], step: 1, when: {b.c: 1}}", []),
        ("search: {points: [{a.b: 1}, {c.d: 2}]}", []),
        ("a: {int: [1, 2], when: {b: {c.d: 1}}}", ["a.when.b.c.d"]),
        ("a: {when: {b.c: 1}, other: 2}", ["a.when.b.c"]),
        ("search: {points: {a.b: 1}}", ["search.points.a.b"]),
        ("search: {points: [{a: {b.c: 1}}]}", ["search.points.0.a.b.c"]),
        ("a: {points: [{b.c: 1}]}", ["a.points.0.b.c"]),
    ],
)
def test_keys_are_dotted_only_where_paths_are_meant(text: str, dotted: list[str]) -> None:
    _, _, faults = read_yaml(text)
    assert [fault.where for _, fault in faults] == dotted


def test_an_alias_is_a_copy_and_a_merge_is_followed() -> None:
    data, _, _ = read_yaml("a: &a {x: [1]}\nb: *a\nc: {<<: *a, y: 2}")
    assert data == {"a": {"x": [1]}, "b": {"x": [1]}, "c": {"x": [1], "y": 2}}
    data["a"]["x"].append(2)
    assert data["b"] == {"x": [1]}
    assert data["c"]["x"] == [1]
