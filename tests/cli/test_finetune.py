"""``rltune rewards finetune`` as a user meets it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rltune.rewards.base import REWARDS
from tests.cli.conftest import Call

NUM = 12


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    images, masks = tmp_path / "images", tmp_path / "[masks]"
    rng = np.random.default_rng(0)
    for folder in (images, masks):
        folder.mkdir()
    for i in range(NUM):
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(images / f"{i:02}.png")
        mask = np.zeros((32, 48), dtype=np.uint8)
        mask[8 : 20 + i % 3, 10:30] = 255
        Image.fromarray(mask).save(masks / f"{i:02}.webp", lossless=True)
    return images, masks


@pytest.mark.slow
def test_a_head_is_fine_tuned_on_images_with_masks_and_read_as_an_option(
    call: Call, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    images, masks = folders

    def tune(file: str, *more: str) -> Path:
        path = tmp_path / "new" / file
        options = ("--images", images, "--masks", masks, "-o", path, "--steps", "12", *more)
        code, out, err = call("rewards", "finetune", "aesthetic", *options)
        assert code == 0, err
        assert "with another ground" in out
        assert str(path) in out.replace("\n", "")
        return path

    first, same, other = tune("1.safetensors"), tune("2.safetensors"), tune("3.safetensors", "--seed", "1")
    weights = [load_file(path) for path in (first, same, other)]  # the order of a file's header is chance
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not torch.equal(weights[0]["layers.0.weight"], weights[2]["layers.0.weight"])
    reward = REWARDS.build("aesthetic", {"head": str(first)})
    shipped = REWARDS.build("aesthetic", {})
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert reward(picture, [""]).item() != shipped(picture, [""]).item()
    assert reward(picture, [""]).item() == pytest.approx(shipped(picture, [""]).item(), abs=2)  # a few small steps
    # on from there, which a seed alone does not give
    again = tune("4.safetensors", "--option", f"head={first}")
    assert not torch.equal(load_file(again)["layers.0.weight"], load_file(first)["layers.0.weight"])


@pytest.mark.slow
def test_what_stands_in_the_way_is_said_in_one_message(call: Call, folders: tuple[Path, Path], tmp_path: Path) -> None:
    images, masks = folders
    folder = tmp_path / "a.safetensors"
    folder.mkdir()
    output, both = tmp_path / "head.safetensors", ("--images", images, "--masks", masks)

    def refused(*arguments: str | Path) -> str:
        code, _, err = call("rewards", "finetune", *arguments)
        assert code == 2
        assert not output.exists()
        return " ".join(err.split())

    assert "is no head on CLIP features; give aesthetic or laion_aesthetic" in refused("brightness", "-o", output)
    assert "option 'heat' is unknown" in refused("aesthetic", "-o", output, "--option", "heat=1")
    assert "the head is a .safetensors file" in refused("aesthetic", "-o", tmp_path / "head.pth")
    assert "--output: " in refused("aesthetic", "-o", images / "00.png" / "head.safetensors")
    assert "is a folder; name a file in it" in refused("aesthetic", "-o", folder)
    assert "give --images and --masks" in refused("aesthetic", "-o", output, "--images", images)
    assert "--masks: there is no folder" in refused(
        "aesthetic", "-o", output, "--images", images, "--masks", tmp_path / "no"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty holds none (.png" in refused("aesthetic", "-o", output, "--images", empty, "--masks", masks)
    Image.new("L", (48, 32)).save(masks / "03.webp")
    assert "marks nothing as the object" in refused("aesthetic", "-o", output, *both)
    Image.new("L", (8, 8), 255).save(masks / "03.webp")
    assert "03.webp must be as large as its image, 48 x 32, got 8 x 8" in refused("aesthetic", "-o", output, *both)
    Image.new("RGB", (8, 8)).save(images / "03.png")
    assert "images must be of one size" in refused("aesthetic", "-o", output, *both)
    (masks / "03.webp").unlink()
    assert "has none of 03.png; a mask has the name of its image" in refused("aesthetic", "-o", output, *both)
    for i in range(4, NUM):
        (images / f"{i:02}.png").unlink()
    (images / "03.png").unlink()
    assert "takes 10 or more, got 3" in refused("aesthetic", "-o", output, *both)
