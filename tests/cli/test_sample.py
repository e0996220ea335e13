import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rltune.cli.sample import lora_labels, sample_grid
from rltune.config.experiment import RunConfig
from rltune.diffusion.lora import add_lora, lora_parameters, lora_state
from rltune.errors import UserError
from rltune.export.base import Adapter
from rltune.export.card import write_card
from rltune.export.diffusers import WEIGHT_FILE, Diffusers
from rltune.training import grids
from rltune.training.evaluation import EVAL_SEED, ImageSet, draw_images, to_uint8
from rltune.training.grids import LABEL_PX, MARGIN_PX, MIN_IMAGE_PX, draw_rows, labelled_grid
from rltune.training.model_cache import load_base_model
from rltune.training.sampling import image_shape, make_sampler

PROMPTS = ["a snail", "an octopus on a hill"]
Config = Callable[..., RunConfig]


def export(config: RunConfig, folder: Path, *, seed: int) -> Path:
    """Write a random adapter with its card, as an export of a run does."""
    model = load_base_model(config, torch.device("cpu"))
    add_lora(model.network, rank=2, alpha=2, targets="attention", seed=0)
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model.network):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    Diffusers().write(model, Adapter(lora_state(model.network), 2, 2, "attention"), folder)
    write_card(folder, {"base_model": config.model.base, "experiment": config.model_dump(mode="json")})
    return folder


@pytest.fixture
def loras(make_config: Config, tmp_path: Path) -> list[Path]:
    return [export(make_config(), tmp_path / name, seed=i) for i, name in enumerate(("001", "002"))]


def draw(loras: Sequence[Path], output: Path, *, prompts: Sequence[str] = PROMPTS, **options: Any) -> None:
    chosen: dict[str, Any] = {"base": None, "num_steps": None, "guidance": None, "num_images": 2, "seed": 3}
    sample_grid(loras, prompts, output, **{**chosen, **options})


def cells(page: Path, *, num_rows: int, num_images: int, size_px: int) -> dict[tuple[int, int, int], Any]:
    """Cut a page into its pictures, (prompt, row, image) -> bytes at the model's own size."""
    pixels = np.asarray(Image.open(page))
    zoom = MIN_IMAGE_PX // size_px
    side = size_px * zoom
    block = LABEL_PX + num_rows * (side + MARGIN_PX) + MARGIN_PX
    left = pixels.shape[1] - num_images * (side + MARGIN_PX)
    found = {}
    for prompt in range(pixels.shape[0] // block):
        for row in range(num_rows):
            for image in range(num_images):
                y = prompt * block + LABEL_PX + row * (side + MARGIN_PX)
                x = left + image * (side + MARGIN_PX)
                picture = pixels[y : y + side, x : x + side]
                small = picture[::zoom, ::zoom]
                # enlarged with its pixels kept square, so it is where we think it is
                assert (small.repeat(zoom, 0).repeat(zoom, 1) == picture).all()
                found[prompt, row, image] = small
    assert pixels.shape[0] % block == 0
    return found


@pytest.mark.long
def test_the_grid_shows_base_and_loras_on_the_same_noise(
    make_config: Config, loras: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "grid.png"
    draw([loras[0], loras[1] / WEIGHT_FILE], output)  # a folder, and a file
    text = capsys.readouterr().out
    assert "3 rows (base, 001, 002), 2 images for each of" in " ".join(text.split())
    assert all(prompt in text for prompt in PROMPTS)

    base, *others = draw_rows(make_config(), [folder / WEIGHT_FILE for folder in loras], PROMPTS, num_images=2, seed=3)
    (alone,) = draw_rows(make_config(), [], PROMPTS, num_images=2, seed=3)
    assert (base == alone).all()
    (second,) = draw_rows(make_config(), [loras[1] / WEIGHT_FILE], PROMPTS, num_images=2, seed=3)[1:]
    assert (others[1] == second).all()  # the first LoRA is off while the second is drawn
    size_px = base.shape[1]
    shown = cells(output, num_rows=3, num_images=2, size_px=size_px)
    assert len(shown) == 2 * 3 * 2
    for (prompt, row, image), pixels in shown.items():
        assert (pixels == [alone, others[0], second][row][2 * prompt + image]).all(), (prompt, row, image)
    assert np.abs(alone.astype(int) - others[0].astype(int)).max() > 10
    assert np.abs(second.astype(int) - others[0].astype(int)).max() > 10


@pytest.mark.slow
def test_the_noise_is_that_of_the_held_out_images(make_config: Config) -> None:
    config, device = make_config(), torch.device("cpu")
    model = load_base_model(config, device)
    images = ImageSet(tuple(PROMPTS), 2, image_shape(config, model))
    expected = to_uint8(draw_images(make_sampler(config, model), images, range(4), device))
    (row,) = draw_rows(config, [], PROMPTS, num_images=2, seed=EVAL_SEED)
    assert (row == expected).all()


@pytest.mark.long
def test_the_run_s_sampler_is_used_unless_another_is_asked_for(
    make_config: Config, loras: list[Path], tmp_path: Path
) -> None:
    options: dict[str, dict[str, Any]] = {
        "run": {},
        "same": {"num_steps": 4, "guidance": 2.0},
        "steps": {"num_steps": 5},
        "guidance": {"guidance": 4.0},
        "seed": {"seed": 4},
        "negative": {"negative": "two red birds"},
        "base steps": {"num_base_steps": 2},
    }
    pages = {}
    for name, chosen in options.items():
        draw(loras[:1], tmp_path / f"{name}.png", prompts=["a snail"], num_images=1, **chosen)
        pages[name] = np.asarray(Image.open(tmp_path / f"{name}.png"))
    assert make_config().sampler.steps == 4
    assert (pages["run"] == pages["same"]).all()
    for name in ("steps", "guidance", "seed", "negative", "base steps"):
        assert (pages["run"] != pages[name]).any(), name


@pytest.mark.long
def test_the_first_steps_are_left_to_the_base_model_as_the_run_or_the_caller_says(
    make_config: Config, tmp_path: Path
) -> None:
    whole, late = make_config(), make_config(sampler={"base_steps": 2})
    loras = [export(config, tmp_path / str(i), seed=0) for i, config in enumerate((whole, late))]
    pages = {}
    for name, lora, num_base_steps in (("run", 1, None), ("asked", 0, 2), ("undone", 1, 0), ("whole", 0, None)):
        page = tmp_path / f"{name}.png"
        draw([loras[lora]], page, prompts=["a snail"], num_images=1, num_base_steps=num_base_steps)
        pages[name] = cells(page, num_rows=2, num_images=1, size_px=16)
    for row, name in ((0, "base"), (1, "LoRA")):
        assert (pages["run"][0, row, 0] == pages["asked"][0, row, 0]).all(), name
        assert (pages["undone"][0, row, 0] == pages["whole"][0, row, 0]).all(), name
    assert (pages["run"][0, 0, 0] == pages["whole"][0, 0, 0]).all()  # the base model knows no difference
    assert (pages["run"][0, 1, 0] != pages["whole"][0, 1, 0]).any()


@pytest.mark.slow
def test_base_steps_must_leave_something_to_the_lora(loras: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--base-steps must leave the LoRA some of the 4 steps, got 4"):
        draw(loras[:1], tmp_path / "grid.png", num_base_steps=4)
    with pytest.raises(UserError, match="--base-steps must leave the LoRA some of the 2 steps, got 3"):
        draw(loras[:1], tmp_path / "grid.png", num_base_steps=3, num_steps=2)
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.long
def test_held_out_prompts_are_drawn_when_none_are_given(
    loras: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(loras[:1], tmp_path / "grid.png", prompts=[], num_images=1)
    assert [line.strip() for line in capsys.readouterr().out.splitlines()[-3:]] == [
        "a snail",
        "an octopus",
        "a lobster",
    ]


@pytest.mark.slow
def test_a_base_model_alone_needs_no_run(tiny_pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw([], tmp_path / "grid.png", base=str(tiny_pipeline), num_steps=2, num_images=1)
    assert len(cells(tmp_path / "grid.png", num_rows=1, num_images=1, size_px=16)) == 2
    told = "1 of 2 prompts is longer than the text encoder reads: of 'an octopus on a hill' it does not see 'll'"
    assert caplog.messages == [told]


@pytest.mark.long
def test_a_lora_without_a_card_is_drawn_on_the_base_that_is_named(
    loras: list[Path], tiny_pipeline: Path, tmp_path: Path
) -> None:
    (loras[0] / "rltune.json").unlink()
    draw(loras[:1], tmp_path / "grid.png", base=str(tiny_pipeline), num_steps=2, num_images=1)
    shown = cells(tmp_path / "grid.png", num_rows=2, num_images=1, size_px=16)
    assert (shown[0, 0, 0] != shown[0, 1, 0]).any()


@pytest.mark.slow
def test_loras_of_different_base_models_are_refused(loras: list[Path], tmp_path: Path) -> None:
    card = json.loads((loras[1] / "rltune.json").read_text())
    (loras[1] / "rltune.json").write_text(json.dumps({**card, "base_model": "another/model"}))
    for chosen in ({"loras": loras}, {"loras": loras[:1], "base": "another/model"}):
        with pytest.raises(UserError, match=r"sample: the LoRAs belong to different base models, \[.*'another/model'"):
            draw(chosen.pop("loras"), tmp_path / "grid.png", **chosen)
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.slow
def test_what_holds_no_lora_is_refused(loras: list[Path], tiny_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing", tmp_path / "missing.safetensors"):
        with pytest.raises(UserError, match="holds no LoRA; name an exported folder or a "):
            draw([path], tmp_path / "grid.png", base=str(tiny_pipeline))


@pytest.mark.long
@pytest.mark.parametrize("content", [b"", b"no tensors at all", None], ids=["empty", "text", "other tensors"])
def test_a_file_that_is_no_lora_is_refused(tiny_pipeline: Path, tmp_path: Path, content: bytes | None) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    if content is None:
        save_file({"weight": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors: not a LoRA"):
        draw([path], tmp_path / "grid.png", base=str(tiny_pipeline))


def test_a_page_grows_with_long_labels() -> None:
    row = np.zeros((1, 16, 16, 3), np.uint8)
    narrow = labelled_grid([row], ["base"], ["a"], num_images=1)
    assert labelled_grid([row], ["a-long-name-of-a-lora"], ["a"], num_images=1).width > narrow.width


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        ([], []),
        (["exports/001", f"exports/002/{WEIGHT_FILE}"], ["001", "002"]),
        (["loras/ink.safetensors", "loras/oil.safetensors"], ["ink", "oil"]),
        (["a/exports/knee", "b/exports/knee"], ["a/exports/knee", "b/exports/knee"]),
        (["a/knee", "b/knee", "b/best"], ["a/knee", "b/knee", "b/best"]),
        (["a/base"], ["a/base"]),  # the first row is the base model's
        (["a/knee", "a/knee"], ["knee", "knee"]),
    ],
)
def test_loras_are_told_apart_by_their_labels(paths: list[str], labels: list[str]) -> None:
    assert lora_labels([Path(path) for path in paths]) == labels


def test_a_base_model_that_is_neither_here_nor_to_be_had_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw_nothing(*_: object, **__: object) -> None:
        raise AssertionError("the hub's library was asked, which tries for 40 s")

    monkeypatch.setattr(grids, "draw_rows", draw_nothing)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"model\.base: no such folder, and not in the Hugging Face cache, got"):
        draw([], tmp_path / "grid.png", base="some/model")


@pytest.mark.slow
def test_attention_is_edited_where_it_is_asked_for(tmp_path: Path) -> None:
    pages = []
    for i, attention in enumerate((None, 0.0, 1.0)):
        pages.append(tmp_path / f"{i}.png")
        asked = {"prompts": ["a red ring and a blue star"], "num_images": 1, "num_steps": 2, "base": "builtin"}
        draw([], pages[-1], **asked, attention=attention)
    plain, off, on = (np.asarray(Image.open(page)) for page in pages)
    assert (plain == off).all()
    assert (plain != on).any()
