"""``rltune sample`` of inpainting: what is given stands above what is drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rltune.cli.sample import sample_grid
from rltune.config.experiment import RunConfig
from rltune.errors import UserError
from rltune.export.card import write_card
from rltune.training.canvases import canvas_of, kept_form, shown
from tests.cli.test_sample import cells, export

SIZE = 16
Config = Callable[..., RunConfig]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[4:12, 8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "image.png"


def draw(loras: list[Path], output: Path, **options: Any) -> None:
    chosen: dict[str, Any] = {"base": None, "num_steps": None, "guidance": None, "num_images": 2, "seed": 3}
    sample_grid(loras, options.pop("prompts", ["a snail"]), output, **{**chosen, **options})


@pytest.mark.long
def test_an_image_that_is_named_is_shown_with_its_hole_and_filled(
    make_config: Config, image: Path, tmp_path: Path
) -> None:
    lora = export(make_config(), tmp_path / "001", seed=0)  # of text to image: it can fill, too
    draw([lora], tmp_path / "page.png", image=image, mask=image.with_name("mask.png"))
    found = cells(tmp_path / "page.png", num_rows=3, num_images=2, size_px=SIZE)
    row = {"prompt": "a snail", "image": str(image), "mask": str(image.with_name("mask.png"))}
    given = shown(canvas_of(row, Path(), where=""), SIZE, SIZE)
    assert np.array_equal(found[0, 0, 0], given)
    assert np.array_equal(found[0, 0, 1], given)
    pictures = {cell.tobytes() for cell in found.values()}
    assert len(pictures) == 5  # given, and two of each model


@pytest.mark.long
def test_the_card_of_a_run_brings_its_pictures(make_config: Config, image: Path, tmp_path: Path) -> None:
    config = make_config(task="inpaint", prompts={"train": str(tmp_path), "eval": str(tmp_path)})
    lora = export(config, tmp_path / "001", seed=0)
    canvases = [canvas_of({"prompt": "a snail", "image": str(image)}, Path(), where="", masks="box")]
    card = {"base_model": config.model.base, "experiment": config.model_dump(mode="json")}
    write_card(lora, {**card, "prompts": ["a snail"], "pictures": kept_form(canvases)})
    draw([lora], tmp_path / "page.png", prompts=[])
    found = cells(tmp_path / "page.png", num_rows=3, num_images=2, size_px=SIZE)
    assert np.array_equal(found[0, 0, 0], shown(canvases[0], SIZE, SIZE))
    with pytest.raises(UserError, match=r"sample: this fills images, got --prompt 'a snail' alone; give --image too"):
        draw([lora], tmp_path / "page.png")


def test_options_that_do_not_go_together_are_refused(image: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--mask is of an image, got '.*mask\.png' alone; give --image too"):
        draw([], tmp_path / "page.png", mask=image.with_name("mask.png"))
    with pytest.raises(UserError, match=r"--image needs a prompt for what is to be drawn"):
        draw([], tmp_path / "page.png", prompts=[], image=image)
    with pytest.raises(UserError, match=r"an image cannot be read"):
        draw([], tmp_path / "page.png", image=tmp_path / "none.png")
