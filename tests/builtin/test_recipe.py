"""The whole recipe at a ten-thousandth of its size: two steps of everything are enough to see that it resumes."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from rltune.builtin import autoencoder, counter, denoiser, image_text, judge, measure, recipe
from rltune.builtin.counter import load_counter
from rltune.builtin.judge import load_judge
from rltune.builtin.recipe import STAGES, train_builtin
from rltune.builtin.shipping import load_head

pytestmark = pytest.mark.slow

SCALE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def _small_batches() -> Iterator[None]:
    """Train on four pictures at a time and draw in two steps of the network, which the scale does not reach."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (autoencoder, counter, denoiser, image_text, judge):
            patched.setattr(module, "BATCH", 4)
        for module in (measure, recipe):
            patched.setattr(module, "sample", functools.partial(recipe.sample, num_steps=2))
        yield


class KilledError(Exception):
    pass


class Killer:
    """Stops the build near the end of each stage in turn, before that stage's last checkpoint."""

    def __init__(self) -> None:
        self.spared: set[str] = set()

    def __call__(self, stage: str, step: int, total: int, figures: dict[str, float]) -> None:
        if stage not in self.spared:
            self.spared.add(stage)
            raise KilledError(stage)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    train_builtin(root / "out", work_dir=root / "work", scale=SCALE)
    return root / "out"


@pytest.mark.long
def test_a_build_killed_in_every_stage_ends_in_the_same_files(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a finished stage draws its curve anew each time; ``whole`` has drawn them all
    monkeypatch.setattr("rltune.builtin.workshop.plot_curve", lambda *_, **__: None)
    killer = Killer()
    num_kills = 0
    while True:
        try:
            train_builtin(
                tmp_path / "out",
                work_dir=tmp_path / "work",
                scale=SCALE,
                on_progress=killer,
                checkpoint_every_s=0.0,
            )
            break
        except KilledError:
            num_kills += 1
    assert num_kills >= len(STAGES)
    one, other = contents(whole), contents(tmp_path / "out")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def contents(folder: Path) -> dict[str, object]:
    """Every file's bytes; of the head its tensors' bytes, as safetensors writes a header of many keys in any order."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        if path.name == "aesthetic_head.safetensors":
            state = load_head(path).state_dict()
            found[path.name] = {name: value.numpy().tobytes() for name, value in state.items()}
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.mark.long
def test_the_build_leaves_figures_of_every_stage(whole: Path) -> None:
    figures = json.loads((whole / "weights" / "figures.json").read_text())
    assert set(figures) == {*STAGES, "samples", "shuffled", "reconstructions", "renders"}
    assert {"judge", "counter", "decoder"} <= set(STAGES)
    assert all(figures.values())  # no stage without a figure
    assert all(isinstance(value, float) for stage in figures.values() for value in stage.values())


def test_the_readers_load(whole: Path) -> None:
    weights = whole / "weights"
    assert not load_counter(weights / "counter.safetensors").training
    assert not load_judge(weights / "judge.safetensors").training


def test_the_pipeline_is_stored_in_half_and_loads_in_full_precision(whole: Path) -> None:
    folder = whole / "weights" / "pipeline"
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}, part
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    assert {loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype} == {torch.float32}


def test_the_build_leaves_pictures_to_look_at(whole: Path) -> None:
    sizes = {}
    for name in ("decoder", "denoiser", "image-text"):
        with Image.open(whole.parent / "work" / f"{name}.png") as image:
            sizes[name] = image.size
    # Sixteen columns of 64 + 2 px, and 2 px more: 24 held-out pictures and their reconstructions, in turn; samples of
    # eight prompts; the nearest held-out pictures of the same prompt.
    assert sizes["denoiser"] == sizes["image-text"] == (16 * 66 + 2, 66 + 2)
    assert sizes["decoder"] == (16 * 66 + 2, 3 * 66 + 2)


def test_every_stage_leaves_a_learning_curve(whole: Path) -> None:
    curves = {path.name.removesuffix("-curve.csv") for path in (whole.parent / "work").glob("*-curve.csv")}
    assert curves == set(STAGES) - {"autoencoder"}  # which is whitened, and not trained
    for path in (whole.parent / "work").glob("*-curve.csv"):
        assert path.with_suffix(".png").is_file()


def test_files_are_readable_for_everyone(whole: Path) -> None:
    assert [path for path in whole.rglob("*") if path.stat().st_mode & 0o444 != 0o444] == []


def test_the_head_says_how_it_is_built(whole: Path) -> None:
    head = load_head(whole / "weights" / "aesthetic_head.safetensors")
    assert (head.in_dim, head.hidden, head.offset, head.scale) == (128, (64,), 5.5, 2.0)


@pytest.mark.long
def test_a_second_call_replaces_the_files(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rltune.builtin.workshop.plot_curve", lambda *_, **__: None)
    before = (whole / "prompts" / "train.txt").read_text()
    train_builtin(whole, work_dir=whole.parent / "work", scale=SCALE)
    assert (whole / "prompts" / "train.txt").read_text() == before
    assert sorted(path.name for path in whole.iterdir()) == ["prompts", "weights"]
