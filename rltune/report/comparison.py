"""Runs side by side as one page: hypervolumes with their intervals, what is attained, which settings differ."""

from collections.abc import Sequence
from datetime import datetime
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

import rltune
from rltune.report.axes import Frame, framed
from rltune.report.document import document
from rltune.report.drawing import Dot, Drawing, Line, Shape, Words, to_svg
from rltune.report.markup import Markup, clean, join, tag
from rltune.report.words import fitted, listed, shown_value
from rltune.runs.compare import Comparison, Group, Pair

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
ROLES = ("member", "knee", "ramp4", "bad", "ramp0", "dim")
"""Colours of groups, one after the other."""
WIDTH, HEIGHT = 420.0, 350.0
ROW_PX = 30.0
NAMES_PX = 56.0

Array = npt.NDArray[np.float64]


def comparison_page(comparison: Comparison) -> str:
    """Return the page; it has no script."""
    clean.cache_clear()
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    several = [group for group in comparison.groups if len(group.entries) > 1]
    names = ", ".join(entry.path.name for group in comparison.groups for entry in group.entries)
    main = tag(
        "main",
        tag("h1", "Runs side by side"),
        tag("p", f"rltune {rltune.__version__}, {now}.", class_="dim"),
        tag("p", f"Which of them reaches more, over {listed(comparison.objectives)}?", class_="question"),
        _groups(comparison),
        _figures(volume_drawing(comparison)),
        _pairs(comparison),
        _fronts(comparison, has_seeds=bool(several)),
        _attained(several) if several else None,
        _settings(comparison),
        tag("h2", "How to read it"),
        tag("p", " ".join(notes(comparison)), class_="dim"),
    )
    return document(f"{names}: rltune compare", main)


def interval(value: float, half: float | None, *, sign: str = "") -> str:
    """Return a hypervolume, or a difference of two, with half the width of its interval."""
    return f"{value:{sign}.3f}" + ("" if half is None else f" {PLUS_MINUS} {half:.2g}")


def is_sure(pair: Pair) -> bool:
    """Whether the interval of a difference excludes zero."""
    value, half = pair.difference
    return half is not None and abs(value) > half


def shares(pair: Pair) -> list[str]:
    """Return which share of each front's members the other has a better one of."""
    labels = (pair.first.label, pair.second.label)
    return [
        f"{label} has none" if share is None else f"{share:.0%} of {label}"
        for label, share in zip(labels, pair.dominated, strict=True)
    ]


def attained_by(group: Group) -> list[str]:
    """Return the hypervolume that some of a group's runs, half of them and all of them attain."""
    volumes = group.attained
    return [f"{volume:.3f}" for volume in (volumes[0], volumes[_half(group)], volumes[-1])]


def notes(comparison: Comparison) -> list[str]:
    """Return what the numbers are, in sentences or parts of them."""
    num, is_fresh = comparison.num_prompts, comparison.is_fresh
    has_seeds = any(len(group.entries) > 1 for group in comparison.groups)
    over = "prompts and, within a group, seeds" if has_seeds else "prompts"
    if is_fresh:
        parts = [f"Measured again on {num} prompts, and noise, that no trial was chosen by."]
        parts.append(f"{PLUS_MINUS}: 95 % intervals over {over}; differences are paired by prompt, bold where that")
        parts.append("excludes zero.")
    else:
        parts = [
            "By the numbers that members were chosen by, since not every front was measured again: luck has raised"
        ]
        parts.append("them, and intervals over prompts are not known.")
    if has_seeds:
        parts.append("Runs of a letter differ in their seeds alone. Attained: where so many of them have a member that")
        parts.append("is as good, by its mean.")
    if comparison.pairs:
        parts.append("Dominated: the share of a front's members that the other has a better one of, by their means.")
    sizes, references = comparison.unit_D.tolist(), comparison.reference_D.tolist()
    units = ", ".join(f"{name} {size:.3g}" for name, size in zip(comparison.objectives, sizes, strict=True))
    reference = ", ".join(f"{name} {at:.3f}" for name, at in zip(comparison.objectives, references, strict=True))
    parts.append(f"Hypervolumes are in units of the base model ({units}), from the reference point {reference};")
    parts.append("the base model alone has 1.")
    return parts


def volume_drawing(comparison: Comparison) -> Drawing:
    """Draw the hypervolume of each group with its interval, and of each of its runs."""
    ends = [value + side * (half or 0.0) for value, half in _volumes(comparison) for side in (-1, 1)]
    singles = [float(entry.volumes_P.mean()) for group in comparison.groups for entry in group.entries]
    height = ROW_PX * len(comparison.groups) + 72
    frame = framed(WIDTH, height, [1.0, *ends, *singles], [0.0, 1.0])
    left, right, bottom = NAMES_PX, frame.x.end_px, height - 42
    shapes: list[Shape] = []
    for tick in frame.x.ticks(5):
        shapes.append(Line([(frame.x(tick), 24), (frame.x(tick), bottom)], "grid"))
        shapes.append(Words(frame.x(tick), bottom + 15, f"{tick:g}", anchor="middle"))
    shapes.append(Line([(frame.x(1.0), 24), (frame.x(1.0), bottom)], "dim"))
    shapes.append(Words(frame.x(1.0) + 5, 18, "base model alone"))
    shapes.append(Words(right, bottom + 33, "hypervolume", role="ink", anchor="end", size=12.0))
    for i, (group, (value, half)) in enumerate(zip(comparison.groups, _volumes(comparison), strict=True)):
        y, role = 24 + ROW_PX * (i + 0.5), _role(i)
        shapes.append(Words(left - 22, y + 4, group.label, role="ink", anchor="end", size=13.0))
        if len(group.entries) > 1:
            shapes += [Dot(frame.x(float(e.volumes_P.mean())), y, 3.5, role, is_hollow=True) for e in group.entries]
        if half is not None:
            shapes.append(Line([(frame.x(value - half), y), (frame.x(value + half), y)], role, width=2.0))
        shapes.append(Dot(frame.x(value), y, 5.5, role))
    return Drawing(WIDTH, height, tuple(shapes), "Hypervolume of each group of runs, with its 95 % interval")


def front_drawing(comparison: Comparison, x: int, y: int) -> Drawing:
    """Draw the members of all fronts in two objectives, as gains over the base model; of two alone, what is attained.

    A solid line bounds what half of a group's runs attain, dashed ones what one and what all do.
    """
    gains = {entry.path: _gains(comparison, entry.points_ND) for group in comparison.groups for entry in group.entries}
    is_smaller_better = comparison.signs_D < 0
    frame = framed(
        WIDTH,
        HEIGHT,
        [0.0, *(row[x] for points in gains.values() for row in points)],
        [0.0, *(row[y] for points in gains.values() for row in points)],
        turned=(bool(is_smaller_better[x]), bool(is_smaller_better[y])),
    )
    shapes: list[Shape] = [*frame.axes(*(_axis(comparison, i) for i in (x, y)))]
    for i, group in enumerate(comparison.groups):
        if len(comparison.objectives) == 2:
            ways = dict.fromkeys((_half(group), 0, len(group.entries) - 1))  # the solid line first, and once
            for order, k in enumerate(ways):
                corners = _gains(comparison, group.surfaces[k])
                if corners:
                    line = _stairs(frame, corners)
                    shapes.append(
                        Line(line, _role(i), 2.0 if order == 0 else 1.2, order > 0, 1.0 if not order else 0.7)
                    )
        for entry in group.entries:
            shapes += [Dot(frame.x(row[x]), frame.y(row[y]), 4.5, _role(i)) for row in gains[entry.path]]
    shapes.append(Dot(frame.x(0.0), frame.y(0.0), 5.0, "base", is_square=True))
    names = (comparison.objectives[x], comparison.objectives[y])
    return Drawing(WIDTH, HEIGHT, tuple(shapes), f"Gain in {names[1]} against gain in {names[0]}, a dot a member")


def _groups(comparison: Comparison) -> Markup:
    head = tag(
        "tr",
        *(tag("th", name) for name in ("", "hypervolume", "front", "trials", "seed")),
        tag("th", "run", class_="text"),
    )
    rows = []
    for i, group in enumerate(comparison.groups):
        for j, entry in enumerate(group.entries):
            first = (_mark(i), group.label, interval(*group.hypervolume)) if not j else (None, "", "")
            rows.append(
                tag(
                    "tr",
                    tag("td", *first[:2]),
                    *(tag("td", text) for text in (first[2], str(len(entry.members)), str(entry.num_trials))),
                    tag("td", str(entry.seeds["seed"])),
                    tag("td", str(entry.path), class_="text"),
                )
            )
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll")


def _pairs(comparison: Comparison) -> Markup | None:
    if not comparison.pairs:
        return None
    rows = []
    for pair in comparison.pairs:
        text = interval(*pair.difference, sign="+")
        difference = tag("b", text) if is_sure(pair) else text
        first, second = shares(pair)
        cells = (f"{pair.first.label} - {pair.second.label}", difference, first, second)
        rows.append(tag("tr", *(tag("td", cell) for cell in cells)))
    head = tag("tr", *(tag("th", name) for name in ("", "hypervolume", "dominated by the other", "")))
    table = tag("table", tag("thead", head), tag("tbody", *rows))
    return join(tag("h2", "Differences"), tag("div", table, class_="scroll tall"))


def _fronts(comparison: Comparison, *, has_seeds: bool) -> Markup | None:
    pairs = list(combinations(range(len(comparison.objectives)), 2))
    if not pairs:
        return None
    note = "A dot a member of a front, by its gains over the base model; better is to the right and above."
    if len(comparison.objectives) == 2:
        note += " A line bounds what a front attains"
        note += (
            ": solid what half of a letter's runs do, dashed what one of them and what all do." if has_seeds else "."
        )
    drawings = [front_drawing(comparison, x, y) for x, y in pairs]
    return join(tag("h2", "Fronts"), _legend(comparison), _figures(*drawings), tag("p", note, class_="dim"))


def _attained(several: Sequence[Group]) -> Markup:
    rows = [tag("tr", tag("td", group.label), *(tag("td", text) for text in attained_by(group))) for group in several]
    head = tag("tr", *(tag("th", name) for name in ("", "some run", "half of them", "every run")))
    table = tag("table", tag("thead", head), tag("tbody", *rows))
    return join(tag("h2", "Hypervolume attained by"), tag("div", table, class_="scroll"))


def _settings(comparison: Comparison) -> Markup | None:
    if not comparison.differing:
        return None
    rows = [
        tag("tr", tag("th", path), *(tag("td", _shown(value), class_="text") for value in row))
        for path, row in comparison.differing.items()
    ]
    head = tag("tr", tag("th", ""), *(tag("th", group.label, class_="text") for group in comparison.groups))
    table = tag("table", tag("thead", head), tag("tbody", *rows))
    return join(tag("h2", "Settings that differ"), tag("div", table, class_="scroll"))


def _shown(value: Any) -> str:
    return "-" if value is None else shown_value(value)


def _legend(comparison: Comparison) -> Markup:
    marks = [
        tag("span", _mark(i), f"{group.label}: {', '.join(entry.path.name for entry in group.entries)}")
        for i, group in enumerate(comparison.groups)
    ]
    base = tag("span", to_svg(Drawing(14, 14, (Dot(7, 7, 5, "base", is_square=True),), "")), "base model")
    return tag("div", base, *marks, class_="legend")


def _figures(*drawings: Drawing) -> Markup:
    return tag("div", *(tag("figure", to_svg(drawing)) for drawing in drawings), class_="figures")


def _mark(i: int) -> Markup:
    return to_svg(Drawing(14, 14, (Dot(7, 7, 5, _role(i)),), ""))


def _role(i: int) -> str:
    return ROLES[i % len(ROLES)]


def _half(group: Group) -> int:
    """Return the place of what half of a group's runs attain among its surfaces."""
    return (len(group.entries) + 1) // 2 - 1


def _volumes(comparison: Comparison) -> list[tuple[float, float | None]]:
    return [group.hypervolume for group in comparison.groups]


def _gains(comparison: Comparison, points_ND: Array) -> list[list[float]]:
    """Return gains over the base model as they are reported, of points in units with the base model at 1."""
    gains: list[list[float]] = ((points_ND - 1) * comparison.unit_D * comparison.signs_D).tolist()
    return gains


def _axis(comparison: Comparison, i: int) -> str:
    better = "" if comparison.signs_D[i] > 0 else ", less is better"
    return f"gain in {fitted(comparison.objectives[i])}{better}"


def _stairs(frame: Frame, corners: list[list[float]]) -> list[tuple[float, float]]:
    """Return the line around what corners attain, from the top left of the frame's part of it to the bottom right."""
    at = sorted((frame.x(x), frame.y(y)) for x, y in corners)
    (left, _), bottom = sorted((frame.x.start_px, frame.x.end_px)), max(frame.y.start_px, frame.y.end_px)
    line = [(left, at[0][1])]
    for (x, y), (_, below) in zip(at, [*at[1:], (0.0, bottom)], strict=True):
        line += [(x, y), (x, below)]
    return line
