"""``import rltune``: loads nothing; load and plan say what is wrong; a run is read as plain data."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rltune
from rltune import api
from rltune.config.load import Experiment
from rltune.errors import ExperimentError, UserError
from rltune.orchestration import campaign
from rltune.runs.status import RunStatus
from tests.run_folders import experiment, result, write_rows, write_run

SMALL: dict[str, Any] = {"rewards": {"brightness": {}}, "prompts": {"train": ["a"], "eval": ["b"]}}


def in_a_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_it_loads_nothing() -> None:
    code = "import sys, typing; before = set(sys.modules); import rltune; print(sorted(set(sys.modules) - before))"
    assert in_a_process(code) == "['rltune']\n"


@pytest.mark.slow
def test_a_run_is_opened_without_torch_or_ray(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mix", experiment(), results=[result("000", 0.5, 0.0)])
    heavy = "{'torch', 'ray', 'optuna', 'diffusers', 'pandas'}"
    code = f"import sys, rltune; print(rltune.open_run({str(folder.path)!r}).trials[0]['trial'])"
    assert in_a_process(f"{code}; print(sorted({heavy} & sys.modules.keys()))") == "000\n[]\n"


def test_what_it_offers_is_listed_and_nothing_else_is() -> None:
    assert {"load", "plan", "sweep", "train", "open_run"} <= set(dir(rltune))
    with pytest.raises(AttributeError, match="module 'rltune' has no attribute 'swep'; it offers Run, RunStatus, "):
        rltune.swep  # noqa: B018


# ---- load


def test_a_mapping_and_a_file_load_alike(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(json.dumps(SMALL))
    overrides = {"optim.lr": {"log_float": [1e-4, 1e-3]}, "optim.steps": 3, "name": "x"}
    loaded = rltune.load(SMALL, overrides)
    assert loaded.raw == rltune.load(tmp_path / "x.yaml", overrides).raw
    assert list(loaded.space) == ["optim.lr"]
    assert loaded.shared.optim.steps == 3
    assert rltune.load(SMALL, ["optim.steps=3"]).shared.optim.steps == 3


def test_all_faults_of_a_mapping_are_listed() -> None:
    with pytest.raises(ExperimentError) as raised:
        rltune.load({"rewards": {"britness": {}}, "optim": {"stepz": 3}})
    assert [str(fault).split(":")[0] for fault in raised.value.faults] == ["optim.stepz", "rewards.britness"]


# ---- plan, sweep


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "find_address", lambda address: None)


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_a_plan_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "connect", lambda address: pytest.fail("a cluster was wanted"))
    plan = rltune.plan({**SMALL, "evaluate": {"prompts": 1}}, storage=tmp_path / "runs")
    assert plan.workload.num_trials == 1
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ExperimentError, match=r"evaluate\.prompts: 16 prompts are wanted, but prompts\.eval holds 1"):
        rltune.plan({**SMALL, "evaluate": {"prompts": 16}}, storage=tmp_path / "runs")


@pytest.mark.usefixtures("alone")
def test_a_sweep_wants_something_to_search_and_a_training_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every value is fixed, there is nothing to search; run: rltune train"):
        rltune.sweep(SMALL, storage=tmp_path)
    with pytest.raises(UserError, match=r"optim\.lr are distributions; fix each with --set"):
        rltune.train(rltune.load(SMALL, {"optim.lr": {"float": [0, 1]}}), storage=tmp_path)


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """``runs/mix`` is there as soon as it is asked for, and is shown until this is set."""
    folder = write_run(tmp_path / "mix", experiment(), results=[result("000", 0.5, 0.0), result("001", 0.8, 0.1)])

    def run_campaign(asked: Experiment, *, storage: Path, address: str | None, display: Any) -> Any:
        with display(folder, asked):
            shown.wait(5)
        return SimpleNamespace(folder=folder)

    shown = threading.Event()
    monkeypatch.setattr(campaign, "run_campaign", run_campaign)
    monkeypatch.setattr(api, "WATCH_S", 0.001)
    return shown


def test_who_watches_is_told_where_the_run_stands_and_once_more_at_the_end(shown: threading.Event) -> None:
    seen: list[RunStatus] = []

    def watch(status: RunStatus) -> None:
        seen.append(status)
        if len(seen) == 2:
            shown.set()

    run = rltune.sweep(experiment(), watch=watch)
    assert run.name == "mix"
    assert len(seen) >= 3
    assert {status.num_ended for status in seen} == {1}


def test_who_fails_while_watching_does_not_end_the_run(
    shown: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    def watch(status: RunStatus) -> None:
        shown.set()
        raise ValueError("a plot of mine")

    assert rltune.sweep(experiment(), watch=watch).name == "mix"
    assert [record.message for record in caplog.records] == ["watch: failed, and is not called again"]


# ---- a run as plain data


@pytest.fixture
def run(tmp_path: Path) -> rltune.Run:
    rows = [result("000", 0.5, 0.0), result("002", 0.8, 0.1), result("001", 0.6, 0.4)]
    folder = write_run(tmp_path / "mix", experiment(), results=rows)
    write_rows(folder, "001", [{"step": 1.0, "train/reward": 0.1}, {"step": 2.0, "train/reward": 0.3}])
    exported = folder.exports_dir / "002"
    exported.mkdir(parents=True)
    (exported / "rltune.json").write_text("{}")
    (folder.exports_dir / "001.unproved").mkdir()
    return rltune.open_run(folder.path)


def test_trials_front_curves_and_exports_are_plain_data(run: rltune.Run) -> None:
    assert [row["trial"] for row in run.trials] == ["000", "002", "001"]
    assert run.trials[1]["model.lora.rank"] == result("002", 0.8, 0.1).values["model.lora.rank"]
    assert "model.lora.rank" not in run.trials[0]
    assert run.trials[1]["eval/brightness"] == 0.8
    assert run.front is not None
    assert [member["trial"] for member in run.front["members"]] == ["002", "000"]
    assert (run.front["knee"], run.front["best"]) == ("002", {"brightness": "002", "drift": "002"})
    assert [(row["trial"], row["train/reward"]) for row in run.curves] == [("001", 0.1), ("001", 0.3)]
    assert list(run.exports) == ["002"]
    assert (run.name, run.experiment.is_searched, run.status.num_ended) == ("mix", True, 2)
    json.dumps([run.trials, run.front, run.curves])


def test_tables_are_pandas_where_pandas_is_there(run: rltune.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    assert list(run.to_pandas()["eval/brightness"]) == [0.5, 0.8, 0.6]
    assert list(run.to_pandas("front")["trial"]) == ["002", "000"]
    curves = run.to_pandas("curves").pivot(index="step", columns="trial", values="train/reward")
    assert curves["001"].tolist() == [0.1, 0.3]
    assert isinstance(run.to_pandas(), pandas.DataFrame)
    with pytest.raises(UserError, match="no such table, got 'trial'; write trials, front or curves"):
        run.to_pandas("trial")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pandas is not installed; pip install pandas"):
        run.to_pandas()


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder, it has no experiment\.yaml; name one such as runs/mix"):
        rltune.open_run(tmp_path)
