"""Runs side by side as a page: what is drawn where, and that text stays text."""

from html import unescape

import numpy as np
import pytest

from rltune.report.axes import framed
from rltune.report.comparison import _stairs, comparison_page, front_drawing, volume_drawing
from rltune.report.drawing import Dot, Line
from rltune.runs.compare import Comparison, compare_runs
from tests.runs.test_compare import a_run


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("runs")
    other = {"lr": 1e-3, "steps": 20, "batch": 4}
    paths = [
        a_run(folder / "a", 0.3),
        a_run(folder / "b", 0.4, seed=1),
        a_run(folder / "<b>c & \U0001f600 [red]", 0.1, 0.05, optim=other),
    ]
    return compare_runs(paths)


def test_a_gain_stands_where_its_axis_says(comparison: Comparison) -> None:
    drawing = front_drawing(comparison, 0, 1)  # brightness, and drift, of which less is better
    dots = {(round(dot.x, 3), round(dot.y, 3)): dot for dot in drawing.shapes if isinstance(dot, Dot)}
    base = next(dot for dot in dots.values() if dot.is_square)
    members = sorted((dot for dot in dots.values() if not dot.is_square), key=lambda dot: dot.x)
    assert [dot.role for dot in members] == ["knee", "member", "member"]  # B gained 0.1, the runs of A 0.3 and 0.4
    gains = np.array([dot.x - base.x for dot in members])
    np.testing.assert_allclose(gains / gains[0], [1, 3, 4], rtol=1e-6)
    assert all(dot.y > base.y for dot in members)  # they drifted
    np.testing.assert_allclose((members[0].y - base.y) / (members[1].y - base.y), 0.05 / 0.02, rtol=1e-6)


def test_lines_bound_what_some_half_and_all_runs_of_a_group_attain(comparison: Comparison) -> None:
    drawing = front_drawing(comparison, 0, 1)
    lines = [line for line in drawing.shapes if isinstance(line, Line) and line.role in ("member", "knee")]
    assert [(line.role, line.is_dashed) for line in lines] == [("member", False), ("member", True), ("knee", False)]
    some, every, _ = (max(x for x, _ in line.points) for line in lines)
    assert some > every  # of two runs, one is half of them and attains more than both


def test_a_line_goes_from_corner_to_corner() -> None:
    frame = framed(200.0, 100.0, [0.0, 1.0], [0.0, 1.0])
    (left, _), bottom = sorted((frame.x.start_px, frame.x.end_px)), frame.y.start_px
    x, y = frame.x, frame.y
    assert _stairs(frame, [[1.0, 0.2], [0.3, 0.8]]) == [
        (left, y(0.8)), (x(0.3), y(0.8)), (x(0.3), y(0.2)), (x(1.0), y(0.2)), (x(1.0), bottom),
    ]  # fmt: skip


def test_an_interval_is_as_long_as_it_is_said_to_be(comparison: Comparison) -> None:
    drawing = volume_drawing(comparison)
    value, half = comparison.groups[0].hypervolume
    assert half is not None
    bar = next(line for line in drawing.shapes if isinstance(line, Line) and line.role == "member")
    dot = next(dot for dot in drawing.shapes if isinstance(dot, Dot) and dot.role == "member" and not dot.is_hollow)
    base = next(line for line in drawing.shapes if isinstance(line, Line) and line.role == "dim")
    (start, _), (end, _) = bar.points
    assert end - start == pytest.approx(2 * half * (dot.x - base.points[0][0]) / (value - 1), rel=1e-6)


def test_the_page_asks_nobody_runs_nothing_and_shows_names_as_they_are(comparison: Comparison) -> None:
    text = comparison_page(comparison)
    assert "default-src 'none'; style-src" in unescape(text)
    assert "<script" not in text
    assert "<b>c" not in text
    assert "&lt;b&gt;c &amp; \U0001f600 [red]" in text
    assert "optim.steps" in text
    assert "paired by prompt, bold where that excludes zero" in text


def test_one_objective_has_no_pair_to_be_drawn_in(comparison: Comparison) -> None:
    one = compare_runs([entry.path for group in comparison.groups for entry in group.entries], objectives=["drift"])
    assert comparison_page(one).count("<svg") < comparison_page(comparison).count("<svg")  # no pair, no front
    assert "Hypervolume of each group" in comparison_page(one)
