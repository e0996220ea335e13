"""Prompts with pictures: where they come from, what is drawn of them, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rltune.canvas import Canvas
from rltune.config.experiment import RunConfig
from rltune.errors import UserError
from rltune.runs.record import prompts_digest
from rltune.training.canvases import (
    HOLE,
    Masks,
    Pictured,
    canvas_of,
    check_pictures,
    digest_of,
    draw_hole,
    hole_in_words,
    kept_form,
    load_canvases,
    shown,
)
from rltune.training.heldout import distinct, fresh_prompts, search_prompts

HEIGHT, WIDTH = 24, 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of noise, the first two with a mask."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    for i in range(2):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[4:12, 8 : 16 + 8 * i] = 255
        Image.fromarray(mask).save(tmp_path / "pictures" / f"{i}.mask.png")
    return tmp_path


ROWS: list[dict[str, Any]] = [
    {"prompt": "a cat", "image": "pictures/0.png", "mask": "pictures/0.mask.png"},
    {"prompt": "a dog", "image": "pictures/1.png", "mask": "pictures/1.mask.png"},
    {"prompt": "a fox", "image": "pictures/2.png", "mask": ""},
]


def as_jsonl(folder: Path) -> Path:
    path = folder / "set.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


def as_json(folder: Path) -> Path:
    path = folder / "set.json"
    path.write_text(json.dumps(ROWS))
    return path


def as_csv(folder: Path) -> Path:
    path = folder / "set.csv"
    path.write_text("\n".join(["mask,image,prompt", *(f"{r['mask']},{r['image']},{r['prompt']}" for r in ROWS)]))
    return path


def as_parquet(folder: Path) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    path = folder / "set.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def as_folder(folder: Path) -> Path:
    for i, row in enumerate(ROWS):
        (folder / "pictures" / f"{i}.txt").write_text(row["prompt"] + "\n")
    return folder / "pictures"


def load(path: Path | str, masks: Masks = "mixed") -> tuple[Canvas, ...]:
    prompts = load_canvases(str(path), where="prompts.train", masks=masks).prompts
    assert all(isinstance(prompt, Canvas) for prompt in prompts)
    return prompts  # type: ignore[return-value]  # just asserted


@pytest.mark.parametrize("write", [as_jsonl, as_json, as_csv, as_parquet, as_folder])
def test_tables_and_folders_hold_the_same_pictures(
    folder: Path, write: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")  # paths are relative to the table
    canvases = load(write(folder))
    check_pictures(canvases)
    assert [str(canvas) for canvas in canvases] == ["a cat", "a dog", "a fox"]
    for i, canvas in enumerate(canvases):
        image, mask = canvas.read(HEIGHT, WIDTH)
        assert np.array_equal(image, np.asarray(Image.open(folder / "pictures" / f"{i}.png")))
        if i < 2:
            assert np.array_equal(mask, np.asarray(Image.open(folder / "pictures" / f"{i}.mask.png")) > 0)
    words = hole_in_words("a fox", 2, "mixed")
    found = HOLE.fullmatch(words)
    assert found is not None
    assert np.array_equal(canvases[2].read(HEIGHT, WIDTH)[1], draw_hole(found, HEIGHT, WIDTH))


def test_pictures_of_another_size_are_resized_as_diffusers_does(folder: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor

    images = VaeImageProcessor(vae_scale_factor=8)
    masks = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    image, mask = load(as_jsonl(folder))[0].read(16, 16)
    theirs = images.preprocess(Image.open(folder / "pictures" / "0.png"), 16, 16)[0]
    where = masks.preprocess(Image.open(folder / "pictures" / "0.mask.png"), 16, 16)[0, 0]
    assert np.allclose(2 * (image / 255) - 1, theirs.permute(1, 2, 0).numpy(), atol=1e-6)
    assert np.array_equal(mask, where.numpy() == 1)


@pytest.mark.long
def test_the_built_in_world_has_a_picture_of_every_prompt_and_the_same_each_time() -> None:
    for name in ("builtin", "builtin-heldout"):
        canvases = load(name)
        check_pictures(canvases)
        images = np.stack([canvas.read(64, 64)[0] for canvas in canvases[:8]])
        assert images.shape == (8, 64, 64, 3)
        assert np.array_equal(images, np.stack([canvas.read(64, 64)[0] for canvas in load(name)[:8]]))
        assert len({image.tobytes() for image in images}) == 8


def test_a_builtin_picture_shows_what_the_prompt_says() -> None:
    canvas = canvas_of(
        {"prompt": "one red circle on a blue background, even light", "image": "builtin"}, Path(), where=""
    )
    image = canvas.read(64, 64)[0].astype(float)
    ground = np.median(image[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
    assert ground[2] > ground[0] + 50  # blue
    is_red = (image[..., 0] > image[..., 2] + 60) & (image[..., 0] > image[..., 1] + 60)
    assert 0.05 < is_red.mean() < 0.5


def test_drawn_masks_follow_prompt_and_row_alone_and_are_whole_latents() -> None:
    kinds = set()
    for index in range(64):
        words = hole_in_words("a cat", index, "mixed")
        assert words == hole_in_words("a cat", index, "mixed")
        found = HOLE.fullmatch(words)
        assert found is not None
        mask = draw_hole(found, 64, 64)
        assert np.array_equal(mask, np.kron(mask[::8, ::8], np.ones((8, 8), bool)))
        kinds.add(found.group(1))
        share = mask.mean()
        low, high = (9 / 64, 25 / 64) if found.group(1) == "box" else (28 / 64, 48 / 64)
        assert low <= share <= high
    assert kinds == {"box", "border"}
    assert len({hole_in_words("a cat", index, "box") for index in range(64)}) > 20
    assert hole_in_words("a dog", 0, "box") != hole_in_words("a cat", 0, "box")
    assert {hole_in_words("a cat", index, "border").split()[0] for index in range(64)} == {"border"}


def test_what_is_drawn_is_shown_in_grey_squares(folder: Path) -> None:
    canvas = load(as_jsonl(folder))[0]
    image, mask = canvas.read(HEIGHT, WIDTH)
    picture = shown(canvas, HEIGHT, WIDTH)
    assert np.array_equal(picture[~mask], image[~mask])
    assert set(picture[mask].flatten().tolist()) == {144, 176}


def test_what_a_run_keeps_is_read_again_and_its_digest_is_of_the_content(folder: Path) -> None:
    canvases = load(as_jsonl(folder))
    kept = kept_form(canvases)
    copy = folder / "elsewhere" / "train.json"
    copy.parent.mkdir()
    copy.write_text(json.dumps(kept))
    again = load(copy)
    assert prompts_digest(kept_form(again)) == prompts_digest(kept)
    for one, other in zip(canvases, again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.read(16, 16), other.read(16, 16), strict=True))
    (folder / "pictures").rename(folder / "moved")
    moved = [{**row, "image": row["image"].replace("/pictures/", "/moved/")} for row in kept]
    moved = [{**row, "mask": row["mask"].replace("/pictures/", "/moved/")} for row in moved]
    assert prompts_digest(moved) == prompts_digest(kept)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "moved" / "0.png")
    assert digest_of(str(folder / "moved" / "0.png")) != kept[0]["image_sha256"]
    copy.write_text(json.dumps(moved))
    with pytest.raises(UserError, match=r"0\.png is not the image that the run was started with"):
        check_pictures(load(copy))


def test_plain_prompts_are_kept_as_they_always_were() -> None:
    import hashlib

    prompts = ["a cat", "a dog"]
    assert kept_form(prompts) == prompts
    assert prompts_digest(prompts) == hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def test_a_prompt_with_another_picture_is_another(folder: Path) -> None:
    path = folder / "set.jsonl"
    rows = [{"prompt": "a cat", "image": f"pictures/{i % 2}.png", "mask": "box 2 2 6 6"} for i in range(4)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert len(distinct(load(path))) == 2
    config = RunConfig.model_validate(
        {
            "task": "inpaint",
            "rewards": {"brightness": {}},
            "prompts": {"eval": str(path)},
            "evaluate": {"prompts": 1, "confirm": 1},
        }
    )
    assert [prompt.source.image[-5:] for prompt in search_prompts(config)] == ["0.png"]  # type: ignore[attr-defined]
    assert [prompt.source.image[-5:] for prompt in fresh_prompts(config).prompts] == ["1.png"]  # type: ignore[attr-defined]


def one(folder: Path, **row: Any) -> Path:
    path = folder / "one.jsonl"
    path.write_text(json.dumps({"prompt": "a cat", **row}))
    return path


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"prompts\.train: prompt 1: there is no image for task: inpaint to fill, got 'a cat'; give its path"),
        ({"image": "no.png"}, r"an image cannot be read \(No such file or directory\), got .*/no\.png; give the path"),
        ({"image": "set.txt"}, r"an image cannot be read \(UnidentifiedImageError\), got .*/set\.txt"),
        ({"image": {"bytes": "x"}}, r"prompt 1: image and mask must be paths, got dict; write the images to files"),
        (
            {"image": "pictures/0.png", "mask": "small.png"},
            r"the mask .*/small\.png is 8 x 8 px, its image 32 x 24; give one of the same size",
        ),
        ({"image": "pictures/0.png", "mask": "black.png"}, r"the mask .*/black\.png is black, so that nothing"),
        ({"image": "builtin"}, r"the built-in world has no picture of 'a cat'; give an image"),
    ],
)
def test_what_is_no_picture_is_refused(folder: Path, row: dict[str, Any], message: str) -> None:
    (folder / "set.txt").write_text("a cat")
    Image.new("L", (8, 8), 255).save(folder / "small.png")
    Image.new("L", (WIDTH, HEIGHT)).save(folder / "black.png")
    with pytest.raises(UserError, match=message):
        check_pictures(load(one(folder, **row)))


def test_sources_without_pictures_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"written out have no images, which task: inpaint fills, got a list of 2"):
        load_canvases(["a cat", "a dog"], where="prompts.train", masks="box")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder holds no image"):
        load(folder / "empty")
    with pytest.raises(UserError, match=r"0\.png has no prompt beside it; write one into .*0\.txt"):
        load(folder / "pictures")
    text = folder / "set.txt"
    text.write_text("a cat\n")
    with pytest.raises(UserError, match=r"prompt 1: there is no image"):
        load(text)


def test_a_picture_is_opened_when_it_is_asked_for_alone(folder: Path) -> None:
    canvas = Canvas("a cat", Pictured(str(folder / "no.png"), "box 0 0 8 8"))
    assert canvas == "a cat" or str(canvas) == "a cat"
    with pytest.raises(UserError, match=r"cannot be read"):
        canvas.read(8, 8)
