"""The centroid reward against open_clip's own embeddings of the reference pictures, and what it says of bad ones."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from rltune.builtin.render import render
from rltune.builtin.scenes import distinct_scenes
from rltune.errors import UserError
from rltune.rewards.base import REWARDS
from rltune.rewards.centroid import Centroid
from rltune.rewards.pictures import to_pictures

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def test_the_score_is_the_cosine_to_the_centre_of_the_pictures(clip_folder: Path, picture_folder: Path) -> None:
    model = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    files = sorted(picture_folder.glob("*.png"))
    pictures = [torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) / 255 for file in files]
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = [model.encode_image(((picture - MEAN) / STD)[None])[0] for picture in pictures]
        centre = torch.stack([vector / vector.norm() for vector in seen]).mean(0)
        expected = torch.nn.functional.cosine_similarity(model.encode_image((images - MEAN) / STD), centre[None])
    options = {"model": str(clip_folder)}
    by_folder = REWARDS.build("centroid", {**options, "images": str(picture_folder)})
    by_files = REWARDS.build("centroid", {**options, "images": [str(file) for file in files]})
    alone = REWARDS.build("centroid", {**options, "images": str(files[0])})
    for reward in (by_folder, by_files):
        torch.testing.assert_close(reward(images, ["a cat"] * 3), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(reward(images, ["a dog"] * 3), reward(images, ["a cat"] * 3))
    assert not torch.allclose(alone(images, ["a cat"] * 3), expected, atol=1e-4)
    # a picture is nearest to the centre of itself alone
    assert alone(pictures[0][None], [""]).item() == pytest.approx(1, abs=1e-5)


class Means:
    """A tower that sees the mean of each channel, on any device."""

    def image_features(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images_B3HW.mean((2, 3)), dim=1)

    def to(self, device: torch.device) -> None:
        pass


def test_the_centre_moves_with_the_model() -> None:
    reward = Centroid(Means(), [torch.ones(3, 4, 4)])  # type: ignore[arg-type]
    reward.to(torch.device("meta"))
    assert reward(torch.zeros(2, 3, 32, 32, device="meta"), ["", ""]).shape == (2,)


@pytest.mark.slow
def test_the_shipped_model_knows_the_scenes_that_it_was_shown(tmp_path: Path) -> None:
    scenes = distinct_scenes(3, 400, is_heldout=True)
    kinds = [{(group.color, group.shape) for group in scene.groups} for scene in scenes]
    rare = [scene for scene, kind in zip(scenes, kinds, strict=True) if kind == {("purple", "star")}]
    others = [scene for scene, kind in zip(scenes, kinds, strict=True) if ("purple", "star") not in kind][:32]
    assert len(rare) >= 4
    for i, picture in enumerate(to_pictures(render(rare[:3]))):
        picture.save(tmp_path / f"{i}.png")
    reward = REWARDS.build("centroid", {"images": str(tmp_path)})
    own, other = (reward(render(part), [""] * len(part)) for part in (rare[3:], others))
    assert own.min() > other.median()


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("", r"images must name the reference pictures, got ''; give files or a folder"),
        ([], r"images must name the reference pictures, got \[\]"),
        (3, r"images must be files or a folder, got 3"),
        (["a.png", 3], r"images must be files or a folder, got \['a.png', 3\]"),
        ("nowhere", r"no such file or folder, got 'nowhere'; check the path"),
        (["good.png", "gone.png"], r"no such file or folder, got 'gone.png'"),
        ("empty", r"the folder 'empty' holds no picture \(.png, .jpg, .jpeg, .webp\)"),
        (["good.png", "broken.png"], r"broken.png: is not an image that can be read"),
        ("cut.png", r"cut.png: is not an image that can be read"),
    ],
)
def test_pictures_that_are_missing_broken_or_none_are_said_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: object, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_text("no picture either")
    Image.effect_noise((64, 64), 40).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    with pytest.raises(UserError, match=f"^reward 'centroid': (images: )?(.*)?{words}"):
        REWARDS.build("centroid", {"images": images})
