"""Axes of a drawing: from numbers to pixels, ticks at round numbers, a frame to draw in."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rltune.report.drawing import Line, Shape, Words

LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 30.0, 42.0
"""Around a frame: ticks, and what the axes are called."""


@dataclass(frozen=True)
class Scale:
    """Numbers along an axis."""

    low: float
    high: float
    start_px: float
    end_px: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return where a number stands."""
        low, high, at = (math.log10(v) for v in (self.low, self.high, value)) if self.is_log else (
            self.low, self.high, value,
        )  # fmt: skip
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start_px + share * (self.end_px - self.start_px)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Return round numbers on the axis, about as many as wanted."""
        if self.is_log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            decades = [10.0**power for power in range(first, last + 1)]
            return decades if len(decades) >= 2 else [self.low, self.high]
        if self.high <= self.low:
            return [self.low]
        rough = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        return [i * step for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def spanning(values: Iterable[float], start_px: float, end_px: float, *, margin: float = 0.06) -> Scale:
    """Return a scale on which all finite values have room; from -1 to 1 where there are none."""
    known = [value for value in values if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (-1.0, 1.0)
    room = (high - low) * margin or abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room, start_px, end_px)


def label(value: float) -> str:
    """Return a number on an axis, short."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:.4g}"


@dataclass(frozen=True)
class Frame:
    """Where a plot is drawn: the larger x the further right, the larger y the higher up, unless a scale is turned."""

    width: float
    height: float
    x: Scale
    y: Scale

    def axes(self, x_name: str, y_name: str, *, ticks: int = 5) -> tuple[Shape, ...]:
        """Return grid, ticks and names; y's name stands above, where it can be read."""
        left, right = sorted((self.x.start_px, self.x.end_px))
        top, bottom = sorted((self.y.start_px, self.y.end_px))
        shapes: list[Shape] = []
        for value in self.x.ticks(ticks):
            at = self.x(value)
            shapes.append(Line([(at, top), (at, bottom)], "grid"))
            shapes.append(Words(at, bottom + 15, label(value), anchor="middle"))
        for value in self.y.ticks(ticks):
            at = self.y(value)
            shapes.append(Line([(left, at), (right, at)], "grid"))
            shapes.append(Words(left - 6, at + 4, label(value), anchor="end"))
        shapes.append(Words(left, top - 12, y_name, role="ink", size=12.0))
        shapes.append(Words(right, bottom + 33, x_name, role="ink", anchor="end", size=12.0))
        return tuple(shapes)


def framed(
    width: float,
    height: float,
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    turned: tuple[bool, bool] = (False, False),
) -> Frame:
    """Return a frame with room for points; ``turned`` says for x and y whether smaller is further right or up."""
    across, up = (LEFT, width - RIGHT), (height - BOTTOM, TOP)
    x_px = across[::-1] if turned[0] else across
    y_px = up[::-1] if turned[1] else up
    return Frame(width, height, spanning(xs, *x_px), spanning(ys, *y_px))
