"""Against the product of everything, from which combinations that are the same to a run are then struck."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltune.config.conditions import active_values
from rltune.config.distributions import Choice, Distribution, FloatRange, IntRange, Simplex
from rltune.config.grid import combinations, is_countable
from rltune.config.yamlfile import Path


@st.composite
def spaces(draw: st.DrawFn) -> dict[Path, Distribution]:
    """Up to five settings in any order, each perhaps under conditions on choices further down the tree."""
    space: dict[Path, Distribution] = {}
    for i in range(draw(st.integers(1, 5))):
        parents = [path for path, kind in space.items() if isinstance(kind, Choice)]
        when = []
        for parent in draw(st.lists(st.sampled_from(parents), max_size=2, unique=True)) if parents else []:
            choice = space[parent]
            assert isinstance(choice, Choice)
            when.append((parent, tuple(draw(st.lists(st.sampled_from(choice.options), min_size=1, unique=True)))))
        options = draw(st.sampled_from([(0, 1, 2), ("a", None), (1, True), (3,)]))
        is_range = draw(st.booleans())
        space["s", str(i)] = IntRange(2, 6, 2, when=tuple(when)) if is_range else Choice(options, when=tuple(when))
    order = draw(st.permutations(list(space)))
    return {path: space[path] for path in order}


@pytest.mark.long
@settings(max_examples=200, deadline=None, derandomize=True)
@given(space=spaces())
def test_every_active_combination_comes_once_in_the_order_of_the_product(space: dict[Path, Distribution]) -> None:
    axes: list[Any] = [kind.options if isinstance(kind, Choice) else (2, 4, 6) for kind in space.values()]
    product = (active_values(space, dict(zip(space, values, strict=True))) for values in itertools.product(*axes))
    distinct = {repr(values): None for values in product}  # 1 and true are equal, and not the same
    assert [repr(values) for values in combinations(space)] == list(distinct)


def test_what_is_not_active_costs_nothing() -> None:
    """Two ranges of a million play no part where the choice is off: their product is never gone through."""
    on = ((("c",), (True,)),)
    space = {("c",): Choice((False, True)), ("x",): IntRange(1, 10**6, when=on), ("y",): IntRange(1, 10**6, when=on)}
    first, second, third = itertools.islice(combinations(space), 3)
    assert first == {("c",): False}
    assert second == {("c",): True, ("x",): 1, ("y",): 1}
    assert third == {("c",): True, ("x",): 1, ("y",): 2}
    assert list(itertools.islice(combinations({path: space[path] for path in [("x",), ("c",)]}), 2)) == [
        {("c",): False},
        {("x",): 1, ("c",): True},
    ]


@pytest.mark.parametrize("kind", [FloatRange(0, 1), Simplex()])
def test_numbers_without_gaps_cannot_be_counted(kind: Distribution) -> None:
    assert not is_countable({"a": Choice((1, 2)), "b": kind})
    assert is_countable({"a": Choice((1, 2)), "b": IntRange(1, 3)})
