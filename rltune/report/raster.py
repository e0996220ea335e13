"""A drawing as PNG, by Pillow: the same shapes and colours as its SVG, in light."""

import io
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rltune.report.drawing import PALETTE, Box, Dot, Drawing, Line, Words, diamond
from rltune.report.markup import clean

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

SCALE = 2
"""Pixels of the file a pixel of the drawing."""
FINER = 2
"""Drawn so many times larger, then made smaller: Pillow's lines have hard edges."""


def to_png(drawing: Drawing) -> bytes:
    """Return a drawing as a PNG file, ``SCALE`` times its size."""
    from PIL import Image, ImageDraw

    scale = SCALE * FINER
    size = (round(drawing.width * scale), round(drawing.height * scale))
    page = Image.new("RGB", size, PALETTE["paper"][0])
    draw = ImageDraw.Draw(page, "RGBA")
    for shape in drawing.shapes:
        match shape:
            case Line():
                _draw_line(draw, shape, scale)
            case Dot():
                _draw_dot(draw, shape, scale)
            case Box():
                left, top = shape.x * scale, shape.y * scale
                corner = (max(left + shape.width * scale - 1, left), max(top + shape.height * scale - 1, top))
                draw.rectangle((left, top, *corner), fill=PALETTE[shape.role][0])
            case Words():
                anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
                place = (shape.x * scale, shape.y * scale)
                font = _font(round(shape.size * scale))
                draw.text(place, clean(shape.text), fill=PALETTE[shape.role][0], font=font, anchor=anchor)
    small = page.reduce(FINER)
    file = io.BytesIO()
    small.save(file, "PNG")
    return file.getvalue()


def _draw_line(draw: "ImageDraw", line: Line, scale: int) -> None:
    color, width = PALETTE[line.role][0], max(round(line.width * scale), 1)
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    points = [(x * scale, y * scale) for x, y in line.points]
    for part in _dashes(points, 3 * scale) if line.is_dashed else [points]:
        draw.line(part, fill=(red, green, blue, round(255 * line.opacity)), width=width, joint="curve")


def _dashes(points: list[tuple[float, float]], length: float) -> list[list[tuple[float, float]]]:
    dashes = []
    for (x0, y0), (x1, y1) in pairwise(points):
        count = max(int(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5 / length), 1)
        at = [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count + 1)]
        dashes += [[at[i], at[i + 1]] for i in range(0, count, 2)]
    return dashes


def _draw_dot(draw: "ImageDraw", dot: Dot, scale: int) -> None:
    color = PALETTE[dot.role][0]
    style = {"outline": color, "width": scale} if dot.is_hollow else {"fill": color}
    if dot.is_square:
        draw.polygon([(x * scale, y * scale) for x, y in diamond(dot)], **style)
    else:
        corners = [(dot.x + sign * dot.radius, dot.y + sign * dot.radius) for sign in (-1, 1)]
        draw.ellipse([(x * scale, y * scale) for x, y in corners], **style)


@cache
def _font(size: int) -> Any:
    """Return DejaVu, which comes with matplotlib and has the letters of Europe; else Pillow's own."""
    from PIL import ImageFont

    found = find_spec("matplotlib")
    for folder in (found.submodule_search_locations or ()) if found else ():
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    return ImageFont.load_default(size)
