import numpy as np
import pytest
from PIL import ImageFont

from rltune.training import captions
from rltune.training.captions import MORE, Lettering, lettering
from rltune.training.grids import LABEL_PX, MARGIN_PX, MAX_LABEL_PX, MIN_IMAGE_PX, labelled_grid

ASCII = Lettering(ImageFont.load_default(13), range(0x20, 0x7F))


@pytest.mark.parametrize(
    "text",
    [
        "a cat",
        "a cat\na dog",
        "one " * 80,
        "x" * 500,
        "a cat, " + "masterpiece, " * 30,
        "\u96ea" * 40,
        "",
        "a\u2028b\tc",
    ],
)
@pytest.mark.parametrize("max_lines", [1, 4, 1000])
def test_lines_fit_and_nothing_is_lost_but_what_dots_stand_for(text: str, max_lines: int) -> None:
    lines = ASCII.wrap(text, 200, max_lines)
    assert 1 <= len(lines) <= max_lines
    assert all(ASCII.font.getlength(line) <= 200 for line in lines)
    whole = "".join(ASCII.spell(part) for part in text.split())
    written = "".join("".join(lines).split())
    if written.endswith(MORE):
        assert max_lines < 1000
        assert whole.startswith(written.removesuffix(MORE))
    else:
        assert written == whole


def test_a_new_line_is_a_new_line() -> None:
    assert ASCII.wrap("a cat\na dog", 200, 4) == ["a cat", "a dog"]


def test_characters_that_no_font_has_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "_fonts", lambda: [])
    letters = lettering(["a \u96ea", "\U0001f600"])
    assert letters.spell("a \u96ea \U0001f600") == r"a \u96ea \U0001f600"


def test_a_font_that_has_the_characters_is_found() -> None:
    assert lettering(["a cat"]).spell("a cat") == "a cat"
    text = "\u0416\u03b1\u00e9\u0142"  # what comes with matplotlib has these
    letters = lettering([text])
    assert letters.spell(text) == text
    boxes = {letters.font.getmask(letter).getbbox() for letter in text}
    assert len(boxes) > 1  # not one box for all


def test_the_page_is_as_wide_as_its_pictures_whatever_the_prompt() -> None:
    row = np.zeros((4, 64, 64, 3), np.uint8)
    side = 64 * (MIN_IMAGE_PX // 64)
    short, long, two = (
        labelled_grid([row, row], ["base", "a"], [prompt, "b"], num_images=2)
        for prompt in ("a", "masterpiece, " * 100, "a cat\nin a hat")
    )
    assert long.width == two.width == short.width < 100 + 2 * (side + MARGIN_PX)
    assert two.height == short.height + LABEL_PX
    assert long.height == short.height + 3 * LABEL_PX
    # the second line stands above the pictures, which are black: between them and the text there is white
    pixels = np.asarray(two.convert("L"))
    text = pixels[LABEL_PX : 2 * LABEL_PX]
    assert text.min() < 100
    assert (pixels[2 * LABEL_PX : 2 * LABEL_PX + side, -(side + MARGIN_PX) : -MARGIN_PX] == 0).all()
    wide = labelled_grid([row], ["run/" * 100], ["a"], num_images=1)
    assert wide.width <= MAX_LABEL_PX + 2 * MARGIN_PX + side + MARGIN_PX
