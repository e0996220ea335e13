import io
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

from rltune.report.axes import Scale, framed, label
from rltune.report.drawing import PALETTE, Box, Dot, Drawing, Line, Words, to_svg
from rltune.report.raster import SCALE, to_png

DRAWING = Drawing(
    100,
    60,
    (
        Box(0, 0, 20, 20, "member"),
        Line([(30, 30), (90, 30)], "ink", width=4),
        Dot(50, 10, 6, "knee", trial="001"),
        Dot(80, 10, 6, "bad", is_square=True),
        Words(10, 50, "<\N{GREEK SMALL LETTER ALPHA}&\0"),
    ),
    "A <title>",
)


@pytest.mark.parametrize("is_file", [False, True])
def test_an_svg_is_well_formed(is_file: bool) -> None:
    root = ElementTree.fromstring(to_svg(DRAWING, is_file=is_file))
    kinds = [node.tag.rpartition("}")[2] for node in root.iter()]
    assert {"rect", "polyline", "circle", "polygon", "text", "title"} <= set(kinds)
    assert ("style" in kinds) == is_file


def test_a_png_has_the_same_shapes_at_the_same_places() -> None:
    picture = Image.open(io.BytesIO(to_png(DRAWING))).convert("RGB")
    assert picture.size == (100 * SCALE, 60 * SCALE)
    for (x, y), role in {(10, 10): "member", (60, 30): "ink", (50, 10): "knee", (80, 10): "bad"}.items():
        color = PALETTE[role][0]
        assert picture.getpixel((x * SCALE, y * SCALE)) == tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)), role
    assert picture.getpixel((95 * SCALE, 55 * SCALE)) == (255, 255, 255)
    assert min(picture.convert("L").crop((20, 80, 60, 104)).tobytes()) < 140  # the words


def test_a_scale_is_linear_in_numbers_or_in_their_logarithms() -> None:
    assert Scale(0, 4, 100, 300)(1) == 150
    assert Scale(1e-4, 1e-2, 0, 10, is_log=True)(1e-3) == pytest.approx(5)
    assert Scale(3, 3, 0, 10)(3) == 5


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(-0.3, 1.1, [0, 0.5, 1.0]), (0, 10, [0, 2, 4, 6, 8, 10]), (-0.02, 0.013, [-0.02, -0.01, 0, 0.01])],
)
def test_ticks_stand_at_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert Scale(low, high, 0, 1).ticks() == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.05, "0.05"), (2e-4, "2e-4"), (1e6, "1e6"), (1234.5, "1234")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert label(value) == text


def test_better_is_up_also_where_less_is_better() -> None:
    frame = framed(200, 200, [0, 1], [0, 1], turned=(False, True))
    assert frame.x(1) > frame.x(0)
    assert frame.y(0) < frame.y(1)  # pixels grow downwards
