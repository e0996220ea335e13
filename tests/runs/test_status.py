import os
import time
from pathlib import Path

import pytest

from rltune.orchestration.claiming import claim_run
from rltune.runs import status as status_module
from rltune.runs.events import append_event
from rltune.runs.layout import BASE_TRIAL, RunFolder, TrialSpec
from rltune.runs.results import append_result
from rltune.runs.status import RunStatus, StatusReader, TrialStatus, read_status
from tests.run_folders import VALUES, experiment, result, write_rows, write_run

BASE = result(BASE_TRIAL, 0.5, 0.0)
ROWS = [
    {"step": 1, "step_s": 0.25},
    {"step": 5, "step_s": 0.5, "eval/brightness": 0.55, "eval/drift": 0.1},
    {"step": 6, "step_s": 0.75},
]


def read(folder: RunFolder) -> tuple[RunStatus, dict[str, TrialStatus]]:
    status = read_status(folder, experiment())
    return status, {trial.trial: trial for trial in status.trials}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Two trials have ended, one has done steps, one has none."""
    ended = [BASE, result("001", 0.7, 0.2, duration_s=200.0), result("002", reason="step 3: nan")]
    folder = write_run(tmp_path / "mix", experiment(), ended, started=["003", "004"])
    write_rows(folder, "003", ROWS)
    return folder


def test_states_while_a_process_works_on_the_run(folder: RunFolder) -> None:
    with folder.lock():
        status, trials = read(folder)
    assert status.is_active
    states = {name: trial.state for name, trial in trials.items()}
    assert states == {BASE_TRIAL: "done", "001": "done", "002": "failed", "003": "running", "004": "starting"}
    assert (status.name, status.num_trials, status.num_ended) == ("mix", 4, 2)


def test_states_when_no_process_does(folder: RunFolder) -> None:
    status, trials = read(folder)
    assert not status.is_active
    assert [trials[name].state for name in ("001", "002", "003", "004")] == [
        "done",
        "failed",
        "interrupted",
        "interrupted",
    ]
    assert status.remaining_s is None


def test_a_row_shows_steps_knobs_reason_and_the_newest_evaluation(folder: RunFolder) -> None:
    status, trials = read(folder)
    running, fresh, failed = trials["003"], trials["004"], trials["002"]
    assert (running.step, running.num_steps, running.values) == (6, 10, VALUES)
    assert running.metrics["eval/brightness"] == 0.55  # step 6 was not evaluated
    assert running.metrics["step"] == 5
    assert (fresh.step, fresh.metrics) == (0, {})
    assert (failed.reason, failed.metrics) == ("step 3: nan", {})
    assert trials["001"].metrics["eval/brightness"] == 0.7
    assert trials[BASE_TRIAL].num_steps == 0
    assert status.step_s == pytest.approx(0.5)


def test_a_row_is_on_the_front_or_not(tmp_path: Path) -> None:
    broken = result("002", 0.9, 0.1, constraints={"diversity.min": 0.1})
    folder = write_run(tmp_path / "mix", experiment(), [BASE, result("001", 0.7, 0.2), broken, result("003", 0.6, 0.3)])
    status, trials = read(folder)
    assert {name for name, trial in trials.items() if trial.is_on_front} == {BASE_TRIAL, "001"}
    assert not trials["002"].is_feasible
    assert status.front is not None
    assert status.front.knee is not None
    assert status.front.knee.trial == "001"


def test_a_run_that_has_just_been_claimed_has_the_base_model_ahead(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mix")
    with folder.lock():
        claim_run(folder, experiment(), precision="fp32")
        status, trials = read(folder)
    assert {name: trial.state for name, trial in trials.items()} == {BASE_TRIAL: "starting"}
    assert status.front is None
    assert status.step_s is None
    assert status.remaining_s is None


def test_a_base_model_that_failed_before_shows_its_last_result(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mix", experiment(), [result(BASE_TRIAL, reason="out of memory"), BASE])
    _, trials = read(folder)
    assert trials[BASE_TRIAL].state == "done"


def test_lines_that_are_being_written_are_left_out(folder: RunFolder) -> None:
    with (folder.trial_dir("003") / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "st')
    with folder.results_file.open("a") as file:
        file.write('{"trial": "004", ')
    _, trials = read(folder)
    assert trials["003"].step == 6
    assert trials["004"].state == "interrupted"


def test_a_stopped_trial_has_ended_where_it_was_stopped(tmp_path: Path) -> None:
    stopped = result("001", 0.7, 0.2, reason="rank 7 of 9", stopped_at=5, duration_s=50.0)
    folder = write_run(tmp_path / "mix", experiment(), [BASE, stopped])
    status, trials = read(folder)
    trial = trials["001"]
    assert (trial.state, trial.step, trial.num_steps, trial.reason) == ("stopped", 5, 10, "rank 7 of 9")
    assert trial.has_ended
    assert (status.num_ended, status.trial_s) == (1, 50.0)


def test_notices_and_usage_come_from_events(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def happens(moment: float, path: Path, event: str, **fields: object) -> None:
        monkeypatch.setattr(time, "time", lambda: moment)
        append_event(path, event, **fields)

    happens(100, folder.events_file, "driver_started", trials_at_once=2, workers=1)
    happens(100, folder.trial_events_file("003"), "suggested")
    happens(101, folder.trial_events_file("003"), "worker_started")
    happens(103, folder.trial_events_file("003"), "first_step")
    happens(104, folder.trial_events_file("003"), "notice", text="went back to step 4")
    happens(110, folder.events_file, "driver_ended")
    status, trials = read(folder)
    assert trials["003"].notices == ("went back to step 4",)
    assert status.usage is not None
    assert status.usage.total_s == 20
    assert status.usage.seconds["training"] == 1.5  # the rows of trial 003
    assert status.usage.seconds["loading"] == 2


def test_reading_again_sees_all_that_is_new(folder: RunFolder) -> None:
    reader = StatusReader(folder, experiment())
    with folder.lock():
        for read_again in (reader.read, lambda: read_status(folder, experiment())):
            assert [trial.state for trial in read_again().trials] == ["done", "done", "failed", "running", "starting"]
        write_rows(folder, "004", [{"step": 1}])
        write_rows(folder, "003", [*ROWS, {"step": 7, "eval/brightness": 0.95, "eval/drift": 0.0}])
        append_event(folder.trial_events_file("003"), "notice", text="note")
        append_event(folder.trial_events_file("003"), "ended")
        append_result(folder.results_file, result("003", 0.95, 0.0))
        folder.write_trial(TrialSpec("005", VALUES, {}))
        status = reader.read()
        for now in (status, reader.read()):
            assert now.trials == read_status(folder, experiment()).trials
            assert now.front is not None
            assert [member.trial for member in now.front.members] == ["003"]
    assert [trial.state for trial in status.trials] == ["done", "done", "failed", "done", "running", "starting"]
    assert [trial.place for trial in status.trials] == [0, 1, 2, 3, -1, -1]
    assert status.trials[3].notices == ("note",)
    assert reader.read().trials[-1].state == "interrupted"


def test_files_of_ended_trials_are_not_read_again(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = StatusReader(folder, experiment())
    for trial in ("001", "002"):
        append_event(folder.trial_events_file(trial), "ended")
    with folder.lock():
        reader.read()
        looked_at: list[Path] = []
        stamp = status_module._stamp
        monkeypatch.setattr(status_module, "_stamp", lambda path: (looked_at.append(path), stamp(path))[1])
        reader.read()
    assert not [path for path in looked_at if path.parent.name in ("001", "002")]
    assert folder.trial_dir("003") / "metrics.jsonl" in looked_at


def test_elapsed_and_time_left(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(folder.experiment_file, (1000.0, 1000.0))
    os.utime(folder.trial_dir("003") / "metrics.jsonl", (1130.0, 1130.0))
    monkeypatch.setattr(time, "time", lambda: 1260.0)
    with folder.lock():
        active, _ = read(folder)
    assert active.elapsed_s == 260
    # the one trial that ended well took 200 s; 1.4 trials are left, on two at a time
    assert active.remaining_s == pytest.approx(140)
    ended, _ = read(folder)
    assert ended.elapsed_s == 130  # up to the last sign of life
    assert ended.remaining_s is None


def test_what_has_elapsed_is_that_of_all_starts(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for start, end in ((100.0, 130.0), (500.0, 502.0)):
        monkeypatch.setattr(time, "time", lambda start=start: start)
        append_event(folder.events_file, "driver_started", trials_at_once=2, workers=1)
        monkeypatch.setattr(time, "time", lambda end=end: end)
        append_event(folder.events_file, "driver_ended")
    os.utime(folder.experiment_file, (9000.0, 9000.0))  # the folder was copied
    assert read(folder)[0].elapsed_s == 32


def test_there_is_no_time_left_before_a_trial_has_ended_nor_after_the_last(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mix", experiment(), [BASE], started=["001", "002", "003", "004"])
    write_rows(folder, "001", [{"step": 9}])
    with folder.lock():
        assert read(folder)[0].remaining_s is None
        for trial in ("001", "002", "003"):
            append_result(folder.results_file, result(trial, 0.6, duration_s=10.0))
        assert read(folder)[0].remaining_s == pytest.approx(10)
        append_result(folder.results_file, result("004", 0.6, duration_s=10.0))
        assert read(folder)[0].remaining_s is None


def test_rows_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mix", experiment(), [BASE], started=["1000", "101", "999"])
    assert [trial.trial for trial in read(folder)[0].trials] == [BASE_TRIAL, "101", "999", "1000"]


def test_a_run_without_distributions_has_one_trial(tmp_path: Path) -> None:
    fixed = experiment({"rewards": {"brightness": {}}, "optim": {"steps": 10}, "objectives": ["brightness"]})
    folder = write_run(tmp_path / "one", fixed, [BASE, result("001", 0.7, values={})])
    status = read_status(folder, fixed)
    assert (status.num_trials, status.num_ended) == (1, 1)
    assert status.trials[1].num_steps == 10
