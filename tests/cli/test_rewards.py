"""``rltune rewards check`` as a user meets it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import Call


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")  # grey and odd-sized
    return tmp_path / "grey.png"


def test_a_built_in_reward_is_proved_on_built_in_scenes(call: Call) -> None:
    code, out, _ = call("rewards", "check", "brightness")
    assert code == 0
    for part in ("range", "0 to 1", "ms without gradient", "activations", "independence", "ok"):
        assert part in out
    code, out, _ = call("rewards", "check", "diversity_pixels")
    assert code == 0
    assert "gradient" in out


def test_an_image_and_a_prompt_of_ones_own(call: Call, picture: Path) -> None:
    code, out, _ = call("rewards", "check", "brightness", "--image", picture, "--prompt", "a [fat] cat")
    mean = np.asarray(Image.open(picture)).mean() / 255
    assert code == 0
    assert "a [fat] cat (grey.png)" in out
    assert f"{mean:.4f}" in out
    assert "53 x 37" in out


@pytest.mark.slow
def test_options_are_values_as_after_set(call: Call) -> None:
    options = ("--option", "of=red stars", "--option", "target=2")
    assert call("rewards", "check", "count", *options)[0] == 0
    code, _, err = call("rewards", "check", "count", "--option", "of=red stars", "--option", "target=two")
    assert code == 2
    assert "target must be a whole number" in err
    code, _, err = call("rewards", "check", "count", "--option", "target")
    assert code == 2
    assert "--option: must be KEY=VALUE, got 'target'" in err


def test_a_reward_of_ones_own_that_leaks_is_named(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaky_rewards.py").write_text(
        "def leaky(images, prompts):\n    x = images.mean(dim=(1, 2, 3))\n    return x - x.mean()\n"
    )
    monkeypatch.chdir(tmp_path)
    code, _, err = call("rewards", "check", "leaky_rewards:leaky")
    assert code == 1
    assert "depends on the other images of the batch" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("brightnes",), "did you mean 'brightness'"),
        (("brightness", "--option", "gain=2"), "option 'gain' is unknown; it takes none"),
        (("brightness", "--image", "no.png", "--prompt", "a"), "no.png: is not an image that can be read"),
        (("brightness", "--prompt", "a", "--prompt", "b"), "give one prompt or 4, got 2"),
        (("no_module:f",), "there is no module 'no_module'"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(call: Call, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = call("rewards", "check", *arguments)
    assert code == 2
    assert message in err


def test_images_need_prompts_and_one_size(call: Call, picture: Path, tmp_path: Path) -> None:
    code, _, err = call("rewards", "check", "brightness", "--image", picture)
    assert code == 2
    assert "--prompt: give one, or one an image (1), got 0" in err
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    both = ("--image", picture, "--image", tmp_path / "small.png", "--prompt", "a")
    code, _, err = call("rewards", "check", "brightness", *both)
    assert code == 2
    assert "images must be of one size, got 53 x 37, 8 x 8" in err


@pytest.mark.slow
def test_an_audit_says_what_a_score_hangs_on_and_shows_it(call: Call, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    files: list[str | Path] = []
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"[{i}].png")
        mask = np.zeros((20, 30), dtype=np.uint8)
        mask[5:15, 6:18] = 255
        Image.fromarray(mask).save(tmp_path / f"mask {i}.png")
        files += ["--image", tmp_path / f"[{i}].png", "--mask", tmp_path / f"mask {i}.png"]
    code, out, _ = call("rewards", "audit", "brightness", *files, "--prompt", "a [cat]", "-o", tmp_path / "audit.png")
    assert code == 0
    assert out.count("another image") == 3
    assert "20% of the pixels" in out
    assert "20% of the squared gradient" in out  # of the mean of all pixels
    with Image.open(tmp_path / "audit.png") as picture:
        assert picture.height > 5 * 128
    code, _, err = call("rewards", "audit", "brightness", *files[:2], "--prompt", "a cat")
    assert code == 2
    assert "--mask: give one an image (1), got 0" in err
    Image.new("L", (8, 8)).save(tmp_path / "mask 2.png")
    code, _, err = call("rewards", "audit", "brightness", *files, "--prompt", "a cat")
    assert code == 2
    assert "mask 2.png must be as large as its image, 30 x 20, got 8 x 8" in err
    code, _, err = call("rewards", "audit", "brightness", "--prompt", "a cat")
    assert code == 2
    assert "the built-in scenes have theirs" in err


@pytest.mark.slow
def test_an_audit_of_built_in_scenes(call: Call) -> None:
    code, out, _ = call("rewards", "audit", "compressibility")
    assert code == 0
    assert "of the squared gradient" in out
    code, _, err = call("rewards", "audit", "diversity_pixels")
    assert code == 2
    assert "compares the images of a prompt" in err
