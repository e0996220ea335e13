"""Shares and their intervals, against scipy and by hand."""

import pytest
from scipy.stats import binomtest

from rltune.builtin.grammar import Content
from rltune.builtin.judge import Verdict
from rltune.builtin.measure import MEASURES, judged_shares, wilson
from rltune.builtin.scenes import Group

ONE = Content((Group(1, "plain", "red", "star"),), "white")
TWO = Content((Group(1, "plain", "red", "star"), Group(2, "plain", "blue", "ring")), "white")


def scipys(hits: int, count: int) -> tuple[float, float]:
    interval = binomtest(hits, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 1000])
def test_the_interval_is_scipys(count: int) -> None:
    for hits in {0, 1, count // 3, count // 2, count - 1, count}:
        # 1.959964 is the normal quantile to seven digits.
        assert wilson(hits / count, count) == pytest.approx(scipys(hits, count), abs=1e-7)


def test_of_nothing_everything_is_possible() -> None:
    assert wilson(0.0, 0) == (0.0, 1.0)


def verdict(parts: str) -> Verdict:
    """The verdict in which the parts named by their first letters are right; ``G`` is ground."""
    return Verdict(
        ground="G" in parts, colors="c" in parts, count="n" in parts, shape="s" in parts, groups="g" in parts
    )


CASES = (
    (verdict("Gcnsg"), ONE),
    (verdict("Gcs"), ONE),
    (verdict("cnsg"), ONE),
    (verdict("Gn"), ONE),
    (verdict("Gcnsg"), TWO),
    (verdict("cnsg"), TWO),
)


def test_every_share_counts_the_pictures_it_is_about() -> None:
    shares = judged_shares([case for case, _ in CASES], [content for _, content in CASES], 1)
    # (hits, pictures) by counting in CASES: four prompts of one group, two of two.
    expected = {
        "exact": (2, 6),
        "ground": (4, 6),
        "one_color": (3, 4),
        "one_count": (3, 4),
        "one_shape": (3, 4),
        "one_all": (2, 4),
        "two_colors": (2, 2),
        "two_all": (2, 2),
    }
    assert expected.keys() == MEASURES.keys()
    assert shares.keys() == {f"{name}{end}" for name in expected for end in ("", "_low", "_high")}
    for name, (hits, count) in expected.items():
        assert shares[name] == hits / count
        # As above.
        assert (shares[f"{name}_low"], shares[f"{name}_high"]) == pytest.approx(scipys(hits, count), abs=1e-7)


def test_each_share_is_of_its_own_part() -> None:
    """One picture with one part right, for each part: the figures that see it are those named after the part."""
    named = {
        "G": {"ground"},
        "c": {"one_color", "two_colors"},
        "n": {"one_count"},
        "s": {"one_shape"},
        "g": {"one_all", "two_all"},
        "Gg": {"ground", "one_all", "two_all", "exact"},
    }
    for parts, names in named.items():
        shares = judged_shares([verdict(parts)] * 2, [ONE, TWO], 1)
        assert {name for name in MEASURES if shares[name] == 1.0} == names
        assert {name for name in MEASURES if shares[name] == 0.0} == MEASURES.keys() - names


def test_several_pictures_of_a_prompt_count_once() -> None:
    cases = [verdict("Gcnsg")] * 60 + [verdict("")] * 20
    once, twice = (judged_shares(cases, [ONE] * 80, num_images) for num_images in (1, 2))
    assert once["exact"] == twice["exact"] == 0.75
    assert (once["exact_low"], once["exact_high"]) == pytest.approx(scipys(60, 80), abs=1e-7)  # as above
    assert (twice["exact_low"], twice["exact_high"]) == pytest.approx(scipys(30, 40), abs=1e-7)
    assert twice["exact_low"] < once["exact_low"] < 0.75 < once["exact_high"] < twice["exact_high"]


def test_a_measure_without_pictures_says_nothing() -> None:
    shares = judged_shares([verdict("Gcnsg")], [ONE], 1)
    assert (shares["two_all"], shares["two_all_low"], shares["two_all_high"]) == (0.0, 0.0, 1.0)
