"""Trackers: through the seam with a made-up one, and each real tool where it is installed, read back by itself."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from PIL import Image

from rltune.config.experiment import RunConfig
from rltune.errors import UserError
from rltune.runs.events import read_events
from rltune.runs.rows import MetricsFile, read_metrics
from rltune.training import tracking
from rltune.training.tracking import TrackedMetrics, Trial, check_trackers
from tests.training.runs import Make, train

KNOBS = {"optim.lr": 0.25, "model.lora.rank": 4, "estimator.draw": "uniform"}


class Notebook:
    """A tracker that remembers what it was told."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.figures: dict[int, dict[str, float]] = {}
        self.pictures: list[tuple[str, str, int]] = []
        self.num_finishes = 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.figures[step] = dict(values)

    def log_picture(self, name: str, file: Path, step: int) -> None:
        self.pictures.append((name, file.name, step))

    def finish(self) -> None:
        self.num_finishes += 1


@pytest.fixture
def notebooks(monkeypatch: pytest.MonkeyPatch) -> list[Notebook]:
    """Every notebook that was opened, in order; ``tensorboard`` opens one."""
    opened: list[Notebook] = []

    def make(trial: Trial) -> Notebook:
        opened.append(Notebook(trial))
        return opened[-1]

    monkeypatch.setattr(tracking, "TRACKERS", {"tensorboard": make})
    return opened


@pytest.fixture
def trial_dir(tmp_path: Path) -> Path:
    """A trial of the run ``mix``, as a sweep suggests it."""
    PartialState()
    folder = tmp_path / "mix" / "trials" / "007"
    (folder / "samples").mkdir(parents=True)
    (folder / "trial.json").write_text(json.dumps({"id": "007", "values": KNOBS, "params": {}}))
    return folder


def config(*names: str, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "n", "rewards": {"brightness": {}}, "track": list(names), **sections})


def open_rows(trial_dir: Path, *names: str, resume_step: int = 0) -> TrackedMetrics:
    rows = MetricsFile(trial_dir / "metrics.jsonl", resume_step=resume_step)
    return TrackedMetrics(rows, config(*names), trial_dir, resume_step=resume_step)


def row(step: int) -> dict[str, float]:
    """Step s has the reward s / 8, and every second step an evaluation."""
    evaluated = {"eval/brightness": step / 4, "gain/brightness": step / 16, "eval_s": 1.0} if step % 2 == 0 else {}
    return {"step": step, "train/reward": step / 8, "step_s": 0.5, **evaluated}


def write_steps(rows: TrackedMetrics, trial_dir: Path, steps: range) -> None:
    for step in steps:
        if step % 2 == 0:
            Image.new("RGB", (6, 4), (step, 2, 3)).save(trial_dir / "samples" / f"step-{step:06d}.png")
        rows.write(row(step))


def test_every_row_comes_by_its_step(trial_dir: Path, notebooks: list[Notebook]) -> None:
    rows = open_rows(trial_dir, "tensorboard")
    write_steps(rows, trial_dir, range(1, 4))
    rows.close()
    (notebook,) = notebooks
    assert notebook.figures == {step: {k: v for k, v in row(step).items() if k != "step"} for step in (1, 2, 3)}
    assert notebook.pictures == [("samples", "step-000002.png", 2)]
    assert notebook.num_finishes == 1
    trial = notebook.trial
    assert (trial.name, trial.run, trial.knobs, trial.resume_step) == ("mix/007", "mix", KNOBS, 0)
    assert trial.objectives == ("brightness",)
    assert read_metrics(trial_dir / "metrics.jsonl") == [row(step) for step in (1, 2, 3)]


def test_no_tracker_is_opened_unasked(trial_dir: Path, notebooks: list[Notebook]) -> None:
    rows = open_rows(trial_dir)
    rows.write(row(1))
    rows.close()
    assert notebooks == []
    assert read_metrics(trial_dir / "metrics.jsonl") == [row(1)]


def test_a_run_without_knobs_shows_its_settings(tmp_path: Path, notebooks: list[Notebook]) -> None:
    folder = tmp_path / "one" / "trials" / "001"
    open_rows(folder, "tensorboard").close()
    knobs = notebooks[0].trial.knobs
    assert knobs["optim.lr"] == RunConfig(rewards={"brightness": {}}).optim.lr
    assert knobs["rewards.brightness.weight"] == 1.0
    assert not any(path.startswith(("search", "resources", "track")) for path in knobs)


@pytest.mark.parametrize("method", ["__init__", "log", "log_picture", "finish"])
def test_a_tracker_that_fails_costs_its_plots_and_says_so_once(
    trial_dir: Path, notebooks: list[Notebook], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    class Broken(Notebook):
        pass

    def fail(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(Broken, method, fail)
    good = dict(tracking.TRACKERS)["tensorboard"]
    monkeypatch.setattr(tracking, "TRACKERS", {"mlflow": Broken, "tensorboard": good})
    rows = open_rows(trial_dir, "mlflow", "tensorboard")
    write_steps(rows, trial_dir, range(1, 5))
    rows.close()
    assert [entry["step"] for entry in read_metrics(trial_dir / "metrics.jsonl")] == [1, 2, 3, 4]
    assert sorted(notebooks[-1].figures) == [1, 2, 3, 4]
    notices = [event.fields["text"] for event in read_events(trial_dir / "events.jsonl")]
    expected = "track: mlflow failed (no route to host); it has no more of this trial, metrics.jsonl has all"
    assert notices == [expected]


def test_a_package_that_is_not_there_is_named_before_the_start() -> None:
    check_trackers(["json", "wave"])  # what is there passes
    with pytest.raises(UserError, match=r'^track: no_such_tool is not installed; pip install "rltune\[track\]", or'):
        check_trackers(["json", "no_such_tool"])
    with pytest.raises(UserError, match="no_such_tool, nor_such are not installed"):
        check_trackers(["no_such_tool", "nor_such"])


@pytest.mark.slow
def test_the_loop_hands_its_rows_over(
    make_config: Make, tmp_path: Path, base_dir: Path, notebooks: list[Notebook]
) -> None:
    asked = make_config(track=["tensorboard"], optim={"steps": 2}, evaluate={"every": 2})
    train(asked, tmp_path, base_dir=base_dir)
    rows = read_metrics(tmp_path / "trial" / "metrics.jsonl")
    (notebook,) = notebooks
    assert notebook.figures[2]["eval/brightness"] == rows[1]["eval/brightness"]
    assert notebook.figures[1]["train/reward"] == rows[0]["train/reward"]
    assert [step for _, _, step in notebook.pictures] == [2]
    assert notebook.num_finishes == 1
    again = train(asked, tmp_path, base_dir=base_dir, resume_from=tmp_path / "checkpoints" / "step-000002")
    assert len(again.reports) == 1
    assert notebooks[1].trial.resume_step == 2


def interrupt_and_resume(trial_dir: Path, name: str) -> None:
    """Five steps, a kill after the checkpoint of step 2, and steps 3 to 6 by a new process."""
    first = open_rows(trial_dir, name)
    write_steps(first, trial_dir, range(1, 6))
    first.close()
    second = open_rows(trial_dir, name, resume_step=2)
    write_steps(second, trial_dir, range(3, 7))
    second.close()
    assert read_events(trial_dir / "events.jsonl") == []


def test_tensorboard_has_every_step_once(trial_dir: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupt_and_resume(trial_dir, "tensorboard")
    folder = trial_dir.parents[1] / "tensorboard" / "007"
    assert not [path for path in folder.iterdir() if path.is_dir()]  # no runs beside the trial's
    found = EventAccumulator(str(folder))
    found.Reload()
    assert [(point.step, point.value) for point in found.Scalars("train/reward")] == [(s, s / 8) for s in range(1, 7)]
    assert [(point.step, point.value) for point in found.Scalars("eval/brightness")] == [(2, 0.5), (4, 1.0), (6, 1.5)]
    pictures = found.Images("samples")
    assert [(picture.step, picture.width, picture.height) for picture in pictures] == [(2, 6, 4), (4, 6, 4), (6, 6, 4)]
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["optim.lr"].number_value == 0.25
    assert hparams["estimator.draw"].string_value == "uniform"


@pytest.mark.long
def test_mlflow_has_every_step_once(trial_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # mlflow sets it: what it was before is put back
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(trial_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mlflow's own, of the libraries beside it
        mlflow = pytest.importorskip("mlflow")
        interrupt_and_resume(trial_dir, "mlflow")
        client = mlflow.MlflowClient(f"sqlite:///{trial_dir.parents[1] / 'mlflow.db'}")
        (experiment,) = client.search_experiments(filter_string="name = 'mix'")
        (run,) = client.search_runs([experiment.experiment_id])
        history = client.get_metric_history(run.info.run_id, "train/reward")
        pictures = [file.path for file in client.list_artifacts(run.info.run_id, "samples")]
    assert run.info.run_name == "mix/007"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optim.lr": "0.25", "model.lora.rank": "4", "estimator.draw": "uniform"}
    assert sorted((point.step, point.value) for point in history) == [(step, step / 8) for step in range(1, 7)]
    assert pictures == [f"samples/step-{step:06d}.png" for step in (2, 4, 6)]
    assert len(list((trial_dir.parents[1] / "mlflow").rglob("*.png"))) == 3
    assert not (trial_dir / "mlruns").exists()  # nothing where the process happens to stand


@pytest.mark.slow
def test_wandb_goes_on_in_the_same_run(trial_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        interrupt_and_resume(trial_dir, "wandb")
    (identity,) = json.loads((trial_dir / "trackers.json").read_text()).values()
    folders = sorted((trial_dir.parents[1] / "wandb").glob("offline-run-*"))
    # without a network a resumed trial is a second part of the run, which `wandb sync` puts together by its id
    assert len(folders) == 2
    # two parts that begin in the same second are told apart by a number behind the identity
    assert all(re.fullmatch(rf"offline-run-\d+_\d+-{identity}(-1)?", folder.name) for folder in folders)
    content = b"".join(file.read_bytes() for folder in folders for file in folder.glob("*.wandb"))
    for text in (b"mix/007", b"optim.lr", b"train/reward", b"gain/brightness"):
        assert text in content
