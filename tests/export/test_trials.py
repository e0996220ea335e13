import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

import rltune
from rltune.cli.main import main
from rltune.config.load import Experiment, parse_experiment
from rltune.diffusion.lora import lora_parameters
from rltune.diffusion.lora_files import WEIGHT_FILE
from rltune.diffusion.quantise import LIBRARIES
from rltune.errors import RunError, UserError
from rltune.export import trials
from rltune.export.base import EXPORT_FORMATS, Adapter
from rltune.export.diffusers import Diffusers
from rltune.export.picks import pick_trial
from rltune.export.proof import TOLERANCE
from rltune.export.trials import export_trials
from rltune.export.write import Exported
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.results import TrialResult, append_result, read_results
from rltune.training.checkpoint import load_adapter
from rltune.training.evaluation import draw_images, to_uint8
from rltune.training.figures import figures_of
from rltune.training.loop import base_run, train_run
from rltune.training.model_cache import load_base_model
from rltune.training.reporter import FolderReporter
from rltune.training.sampling import make_sampler
from rltune.training.setup import eval_image_set
from tests.run_folders import experiment, result
from tests.tiny import EVAL_PROMPTS, TRAIN_PROMPTS
from tests.tiny_families import made, sdxl

BESIDE = {"rltune.json", "README.md", "experiment.yaml", "samples.png", "base.png", "samples"}
PEFT_FILES = {"adapter_model.safetensors", "adapter_config.json", *BESIDE}
VALUES = {"optim.lr": 0.05, "model.lora.rank": 2}


def asked(pipeline: Path, **sections: Any) -> Experiment:
    """A searched experiment on the tiny pipeline, with an adapter whose alpha is not its rank."""
    raw: dict[str, Any] = {
        "name": "tiny",
        "model": {"base": str(pipeline), "lora": {"rank": {"choice": [2, 4]}, "alpha": 6.0}},
        "prompts": {"train": TRAIN_PROMPTS, "eval": EVAL_PROMPTS},
        "sampler": {"steps": 3, "guidance": 2.0},
        "estimator": {"k": 1},
        "rewards": {"brightness": {}},
        "optim": {"lr": {"float": [0.0, 0.1]}, "steps": 3, "batch": 2},
        "evaluate": {"every": 3, "prompts": 3, "images_per_prompt": 2},
    }
    return experiment({**raw, **sections})


def trained(experiment_: Experiment, path: Path, values: dict[str, Any] = VALUES) -> tuple[RunFolder, Experiment]:
    """A run folder with a trained trial, its base model measured at the second attempt."""
    folder = RunFolder(path)
    folder.path.mkdir()
    folder.experiment_file.write_text(experiment_.to_yaml())
    places = {"base_dir": folder.base_dir}
    base = FolderReporter(folder.scratch_dir)
    base_run(experiment_.shared, trial_dir=folder.trial_dir(BASE_TRIAL), reporter=base, **places)
    reporter = FolderReporter(folder.checkpoints_dir("001"))
    train_run(experiment_.concrete(values), trial_dir=folder.trial_dir("001"), reporter=reporter, **places)
    checkpoint = reporter.latest()
    assert checkpoint is not None
    append_result(folder.results_file, result(BASE_TRIAL, reason="out of memory"))
    append_result(folder.results_file, TrialResult(BASE_TRIAL, "ok", {}, {}, metrics=base.reports[-1]))
    row = TrialResult("001", "ok", values, values, metrics=reporter.reports[-1])
    append_result(folder.results_file, replace(row, checkpoint=str(checkpoint.relative_to(folder.path))))
    return folder, experiment_


@pytest.fixture(scope="module")
def run(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Experiment]:
    return trained(asked(tiny_pipeline), tmp_path_factory.mktemp("runs") / "tiny")


def export_knee(folder: RunFolder, experiment_: Experiment, *formats: str) -> list[Exported]:
    exported: list[Exported] = []
    options = {"formats": formats} if formats else {}
    export_trials([pick_trial("knee", folder, experiment_)], folder, experiment_, on_export=exported.append, **options)
    return exported


@pytest.fixture(scope="module")
def exported(run: tuple[RunFolder, Experiment]) -> Exported:
    (exported,) = export_knee(*run)
    return exported


@pytest.mark.slow
def test_an_export_is_a_file_that_was_compared(exported: Exported, run: tuple[RunFolder, Experiment]) -> None:
    folder, _ = run
    assert exported.trial == "001"
    assert exported.folder == folder.path / "exports" / "001"
    assert {path.name for path in exported.folder.iterdir()} == {WEIGHT_FILE, *BESIDE}
    assert 0 <= exported.difference < 2e-5  # float32, the same network


@pytest.mark.slow
def test_the_card_says_where_it_comes_from_and_what_it_scored(
    exported: Exported, run: tuple[RunFolder, Experiment], tiny_pipeline: Path
) -> None:
    folder, experiment_ = run
    card = json.loads((exported.folder / "rltune.json").read_text())
    _, base, trained = read_results(folder.results_file)
    assert (
        card
        == {
            "schema": 1,
            "rltune": rltune.__version__,
            "run": "tiny",
            "trial": "001",
            "base_model": str(tiny_pipeline),
            "base_revision": None,
            "strength": "load at weight 1.0: alpha / rank is folded into the weights",
            "formats": {
                "diffusers": {
                    "files": [WEIGHT_FILE],
                    "reloaded": {"difference": exported.difference, "effect": exported.effect, **exported.rounding},
                }
            },
            "settings": VALUES,
            "effect": asdict(exported.size),
            "rewards": [{"name": "brightness", "reward": "brightness", "weight": 1.0, "licence": ""}],
            "figures": [asdict(figure) for figure in figures_of(trained.metrics, base.metrics, 3)],
            "metrics": trained.metrics,
            "base_metrics": base.metrics,  # of the attempt that went well
            "measured_on": {"prompts": 3, "fresh_prompts": 0},
            "measured_again": {"noise": "search", "precision": "auto", "prompts": EVAL_PROMPTS[:3]},
            "command": "rltune train experiment.yaml",
            "trained_with": [],  # by hand
            "prompts": EVAL_PROMPTS,
            "experiment": experiment_.concrete(VALUES).model_dump(mode="json"),
        }
    )
    assert card["metrics"]["eval/brightness"] > card["base_metrics"]["eval/brightness"]


@pytest.mark.slow
def test_from_the_folder_alone_the_figures_of_its_card_come_back(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(exported.folder, tmp_path / "mine")
    monkeypatch.setattr(sys, "argv", ["rltune", "evaluate", str(folder), "--json"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    measured = json.loads(capsys.readouterr().out)
    figures = json.loads((folder / "rltune.json").read_text())["figures"]
    assert measured["prompts"] == EVAL_PROMPTS[:3]
    assert [row["model"] for row in measured["models"]] == ["base", "mine"]
    again = {figure.pop("name"): figure for figure in measured["models"][1]["figures"]}
    assert list(again) == [figure["name"] for figure in figures]
    for figure in figures:  # another order of float32 sums, of 8 bits for diversity and drift
        assert again[figure.pop("name")] == pytest.approx(figure, rel=1e-3, abs=1e-5)
    assert again["brightness"]["gain"] > 0.01


def test_the_samples_are_the_lora_s_images_of_the_first_held_out_prompts(
    exported: Exported, run: tuple[RunFolder, Experiment]
) -> None:
    config = run[1].concrete(VALUES)
    device = torch.device("cpu")
    model = load_base_model(config, device)
    images = eval_image_set(config, model)

    def draw() -> np.ndarray[Any, Any]:
        pixels_BHW3 = to_uint8(draw_images(make_sampler(config, model), images, range(4), device)).astype(int)
        return np.concatenate(list(pixels_BHW3), axis=1)  # side by side

    base = draw()
    model.pipeline.load_lora_weights(exported.folder)
    shown = np.asarray(Image.open(exported.folder / "samples.png")).astype(int)
    assert np.abs(shown - draw()).max() <= 1  # a value on the edge of two bytes may fall to either
    assert np.abs(shown - base).max() > 5


def test_a_checkpoint_that_is_gone_is_said_so(run: tuple[RunFolder, Experiment]) -> None:
    folder, experiment_ = run
    lost = result("007", 0.7, values=VALUES, checkpoint="trials/007/checkpoints/step-000003")
    with pytest.raises(RunError, match=r"trial 007: its checkpoint .*trials/007/.* is gone; train it again"):
        export_trials([lost], folder, experiment_, on_export=pytest.fail)
    assert not (folder.exports_dir / "007").exists()


@pytest.mark.long
def test_a_pick_that_fails_does_not_keep_the_others_from_being_written(
    run: tuple[RunFolder, Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, experiment_ = run
    good = pick_trial("knee", folder, experiment_)
    lost = result("007", 0.7, values=VALUES, checkpoint="trials/007/checkpoints/step-000003")
    zero = TrialResult(**{**vars(good), "trial": "008"})
    states = iter([{name: 0 * value for name, value in load_adapter(folder.path / good.checkpoint).items()}])
    monkeypatch.setattr(trials, "load_adapter", lambda checkpoint: next(states, None) or load_adapter(checkpoint))
    written: list[str] = []
    picks = [zero, lost, good]
    with pytest.raises(RunError) as caught:
        export_trials(picks, folder, experiment_, on_export=lambda exported: written.append(exported.trial))
    assert written == ["001"]
    first, *faults = str(caught.value).splitlines()
    assert first == "2 of 3 exports failed"
    assert [fault.split(",")[0].strip() for fault in faults] == [
        "trial 008: the adapter is exactly zero",
        f"trial 007: its checkpoint {folder.path / lost.checkpoint} is gone; train it again",
    ]
    assert sorted(path.name for path in folder.exports_dir.iterdir()) == ["001"]


class Weaker:
    """The format of diffusers, at nine tenths of the strength."""

    def write(self, model: Any, adapter: Adapter, folder: Path) -> tuple[Path, ...]:
        weaker = replace(adapter, state={name: 0.9 * value for name, value in adapter.state.items()})
        return Diffusers().write(model, weaker, folder)

    def __getattr__(self, name: str) -> Any:
        return getattr(Diffusers(), name)


class Unwritten(Weaker):
    def write(self, model: Any, adapter: Adapter, folder: Path) -> tuple[Path, ...]:
        raise OSError("the disk is full")


class Nested(Weaker):
    """The same file in a folder of the format's own, as a pipeline's would be, and each time another one beside it."""

    count = 0

    def write(self, model: Any, adapter: Adapter, folder: Path) -> tuple[Path, ...]:
        files = Diffusers().write(model, adapter, folder / "pipeline" / "lora")
        Nested.count += 1
        note = folder / "pipeline" / f"{Nested.count}.txt"
        note.touch()
        return (*files, note)

    def load(self, model: Any, folder: Path) -> Any:
        return Diffusers().load(model, folder / "pipeline" / "lora")


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Two that fail, and two that do not."""
    EXPORT_FORMATS.names()
    builders = {**EXPORT_FORMATS._builders, "weaker": Weaker, "unwritten": Unwritten, "nested": Nested}
    monkeypatch.setattr(EXPORT_FORMATS, "_builders", builders)
    return ("weaker", "unwritten", "nested", "peft")


@pytest.mark.long
def test_a_file_that_fails_its_proof_does_not_stand_in_an_exports_place(
    run: tuple[RunFolder, Experiment], formats: tuple[str, ...]
) -> None:
    folder, experiment_ = run
    other = TrialResult(**{**vars(pick_trial("knee", folder, experiment_)), "trial": "009"})
    with pytest.raises(RunError, match=r"trial 009: .*exports/009\.unproved/weaker: .*; it is not fit for use$"):
        export_trials([other], folder, experiment_, on_export=pytest.fail, formats=["weaker"])
    assert not (folder.exports_dir / "009").exists()


@pytest.mark.long
def test_a_format_that_fails_does_not_keep_the_others_from_being_written(
    run: tuple[RunFolder, Experiment], formats: tuple[str, ...]
) -> None:
    folder, experiment_ = run
    other = TrialResult(**{**vars(pick_trial("knee", folder, experiment_)), "trial": "010"})
    written: list[str] = []
    with pytest.raises(RunError) as caught:
        export_trials([other], folder, experiment_, on_export=lambda e: written.append(e.format), formats=formats)
    assert written == ["nested", "peft"]
    first, *faults = str(caught.value).splitlines()
    assert first == "2 of 4 exports failed"
    assert [fault.split(": ")[0].strip() for fault in faults] == ["trial 010 for unwritten", "trial 010 for weaker"]
    assert "trial 010 for unwritten: the disk is full" in str(caught.value)
    assert {path.name for path in (folder.exports_dir / "010").iterdir()} == PEFT_FILES | {"pipeline"}


@pytest.mark.long
def test_a_format_may_have_a_folder_which_is_replaced_as_a_whole(
    run: tuple[RunFolder, Experiment], formats: tuple[str, ...]
) -> None:
    folder, experiment_ = run
    other = TrialResult(**{**vars(pick_trial("knee", folder, experiment_)), "trial": "011"})
    for _ in range(2):
        export_trials([other], folder, experiment_, on_export=lambda exported: None, formats=["nested"])
    place, files = folder.exports_dir / "011", [f"pipeline/lora/{WEIGHT_FILE}", f"pipeline/{Nested.count}.txt"]
    assert json.loads((place / "rltune.json").read_text())["formats"]["nested"]["files"] == files
    assert {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()} == {
        *files,
        *BESIDE - {"samples"},
        *(f"samples/{number}.png" for number in range(1, 5)),
    }


def test_an_unknown_format_is_said_before_anything_is_written(run: tuple[RunFolder, Experiment]) -> None:
    folder, experiment_ = run
    picks = [pick_trial("knee", folder, experiment_)]
    with pytest.raises(UserError, match=r"^export format 'kohia' is unknown; known: comfyui, diffusers, fused, peft$"):
        export_trials(picks, folder, experiment_, on_export=pytest.fail, formats=["diffusers", "kohia"])


@pytest.mark.long
def test_formats_lie_side_by_side_and_the_card_tells_of_each(
    exported: Exported, run: tuple[RunFolder, Experiment]
) -> None:
    place = exported.folder
    (place / "notes.txt").write_text("mine")
    again = parse_experiment((place / "experiment.yaml").read_text(), "experiment.yaml")
    assert again.shared == run[1].concrete(VALUES).model_copy(update={"name": "tiny-001"})
    assert asdict(exported.size) == pytest.approx(effect_by_hand(*run, place), rel=0.02)  # samples have 8 bits
    (also,) = export_knee(*run, "peft", "peft")
    assert (also.format, also.folder) == ("peft", place)
    assert also.how_to_load.endswith(f"PeftModel.from_pretrained(pipeline.unet, {str(place)!r})")
    assert {path.name for path in place.iterdir()} == PEFT_FILES | {WEIGHT_FILE, "notes.txt"}
    modes = {path.stat().st_mode & 0o777 for path in place.iterdir() if path.is_file()}
    assert modes == {0o644}  # which others can read
    told = json.loads((place / "rltune.json").read_text())["formats"]
    assert {name: what["files"] for name, what in told.items()} == {
        "diffusers": [WEIGHT_FILE],
        "peft": ["adapter_model.safetensors", "adapter_config.json"],
    }
    assert told["peft"]["reloaded"]["bfloat16"] == also.rounding["bfloat16"]
    assert not place.with_name("001.unproved").exists()


def effect_by_hand(folder: RunFolder, experiment_: Experiment, place: Path) -> dict[str, float]:
    """The two figures from the file and the pictures, by diffusers and numpy."""
    pipeline = StableDiffusionPipeline.from_pretrained(experiment_.shared.model.base, safety_checker=None)
    layers = {
        name: module.weight.detach().clone()
        for name, module in pipeline.unet.named_modules()
        if "to_" in name and hasattr(module, "weight")
    }
    pipeline.load_lora_weights(place)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = {name: pipeline.unet.get_submodule(name).weight for name in layers}
    added = sum(float((fused[name] - weight).square().sum()) for name, weight in layers.items())
    held = sum(float(weight.square().sum()) for weight in layers.values())
    pictures = [np.asarray(Image.open(place / name)).astype(float) / 255 for name in ("samples.png", "base.png")]
    return {"update": (added / held) ** 0.5, "image": float(np.abs(pictures[0] - pictures[1]).mean())}


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_a_run_in_either_precision_exports(tiny_pipeline: Path, tmp_path: Path, precision: str) -> None:
    """In bfloat16 images of the same file are 0.02 from float32's, ten times what the comparison allows."""
    experiment_ = asked(tiny_pipeline, resources={"precision": precision})
    folder = RunFolder(tmp_path / "tiny")
    folder.path.mkdir()
    reporter = FolderReporter(folder.checkpoints_dir("001"))
    config = experiment_.concrete(VALUES)
    train_run(config, trial_dir=folder.trial_dir("001"), base_dir=folder.base_dir, reporter=reporter)
    checkpoint = reporter.latest()
    assert checkpoint is not None
    trained = TrialResult("001", "ok", VALUES, VALUES, metrics=reporter.reports[-1])
    for row in (result(BASE_TRIAL), trained):
        append_result(folder.results_file, row)
    picked = TrialResult(**{**vars(trained), "checkpoint": str(checkpoint.relative_to(folder.path))})
    told: list[Exported] = []
    export_trials([picked], folder, experiment_, on_export=told.append)
    (exported,) = told
    assert 0 <= exported.difference < 2e-5
    assert exported.effect > 0.01
    assert exported.rounding["bfloat16"] > TOLERANCE

    # what was evaluated last is what a user of that precision draws from the file
    model = load_base_model(config, torch.device("cpu"))
    model.pipeline.load_lora_weights(exported.folder)
    assert {str(p.dtype) for p in lora_parameters(model.network)} == {
        {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[precision]
    }
    images = eval_image_set(config, model)
    drawn_BHW3 = to_uint8(draw_images(make_sampler(config, model), images, range(len(images)), torch.device("cpu")))
    grid = np.asarray(Image.open(folder.trial_dir("001") / "samples" / "step-000003.png"))
    shown_BHW3 = cut(grid, *drawn_BHW3.shape[:3])
    # float32 folds its adapters in another order, and a value on the edge of two bytes may fall to either
    assert np.abs(shown_BHW3.astype(int) - drawn_BHW3.astype(int)).max() <= (1 if precision == "fp32" else 0)


def cut(grid: np.ndarray[Any, Any], count: int, height: int, width: int) -> np.ndarray[Any, Any]:
    """Return the pictures of a grid, row by row."""
    rows, columns = grid.shape[0] // height, grid.shape[1] // width
    cells = grid.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
    return cells.reshape(-1, height, width, 3)[:count]


@pytest.mark.long
@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_lora_of_a_base_in_fewer_bits_is_proved_on_the_published_one(kind: str, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[kind], reason=f"{LIBRARIES[kind]}, of the extra quantise, is not installed")
    pipeline = tmp_path / "sdxl"  # whose layers are wide enough for nf4
    made(sdxl).save_pretrained(pipeline)
    model = {"base": str(pipeline), "lora": {"rank": {"choice": [2, 4]}, "alpha": 6.0}, "quantise": kind}
    folder, experiment_ = trained(asked(pipeline, model=model), tmp_path / "run")
    exported, fused_too = export_knee(folder, experiment_, "diffusers", "fused")
    assert 0 <= exported.difference < 2e-5
    assert 0 <= fused_too.difference < 2e-5
    state = load_adapter(folder.path / read_results(folder.results_file)[-1].checkpoint)
    plain = StableDiffusionXLPipeline.from_pretrained(pipeline)
    plain.load_lora_weights(exported.folder, weight_name=WEIGHT_FILE)
    found = [value for name, value in plain.unet.state_dict().items() if ".lora_B." in name]
    assert len(found) == sum(".lora_B." in name for name in state)
    assert all(bool(value.any()) for value in found)  # trained through the rounded weights
    fused = StableDiffusionXLPipeline.from_pretrained(exported.folder / "fused")
    assert {value.dtype for value in fused.unet.state_dict().values()} == {torch.float32}
