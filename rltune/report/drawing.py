"""A picture of lines, dots and words: made once, and shown as SVG, in the page and as a file, or as PNG.

What a shape looks like is a role, a name in ``PALETTE``: the page has each in light and in dark, files in light.
Lengths are pixels, y grows downwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rltune.report.markup import Markup, join, tag

RAMP = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
"""From low to high: viridis, which the colour-blind tell apart and greys keep in order."""
RAMP_IN_DARK = ("#8c66d0", "#6f7bdc", "#5595dc", "#45afc6", "#43c6a0", "#7bd66c", "#bbe34c", "#fde725")
"""The same, without what would be as dark as the page."""
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e8eaed"),
    "dim": ("#5c6570", "#a3acb6"),
    "grid": ("#e3e7eb", "#31373e"),
    "paper": ("#ffffff", "#16191d"),
    "base": ("#1b1f24", "#f1f3f5"),
    "trial": ("#a4aeb9", "#69737d"),
    "member": ("#2f5fd0", "#86a8ff"),
    "knee": ("#d9480f", "#ffa94d"),
    "soup": ("#0b7285", "#66d9e8"),
    "bad": ("#c2255c", "#faa2c1"),
    "chance": ("#e3e7eb", "#31373e"),
    **{f"ramp{i}": pair for i, pair in enumerate(zip(RAMP, RAMP_IN_DARK, strict=True))},
}
"""Role -> its colour in light and in dark."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Line:
    """Straight lines through points."""

    points: Sequence[tuple[float, float]]
    role: str
    width: float = 1.0
    is_dashed: bool = False
    opacity: float = 1.0
    trial: str | None = None
    """Whose it is: a click on it shows that trial."""
    bins: Sequence[int] = ()
    """Its place on ``RAMP`` by each of the settings that it can be coloured by."""


@dataclass(frozen=True)
class Dot:
    """A circle, or a square that stands on its corner."""

    x: float
    y: float
    radius: float
    role: str
    is_square: bool = False
    is_hollow: bool = False
    trial: str | None = None


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float
    role: str


@dataclass(frozen=True)
class Words:
    """A line of text; ``y`` is its base line."""

    x: float
    y: float
    text: str
    role: str = "dim"
    anchor: Anchor = "start"
    size: float = 11.0


Shape = Line | Dot | Box | Words


@dataclass(frozen=True)
class Drawing:
    """Shapes on a page, those that come later on top."""

    width: float
    height: float
    shapes: tuple[Shape, ...]
    title: str
    """What it shows, in words, for those who cannot see it."""


def to_svg(drawing: Drawing, *, is_file: bool = False) -> Markup:
    """Return a drawing as SVG: an element of the page, or a file that stands by itself, in light."""
    shapes = join(*(_element(shape) for shape in drawing.shapes))
    box = f"0 0 {drawing.width:g} {drawing.height:g}"
    if not is_file:
        return tag(
            "svg", tag("title", drawing.title), shapes, viewBox=box, role="img", class_="drawing",
            width=drawing.width, height=drawing.height,
        )  # fmt: skip
    style = tag("style", Markup(styles(is_dark=False) + shape_rules()))
    paper = tag("rect", width="100%", height="100%", class_="f-paper")
    return tag(
        "svg", tag("title", drawing.title), style, paper, shapes, xmlns="http://www.w3.org/2000/svg", viewBox=box,
        width=drawing.width, height=drawing.height,
    )  # fmt: skip


def styles(*, is_dark: bool) -> str:
    """Return the colours of all roles, as properties of the root element."""
    return f":root{{{''.join(f'--{role}:{pair[is_dark]};' for role, pair in PALETTE.items())}}}"


def shape_rules() -> str:
    """Return the style rules by which shapes have the colours of their roles."""
    rules = (f".f-{role}{{fill:var(--{role})}}.s-{role}{{stroke:var(--{role});fill:none}}" for role in PALETTE)
    return "".join(rules) + f"text{{font-family:{FONT}}}"


def _element(shape: Shape) -> Markup:
    match shape:
        case Line():
            return tag(
                "polyline",
                points=" ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points),
                class_=f"s-{shape.role}",
                stroke_width=shape.width,
                stroke_dasharray="3 3" if shape.is_dashed else None,
                opacity=None if shape.opacity == 1 else f"{shape.opacity:g}",
                data_t=shape.trial,
                data_bins=" ".join(map(str, shape.bins)) or None,
            )
        case Dot():
            kind = f"s-{shape.role}" if shape.is_hollow else f"f-{shape.role}"
            if shape.is_square:
                corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in diamond(shape))
                return tag("polygon", points=corners, class_=kind, data_t=shape.trial)
            return tag("circle", cx=shape.x, cy=shape.y, r=shape.radius, class_=kind, data_t=shape.trial)
        case Box():
            return tag("rect", x=shape.x, y=shape.y, width=shape.width, height=shape.height, class_=f"f-{shape.role}")
        case Words():
            anchor = None if shape.anchor == "start" else shape.anchor
            return tag(
                "text", shape.text, x=shape.x, y=shape.y, class_=f"f-{shape.role}", text_anchor=anchor,
                font_size=shape.size,
            )  # fmt: skip


def diamond(dot: Dot) -> list[tuple[float, float]]:
    """Return the corners of a square on its corner, as large as the circle looks."""
    r = dot.radius * 1.3
    return [(dot.x, dot.y - r), (dot.x + r, dot.y), (dot.x, dot.y + r), (dot.x - r, dot.y)]
