"""What a job of fresh measurements writes, in this process: no cluster is started."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.train

from rltune.cli.main import app
from rltune.config.load import Experiment
from rltune.orchestration import confirm_job
from rltune.orchestration.confirm_job import measure, mixed, unconfirmed
from rltune.orchestration.job_spec import JobSpec
from rltune.orchestration.mixing import mixable, wanted_mixtures
from rltune.runs.confirmations import comparable, read_confirmations
from rltune.runs.fronts import read_front
from rltune.runs.layout import BASE_TRIAL, RunFolder, TrialSpec
from rltune.runs.mixtures import read_mixtures
from rltune.runs.results import TrialResult, append_result
from rltune.training.loop import base_run, train_run
from rltune.training.reporter import FolderReporter
from tests.run_folders import experiment
from tests.tiny import EVAL_PROMPTS, TRAIN_PROMPTS

VALUES = {
    "001": {"model.lora.rank": 2, "rewards.brightness.weight": 1.0, "rewards.smoothness.weight": 0.0, "optim.lr": 0.02},
    "002": {"model.lora.rank": 4, "rewards.brightness.weight": 0.0, "rewards.smoothness.weight": 1.0, "optim.lr": 0.02},
}


@pytest.fixture(scope="module")
def run(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Experiment]:
    """Two trials, each on one of two rewards, that ended."""
    asked = experiment(
        model={"base": str(tiny_pipeline), "lora": {"rank": {"choice": [2, 4]}, "alpha": 6.0}},
        prompts={"train": TRAIN_PROMPTS, "eval": EVAL_PROMPTS},
        sampler={"steps": 2, "guidance": 2.0},
        estimator={"k": 1},
        optim={"lr": {"float": [0.0, 0.1]}, "steps": 2, "batch": 2},
        evaluate={"every": 2, "prompts": 2, "confirm": 2, "images_per_prompt": 1, "judges": []},
        objectives=["brightness", "smoothness"],
        sweep={"soup": True, "strengths": True},
    )
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    folder.path.mkdir()
    folder.experiment_file.write_text(asked.to_yaml())
    base = FolderReporter(folder.scratch_dir)
    base_run(asked.shared, trial_dir=folder.trial_dir(BASE_TRIAL), base_dir=folder.base_dir, reporter=base)
    append_result(folder.results_file, TrialResult(BASE_TRIAL, "ok", {}, {}, metrics=base.reports[-1]))
    for trial, values in VALUES.items():
        folder.write_trial(TrialSpec(trial, values, {}))
        reporter = FolderReporter(folder.checkpoints_dir(trial))
        train_run(
            asked.concrete(values), trial_dir=folder.trial_dir(trial), base_dir=folder.base_dir, reporter=reporter
        )
        latest = reporter.latest()
        assert latest is not None
        place = str(latest.relative_to(folder.path))
        ended = TrialResult(trial, "ok", values, values, metrics=reporter.reports[-1], checkpoint=place)
        append_result(folder.results_file, ended)
    return folder, asked


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def job(worker: Callable[[Any], None], config: Any, *args: Any, **options: Any) -> Any:
        return SimpleNamespace(fit=lambda: worker(config))

    alone = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(confirm_job, "make_ray_job", job)
    monkeypatch.setattr(ray.train, "get_context", lambda: alone)


@pytest.mark.long
def test_mixtures_of_a_front_are_measured_once_and_exported(
    run: tuple[RunFolder, Experiment], in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, asked = run
    config = asked.shared.model_dump(mode="json")
    spec = JobSpec(BASE_TRIAL, str(folder.path), config, 0, str(Path.cwd()), True, False, "")
    searched = read_front(folder, asked)
    assert searched is not None
    chosen = [row for row in searched.members if row.trial != BASE_TRIAL]
    measure(unconfirmed(chosen, folder, asked), folder, spec, num_workers=1)
    assert unconfirmed(chosen, folder, asked) == []
    front = read_front(folder, asked)
    assert front is not None
    parts = mixable(front, asked, lambda result: True)
    wanted = wanted_mixtures(*parts, folder)
    trials = {member.trial: member for member in front.members}
    measure(mixed(wanted, trials, folder, asked), folder, spec, num_workers=1)
    assert wanted_mixtures(*parts, folder) == []
    rows = {row.name: row for row in read_mixtures(folder)}
    assert list(rows) == [row.name for row in wanted]
    found = comparable(read_confirmations(folder))
    assert found is not None
    assert all(tuple(row.prompts) == tuple(found.base.prompts) for row in rows.values())

    # so little training is nearly linear on the same prompts and noise: at half its strength half its gain
    def gains(row: Any) -> np.ndarray[Any, Any]:
        return np.array(row.values["brightness"]) - np.array(found.base.values["brightness"])

    whole = gains(found.of(trials["001"]))
    assert gains(rows["001@0.5"]) == pytest.approx(whole / 2, abs=0.3 * np.abs(whole).max())
    both = (whole + gains(found.of(trials["002"]))) / 2
    assert gains(rows["soup-2"]) == pytest.approx(both, abs=0.3 * np.abs(whole).max())
    reported = read_front(folder, asked)
    assert reported is not None
    assert reported.soups is not None
    assert [soup.name for soup in reported.soups.every] == ["soup-1", "soup-2", "soup-3"]

    with pytest.raises(SystemExit, match=r"^0$"):
        app(["export", str(folder.path), "--pick", "soup-2"])
    place = folder.exports_dir / "soup-2"
    assert f"soup-2, diffusers -> {place}" in capsys.readouterr().out.replace("\n", "")
    card = json.loads((place / "rltune.json").read_text())
    assert (card["soup"]["weights"], card["soup"]["settings"]) == ({"001": 0.5, "002": 0.5}, VALUES)
    assert {figure["name"]: figure["value"] for figure in card["figures"]}["brightness"] == pytest.approx(
        rows["soup-2"].metrics["eval/brightness"]
    )
    assert card["formats"]["diffusers"]["reloaded"]["difference"] < 2e-5
    readme = (place / "README.md").read_text()
    assert "mixed by rltune" in readme
    assert "| 002 | 0.5 | 4 |" in readme
    assert not (place / "experiment.yaml").exists()
