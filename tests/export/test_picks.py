import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rltune
from rltune.config.load import Experiment
from rltune.diffusion.lora import lora_parameters
from rltune.diffusion.lora_files import WEIGHT_FILE
from rltune.errors import RunError, UserError
from rltune.export import picks as exporting
from rltune.export.diffusers import TOLERANCE, write_lora
from rltune.export.picks import (
    Exported,
    _measurements,
    best_picks,
    export_trial,
    export_trials,
    pick_trial,
)
from rltune.runs.confirmations import Confirmation
from rltune.runs.fronts import read_front
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.results import TrialResult, append_result, read_results
from rltune.runs.store import append_line
from rltune.training.checkpoint import load_adapter
from rltune.training.evaluation import draw_images, to_uint8
from rltune.training.loop import base_run, train_run
from rltune.training.model_cache import load_base_model
from rltune.training.reporter import FolderReporter
from rltune.training.setup import eval_image_set, make_sampler
from tests.run_folders import experiment, result, write_run
from tests.tiny import EVAL_PROMPTS, TRAIN_PROMPTS

# ---- picking


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """001 is best in brightness, 003 in drift, 002 is the bulge between them, 004 failed, 005 is dominated."""
    results = [
        result(BASE_TRIAL, 0.5, 0.0),
        result("001", 1.0, 1.0),
        result("002", 0.9, 0.2),
        result("003", 0.6, 0.1),
        result("004", reason="step 3: nan"),
        result("005", 0.6, 0.9),
    ]
    return write_run(tmp_path / "mix", experiment(), results, started=["006"])


@pytest.mark.parametrize(
    ("pick", "trial"),
    [("knee", "002"), ("best:brightness", "001"), ("best:drift", "003"), ("001", "001"), ("005", "005")],
)
def test_a_trial_is_picked_by_what_it_is(folder: RunFolder, pick: str, trial: str) -> None:
    assert pick_trial(pick, folder, experiment()).trial == trial


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        ("004", r"--pick: trial '004' has no LoRA, it failed: step 3: nan; pick another"),
        (BASE_TRIAL, r"--pick: trial '000' has no LoRA, it is the base model; pick another"),
        *(
            (
                wrong,
                rf"--pick: '{wrong}' is not a choice; write knee, best:brightness, best:drift, "
                r"or a trial: 001, 002, 003, 005$",
            )
            for wrong in ("006", "7", "best:smoothness", "best", "worst:drift", "")
        ),
    ],
)
def test_what_cannot_be_picked_is_answered_with_what_can(folder: RunFolder, pick: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pick_trial(pick, folder, experiment())


def test_a_run_without_a_trained_front_has_no_knee(tmp_path: Path) -> None:
    broken = result("001", 0.9, 0.1, constraints={"diversity.min": 0.1})
    folder = write_run(tmp_path / "mix", experiment(), [result(BASE_TRIAL, 0.5), broken])
    with pytest.raises(UserError, match=r"no trained trial of .*mix is on its front; name one that ended well: 001$"):
        pick_trial("knee", folder, experiment())
    assert pick_trial("001", folder, experiment()) == broken  # by name it can be had
    empty = write_run(tmp_path / "empty", experiment())
    with pytest.raises(UserError, match=r"no trained trial of .* is on its front; and none has ended well yet"):
        pick_trial("best:drift", empty, experiment())


def test_the_best_are_the_knee_and_the_ends_each_once(folder: RunFolder, tmp_path: Path) -> None:
    front = read_front(folder, experiment())
    assert front is not None
    assert [picked.trial for picked in best_picks(front)] == ["002", "001", "003"]
    one = read_front(
        write_run(tmp_path / "one", experiment(), [result(BASE_TRIAL, 0.5), result("001", 0.6, 0.1)]), experiment()
    )
    assert one is not None
    assert [picked.trial for picked in best_picks(one)] == ["001"]
    none = read_front(write_run(tmp_path / "none", experiment(), [result(BASE_TRIAL, 0.5)]), experiment())
    assert none is not None
    assert best_picks(none) == []


# ---- exporting

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


@pytest.fixture(scope="module")
def run(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Experiment]:
    """A run folder with a trained trial, its base model measured at the second attempt."""
    experiment_ = asked(tiny_pipeline)
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    folder.path.mkdir()
    folder.experiment_file.write_text(experiment_.to_yaml())
    places = {"base_dir": folder.base_dir}
    base = FolderReporter(folder.scratch_dir)
    base_run(experiment_.shared, trial_dir=folder.trial_dir(BASE_TRIAL), reporter=base, **places)
    reporter = FolderReporter(folder.checkpoints_dir("001"))
    train_run(experiment_.concrete(VALUES), trial_dir=folder.trial_dir("001"), reporter=reporter, **places)
    checkpoint = reporter.latest()
    assert checkpoint is not None
    append_result(folder.results_file, result(BASE_TRIAL, reason="out of memory"))
    append_result(folder.results_file, TrialResult(BASE_TRIAL, "ok", {}, {}, metrics=base.reports[-1]))
    trained = TrialResult("001", "ok", VALUES, VALUES, metrics=reporter.reports[-1])
    relative = str(checkpoint.relative_to(folder.path))
    append_result(folder.results_file, TrialResult(**{**vars(trained), "checkpoint": relative}))
    return folder, experiment_


@pytest.fixture(scope="module")
def exported(run: tuple[RunFolder, Experiment]) -> Exported:
    folder, experiment_ = run
    return export_trial(pick_trial("knee", folder, experiment_), folder, experiment_)


def test_an_export_is_a_file_that_was_compared(exported: Exported, run: tuple[RunFolder, Experiment]) -> None:
    folder, _ = run
    assert exported.trial == "001"
    assert exported.folder == folder.path / "exports" / "001"
    assert {path.name for path in exported.folder.iterdir()} == {WEIGHT_FILE, "rltune.json", "samples.png"}
    assert 0 <= exported.difference < 2e-5  # float32, the same network


def test_the_card_says_where_it_comes_from_and_what_it_scored(
    exported: Exported, run: tuple[RunFolder, Experiment], tiny_pipeline: Path
) -> None:
    folder, experiment_ = run
    card = json.loads((exported.folder / "rltune.json").read_text())
    _, base, trained = read_results(folder.results_file)
    assert card == {
        "schema": 1,
        "rltune": rltune.__version__,
        "run": "tiny",
        "trial": "001",
        "base_model": str(tiny_pipeline),
        "base_revision": None,
        "strength": "load at weight 1.0: alpha / rank is folded into the weights",
        "reloaded": {"difference": exported.difference, "effect": exported.effect, **exported.rounding},
        "settings": VALUES,
        "metrics": trained.metrics,
        "base_metrics": base.metrics,  # of the attempt that went well
        "measured_on": {"prompts": 3, "fresh_prompts": 0},
        "trained_with": [],  # by hand
        "prompts": EVAL_PROMPTS,
        "experiment": experiment_.concrete(VALUES).model_dump(mode="json"),
    }
    assert card["metrics"]["eval/brightness"] > card["base_metrics"]["eval/brightness"]


def test_a_card_has_both_models_by_the_same_measurements(tmp_path: Path) -> None:
    trial = result("001", 0.9, 0.1, checkpoint="a")
    folder = write_run(tmp_path / "mix", experiment(), [result(BASE_TRIAL, 0.5), trial])
    config = experiment().shared
    assert _measurements(trial, folder, config)[0] == trial.metrics
    for name, brightness, checkpoint in ((BASE_TRIAL, 0.4, ""), ("001", 0.7, "a")):
        fresh = {"eval/brightness": brightness}
        row = Confirmation(name, checkpoint, 8, fresh, prompts=("a", "b"), num_reused=0)
        append_line(folder.confirmed_file, json.dumps(asdict(row)))
    metrics, base_metrics, measured_on = _measurements(trial, folder, config)
    assert (metrics["eval/brightness"], base_metrics["eval/brightness"]) == (0.7, 0.4)
    assert measured_on == {"prompts": 8, "fresh_prompts": 8}
    older = result("001", 0.9, 0.1, checkpoint="b")  # another checkpoint than was measured again
    assert _measurements(older, folder, config)[:2] == (older.metrics, result(BASE_TRIAL, 0.5).metrics)


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


def test_a_pick_that_fails_does_not_keep_the_others_from_being_written(
    run: tuple[RunFolder, Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, experiment_ = run
    good = pick_trial("knee", folder, experiment_)
    lost = result("007", 0.7, values=VALUES, checkpoint="trials/007/checkpoints/step-000003")
    zero = TrialResult(**{**vars(good), "trial": "008"})
    states = iter([{name: 0 * value for name, value in load_adapter(folder.path / good.checkpoint).items()}])
    monkeypatch.setattr(exporting, "load_adapter", lambda checkpoint: next(states, None) or load_adapter(checkpoint))
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


def test_a_file_that_fails_its_proof_does_not_stand_in_an_exports_place(
    run: tuple[RunFolder, Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, experiment_ = run
    good = pick_trial("knee", folder, experiment_)

    def write_weaker(model: Any, state: Any, **place: Any) -> Path:
        return write_lora(model, {name: 0.9 * value for name, value in state.items()}, **place)

    monkeypatch.setattr(exporting, "write_lora", write_weaker)
    other = TrialResult(**{**vars(good), "trial": "009"})
    with pytest.raises(RunError, match=r"trial 009: .*exports/009\.unproved/.*; the file is not fit for use$"):
        export_trials([other], folder, experiment_, on_export=pytest.fail)
    assert not (folder.exports_dir / "009").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
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
    exported = export_trial(picked, folder, experiment_)
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
