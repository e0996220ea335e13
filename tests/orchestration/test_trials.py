"""What becomes of trials: reports and ends are given by hand where Ray Tune would, and no cluster is started."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rltune.config.load import Experiment
from rltune.errors import StorageError
from rltune.orchestration.claiming import claim_run
from rltune.orchestration.job_spec import STORAGE_ERROR, JobSpec
from rltune.orchestration.nodes import Node
from rltune.orchestration.outcome import find_checkpoint
from rltune.orchestration.trials import Abort, Trials
from rltune.orchestration.workload import work_out
from rltune.runs.base_scores import load_scores
from rltune.runs.layout import BASE_TRIAL, RunFolder, TrialSpec
from rltune.runs.objectives import Objectives
from rltune.runs.record import base_folder, read_record
from rltune.runs.results import read_results
from rltune.runs.store import read_json_lines
from rltune.search.searcher import Search
from rltune.training.checkpoint import ADAPTER_FILE, Evaluated, Progress, report_of, save_checkpoint
from rltune.training.selection import Selection
from tests.run_folders import SEARCHED, experiment, result, write_run

NODES = (Node(2.0),)
SEARCH = {"trials": 8, "sampler": "random"}
PRUNED = {**SEARCH, "prune": True, "grace": 1, "reduction": 2}


def trials_in(folder: RunFolder, asked: Experiment) -> Trials:
    work = work_out(asked, NODES)
    return Trials(claim_run(folder, asked, precision=work.precision), work, is_loopback=True)


def trials_of(path: Path, *, fresh: bool = True, **sections: Any) -> Trials:
    """Trials of two objectives, brightness up and drift down, whose base model has been measured."""
    asked = experiment(**({"search": SEARCH} | sections))
    if not fresh:
        return trials_in(RunFolder(path / "mix"), asked)
    folder = write_run(path / "mix", asked)
    scores = load_scores(base_folder(folder, read_record(folder)))
    assert scores is not None
    trials = trials_in(folder, asked)
    trials.on_end(job(folder, BASE_TRIAL), {"step": 0.0, "is_final": 1.0, **scores.summary}, "", 1.0)
    return trials


def job(folder: RunFolder, trial: str) -> JobSpec:
    config = experiment().shared.model_dump(mode="json")
    return JobSpec(trial, str(folder.path), config, num_gpus_per_worker=0, work_dir="/", is_loopback=True)


def metrics_at(step: int, brightness: float, drift: float) -> dict[str, float]:
    return {**result("001", brightness, drift).metrics, "step": float(step), "images_seen": 4.0 * step}


def evaluate(trials: Trials, spec: JobSpec, step: int, brightness: float, drift: float = 0.1, **more: Any) -> bool:
    """Write the checkpoint of an evaluation and report it; whether the trial is to be stopped."""
    metrics = metrics_at(step, brightness, drift)
    folder = spec.folder.checkpoints_dir(spec.trial) / spec.train_name / f"checkpoint_{step:04d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    last = Evaluated(step, {name: value for name, value in metrics.items() if "/" in name})
    save_checkpoint(folder, {"a": torch.full((2,), float(step))}, {}, Progress(step, 4 * step), last=last)
    return trials.on_report(spec, {**metrics, "is_final": 0.0, "is_preempted": 0.0, **more})


def measured(trials: Trials, spec: JobSpec, metrics: dict[str, float]) -> None:
    """Write a row as the trial's worker does."""
    with (trials.folder.trial_dir(spec.trial) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n")


def suggest(trials: Trials) -> JobSpec:
    spec = trials.suggest()
    assert spec is not None
    return spec


def end(trials: Trials, spec: JobSpec, step: int, brightness: float, drift: float = 0.1, **more: Any) -> None:
    trials.on_end(spec, {**metrics_at(step, brightness, drift), **more}, "", 2.0)


def finish(trials: Trials, brightness: float, drift: float = 0.1) -> JobSpec:
    spec = suggest(trials)
    assert not evaluate(trials, spec, 10, brightness, drift, is_final=1.0)
    end(trials, spec, 10, brightness, drift, is_final=1.0)
    return spec


@pytest.mark.slow
def test_a_trial_that_falls_behind_is_recorded_as_what_it_was_at_its_step(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, search={**SEARCH, "prune": True, "reduction": 2})
    specs = [suggest(trials) for _ in range(4)]
    # each worse in both objectives than the one before; up to two at a rung all go on
    stopped = [evaluate(trials, spec, 5, 0.9 - 0.1 * i, 0.1 + 0.01 * i) for i, spec in enumerate(specs)]
    assert stopped == [False, False, True, True]
    late = specs[2]
    # it trained on before it was gone: what is recorded is what it was stopped at
    evaluate(trials, late, 10, 0.95)
    end(trials, late, 5, 0.7, 0.12)
    (row,) = [row for row in read_results(trials.folder.results_file) if row.trial == late.trial]
    assert (row.state, row.metrics["step"], row.metrics["eval/brightness"]) == ("stopped", 5.0, 0.7)
    assert row.reason == "rank 3 of 3 at step 5, of which the best 2 go on"
    assert row.checkpoint.endswith("checkpoint_0005")
    assert trials.num_left == 7


@pytest.mark.slow
def test_where_that_checkpoint_is_gone_the_trial_is_what_its_newest_says(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, stop={"diverged": 0.5})
    spec = suggest(trials)
    assert evaluate(trials, spec, 5, -9.0, 9.0)
    evaluate(trials, spec, 10, -8.0, 8.0)
    broken = spec.folder.checkpoints_dir(spec.trial) / spec.train_name / "checkpoint_0005" / ADAPTER_FILE
    broken.write_bytes(broken.read_bytes()[:-1])
    end(trials, spec, 5, -9.0, 9.0)
    row = trials.results[-1]
    assert (row.state, row.metrics["step"], row.metrics["eval/brightness"]) == ("stopped", 10.0, -8.0)
    assert row.checkpoint.endswith("checkpoint_0010")
    assert row.reason.startswith("diverged: ")


@pytest.mark.slow
def test_of_a_trials_checkpoints_the_one_file_that_counts_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = trials_of(tmp_path, evaluate={"every": 2})
    spec = suggest(trials)
    for step in (2, 4, 6, 8, 10):
        evaluate(trials, spec, step, 0.9)
    hashed: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        "rltune.training.checkpoint.hashlib.file_digest",
        lambda file, name: (hashed.append(str(Path(file.name).relative_to(tmp_path))), digest(file, name))[1],
    )
    end(trials, spec, 10, 0.9, is_final=1.0)
    assert trials.results[-1].checkpoint.endswith("checkpoint_0010")
    assert [Path(name).parts[-2:] for name in hashed] == [("checkpoint_0010", ADAPTER_FILE)]


@pytest.mark.slow
def test_a_trial_without_a_whole_checkpoint_failed(tmp_path: Path) -> None:
    trials = trials_of(tmp_path)
    spec = suggest(trials)
    end(trials, spec, 10, 0.9, is_final=1.0)
    assert trials.results[-1].state == "failed"
    assert "no whole checkpoint of an evaluation is left" in trials.results[-1].reason


def test_a_checkpoint_written_in_haste_is_no_result(tmp_path: Path) -> None:
    trials = trials_of(tmp_path)
    spec = suggest(trials)
    evaluate(trials, spec, 5, 0.8)
    hasty = spec.folder.checkpoints_dir(spec.trial) / spec.train_name / "checkpoint_0007"
    last = Evaluated(5, {name: value for name, value in metrics_at(5, 0.8, 0.1).items() if "/" in name})
    save_checkpoint(hasty, {"a": torch.zeros(2)}, {}, Progress(7, 28), last=last)
    # asked to leave, it is not over: the same command takes it up again
    assert not trials.on_report(spec, {**metrics_at(7, -9.0, 9.0), "is_final": 0.0, "is_preempted": 1.0})
    end(trials, spec, 7, 0.8, is_final=0.0, is_preempted=1.0)
    assert [row.trial for row in trials.results] == [BASE_TRIAL]
    found = find_checkpoint(trials.folder, spec.trial, {"step": 7.0})
    assert found is not None
    assert found[0].endswith("checkpoint_0005")


@pytest.mark.slow
def test_rungs_are_rebuilt_from_the_folder(tmp_path: Path) -> None:
    search = {**SEARCH, "prune": True, "reduction": 2}
    trials = trials_of(tmp_path, search=search)
    for brightness in (0.9, 0.8):
        spec = suggest(trials)
        evaluate(trials, spec, 5, brightness)
        file = spec.folder.trial_dir(spec.trial) / "metrics.jsonl"
        rows = [metrics_at(5, brightness, 0.1), {"step": 6.0, "train/reward": 1.0}]
        file.write_text("".join(f"{row}\n".replace("'", '"') for row in rows))
    assert len(read_json_lines(file)) == 2
    again = trials_of(tmp_path, fresh=False, search=search)
    first, second, third = (suggest(again) for _ in range(3))
    assert [first.trial, second.trial, third.trial] == ["001", "002", "003"]  # the interrupted ones first
    assert evaluate(again, third, 5, 0.7, 0.2)  # behind both that reported before the restart


@pytest.mark.slow
@pytest.mark.parametrize("rule", [{"stop": {"broken_constraint": 2, "diverged": None}}, {"search": PRUNED}])
def test_rules_decide_the_same_live_and_rebuilt_where_another_step_is_selected(
    tmp_path: Path, rule: dict[str, Any]
) -> None:
    sections = {"evaluate": {"every": 1, "select": "brightness"}, "constraints": {"drift": {"max": 0.3}}, **rule}
    trials = trials_of(tmp_path, **sections)
    selection = Selection(experiment(**sections).shared, metrics_at(0, 0.0, 0.0))
    others = [suggest(trials) for _ in range(2)]
    spec = suggest(trials)
    for other in others:
        for step in range(1, 9):
            measured(trials, other, metrics_at(step, 0.8, 0.1))
            trials.on_report(other, {**metrics_at(step, 0.8, 0.1), "is_final": 0.0})
    decisions = []
    # the third is the best for ever, and kept for it; from the fourth on the constraint is broken
    for step, (brightness, drift) in enumerate([(0.6, 0.1), (0.7, 0.1), (0.9, 0.2)] + [(0.5, 0.4)] * 5, start=1):
        metrics = metrics_at(step, brightness, drift)
        rebuilt = trials_of(tmp_path, fresh=False, **sections).rules
        assert rebuilt is not None
        selection.take(Evaluated(step, {name: metrics[name] for name in metrics if "/" in name}), dict)
        report = {**report_of(Progress(step, 4 * step), selection.counted, selection.last), "is_final": 0.0}
        live = trials.on_report(spec, report)
        assert trials.stopped.pop(spec.trial, None) == rebuilt.on_report(spec.trial, metrics)
        measured(trials, spec, metrics)
        decisions.append(live)
    assert selection.counted is not None
    assert selection.counted.step == 3
    expected = [False] * 4 + [True] * 4 if "stop" in rule else [True, True, False, True] + [False] * 3 + [True]
    assert decisions == expected


@pytest.mark.slow
def test_time_that_is_over_starts_nothing_and_stops_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = trials_of(tmp_path, stop={"hours": 1.0})
    spec = suggest(trials)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3601)
    assert trials.suggest() is None
    assert trials.over.startswith("stop.hours: 1 of 1 hours")
    assert not trials.on_report(spec, {"step": 0.0, "is_final": 0.0, "is_preempted": 0.0, "eval/brightness": 0.5})
    assert evaluate(trials, spec, 5, 0.9)
    end(trials, spec, 5, 0.9)
    assert (trials.results[-1].state, trials.results[-1].reason) == ("stopped", trials.over)
    assert trials.num_left == 7


@pytest.mark.slow
def test_a_trial_that_is_done_is_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = trials_of(tmp_path, stop={"hours": 1.0})
    spec = suggest(trials)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3601)
    assert not evaluate(trials, spec, 10, 0.9, is_final=1.0)
    end(trials, spec, 10, 0.9, is_final=1.0)
    assert trials.results[-1].state == "ok"


@pytest.mark.slow
def test_gpu_hours_are_those_of_ended_and_of_running_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.orchestration.test_trials.NODES", (Node(4.0, 4.0),))
    resources = {"workers": 2, "gpus_per_worker": 1, "precision": "fp32"}
    # the base model's second and the first trial's two, on two GPUs each
    trials = trials_of(tmp_path, stop={"gpu_hours": 6.5 / 3600}, resources=resources)
    finish(trials, 0.9)
    start = time.monotonic()
    spec = suggest(trials)
    monkeypatch.setattr(time, "monotonic", lambda: start + 0.2)
    assert suggest(trials)
    monkeypatch.setattr(time, "monotonic", lambda: start + 0.3)
    assert trials.suggest() is None  # 6 and 2 (0.3 + 0.1)
    assert trials.over.startswith("stop.gpu_hours: ")
    assert evaluate(trials, spec, 5, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "reason"),
    [({"hours": 2.0}, "stop.hours: 2 "), ({"gpu_hours": 5.0}, "stop.gpu_hours: 5.0")],
    ids=["hours", "gpu_hours"],
)
def test_budgets_count_over_all_starts_and_a_spent_one_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: dict[str, float], reason: str
) -> None:
    monkeypatch.setattr("tests.orchestration.test_trials.NODES", (Node(4.0, 4.0),))
    sections = {"stop": stop, "resources": {"workers": 2, "gpus_per_worker": 1, "precision": "fp32"}}
    trials = trials_of(tmp_path, **sections)
    file = trials.folder.events_file
    # killed 50 minutes after its start, all of which a trial ran; then 20 minutes, of which the same trial had 15
    started = {"event": "driver_started", "trials_at_once": 2, "workers": 2, "gpus_per_worker": 1, "last_sign": 4000}
    rows = [{"time": 1000, **started}, {"time": 8000, **started}, {"time": 9200, "event": "driver_ended"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"time": 1000, "event": "suggested"}, {"time": 8300, "event": "suggested"}]
    file = trials.folder.trial_events_file("001")
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = trials_of(tmp_path, fresh=False, **sections)
    assert again.spending.gpu_s == 2 * (3000 + 900)
    suggest(again)
    begun = time.monotonic()
    left = 2 * 3600 - (3000 + 1200) if "hours" in stop else (5 * 3600 - 2 * (3000 + 900)) / 2
    monkeypatch.setattr(time, "monotonic", lambda: begun + left - 15)
    again.check_budget()
    assert not again.over
    monkeypatch.setattr(time, "monotonic", lambda: begun + left + 15)
    again.check_budget()
    assert again.over.startswith(reason)


@pytest.mark.slow
def test_a_front_that_no_longer_grows_ends_the_sweep_and_lets_trials_finish(tmp_path: Path) -> None:
    stop = {"stalled_trials": 2, "stalled_growth": 0.0}
    trials = trials_of(tmp_path, stop=stop)
    running = suggest(trials)
    finish(trials, 0.9, 0.05)
    finish(trials, 0.8, 0.2)
    assert not trials.over
    finish(trials, 0.7, 0.2)
    assert trials.over.startswith("stop.stalled_trials: ")
    assert trials.suggest() is None
    assert not evaluate(trials, running, 5, 0.6)
    again = trials_of(tmp_path, fresh=False, stop=stop)
    again.take_stock(again.results)
    assert again.over == trials.over
    patient = trials_of(tmp_path, fresh=False, stop={"stalled_trials": 3, "stalled_growth": 0.0})
    patient.take_stock(patient.results)
    assert not patient.over


@pytest.mark.slow
@pytest.mark.parametrize(
    "meet",
    [
        lambda trials, spec: trials.on_report(spec, {STORAGE_ERROR: "/runs/mix: no space left on device"}),
        lambda trials, spec: trials.on_end(spec, {}, "ray::StorageError: /runs/mix: no space left on device", 1.0),
    ],
)
def test_a_disk_that_fails_a_trial_ends_the_run_and_is_no_failure(tmp_path: Path, meet: Callable[..., Any]) -> None:
    trials = trials_of(tmp_path)
    spec = suggest(trials)
    with pytest.raises(Abort):
        meet(trials, spec)
    assert isinstance(trials.storage_error, StorageError)
    assert str(trials.storage_error) == "/runs/mix: no space left on device"
    assert [row.trial for row in read_results(trials.folder.results_file)] == [BASE_TRIAL]


NO_WEIGHT = {"rewards.brightness.weight": 0.0, "rewards.smoothness.weight": 0.0}


@pytest.mark.long
def test_a_suggestion_that_is_no_valid_run_is_a_failed_trial_and_the_next_is_dealt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both weights are drawn as exactly 0, which is accepted as no draw comes to it; a sampler may all the same."""
    sections = {"rewards": {name: {"weight": {"float": [0, 1]}} for name in ("brightness", "smoothness")}}
    trials = trials_of(tmp_path, **sections)
    ask = Search.ask

    def at_zero(search: Search) -> TrialSpec:
        spec = ask(search)
        is_bad = spec.id in ("001", "002", "008")
        return replace(spec, values={**spec.values, **NO_WEIGHT}) if is_bad else spec

    monkeypatch.setattr(Search, "ask", at_zero)
    assert [suggest(trials).trial for _ in range(5)] == ["003", "004", "005", "006", "007"]
    assert trials.suggest() is None  # the eighth and last of the sweep was no valid run either
    rows = read_results(trials.folder.results_file)
    assert [(row.trial, row.state) for row in rows[1:]] == [(n, "failed") for n in ("001", "002", "008")]
    rule = "rewards.brightness.weight: no reward has a positive weight, got 0 for every one"
    assert rows[1].reason.startswith(f"never started, since its settings are no valid run: {rule}")
    assert trials.num_left == 5


@pytest.mark.slow
def test_a_trial_of_before_that_is_no_valid_run_does_not_stop_the_sweep_again(tmp_path: Path) -> None:
    sections = {"rewards": {name: {"weight": {"float": [0, 1]}} for name in ("brightness", "smoothness")}}
    trials = trials_of(tmp_path, **sections)
    spec = Search(trials.experiment, Objectives(("brightness", "drift"))).ask()
    trials.folder.write_trial(replace(spec, values={**spec.values, **NO_WEIGHT}))
    again = trials_of(tmp_path, fresh=False, **sections)
    assert suggest(again).trial == "002"
    assert [(row.trial, row.state) for row in again.results[1:]] == [("001", "failed")]


@pytest.mark.slow
def test_a_disk_that_fails_the_sweep_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = trials_of(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/runs/mix/trials/001/trial.json")

    monkeypatch.setattr(RunFolder, "write_trial", full)
    with pytest.raises(Abort):
        trials.suggest()
    assert str(trials.storage_error).startswith("/runs/mix/trials/001/trial.json: no space left on device; free some")


def test_without_a_base_model_nothing_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    trials = trials_in(folder, experiment(search=SEARCH))
    assert suggest(trials).waits_for_base
    with pytest.raises(Abort):
        trials.on_end(job(folder, BASE_TRIAL), {}, "the weights are missing", 1.0)
    assert read_results(folder.results_file)[0].reason == "the weights are missing"


def test_a_trial_waits_for_a_base_model_that_is_measured_as_it_is(tmp_path: Path) -> None:
    asked = experiment(
        {**SEARCHED, "sampler": {"steps": {"choice": [10, 20]}}}, search={"trials": 9, "sampler": "random"}
    )
    trials = trials_in(RunFolder(tmp_path), asked)
    specs = [suggest(trials) for _ in range(9)]
    for spec in specs:  # the base model is measured with the first option; who differs measures for itself
        assert spec.waits_for_base == (spec.run_config.sampler.steps == 10)
    assert {spec.waits_for_base for spec in specs} == {True, False}


@pytest.mark.parametrize(
    ("kind", "select", "chosen"),
    [("lora", "brightness", ["001"]), ("lora", "last", []), ("basis", "last", ["001"])],
)
def test_of_a_single_run_a_selected_checkpoint_or_a_basis_is_what_is_measured_again(
    tmp_path: Path, kind: str, select: str, chosen: list[str]
) -> None:
    fixed = {"model": {"lora": {"rank": 4}, "adapter": {"kind": kind}}, "optim": {"lr": 1e-3, "steps": 10, "batch": 4}}
    rewards = {"brightness": {}, **({"smoothness": {}} if kind == "basis" else {})}
    trials = trials_of(tmp_path, **fixed, rewards=rewards, evaluate={"every": 5, "select": select})
    finish(trials, -0.4)  # dominated by the base model: chosen all the same
    assert [result.trial for result in trials.chosen] == chosen


@pytest.mark.slow
def test_of_a_search_the_trained_members_of_its_front_are_measured_again(tmp_path: Path) -> None:
    trials = trials_of(tmp_path)
    for brightness, drift in ((0.7, 0.1), (0.6, 0.2), (0.9, 0.3)):
        finish(trials, brightness, drift)
    assert [result.trial for result in trials.chosen] == ["003", "001"]
