"""Made-up clocks, so that every share is known by hand."""

import os
from pathlib import Path
from typing import Any

import pytest

from rltune.runs.events import Event
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.usage import KINDS, Spent, Usage, Work, last_sign, measure, spent, work_of
from tests.run_folders import experiment, write_rows, write_run


def events(*moments: tuple[float, str], **fields: Any) -> list[Event]:
    return [Event(moment, name, fields) for moment, name in moments]


def driver(
    start: float, end: float | None, *, at_once: int = 1, workers: int = 1, last: float = 0.0, **more: float
) -> list[Event]:
    begun = Event(start, "driver_started", {"trials_at_once": at_once, "workers": workers, "last_sign": last, **more})
    return [begun] if end is None else [begun, Event(end, "driver_ended", {})]


def shares(usage: Usage | None) -> dict[str, float]:
    assert usage is not None
    assert list(usage.seconds) == list(KINDS)
    assert sum(usage.seconds.values()) == pytest.approx(usage.total_s)
    return {kind: seconds for kind, seconds in usage.seconds.items() if seconds}


WHOLE = ((10, "suggested"), (14, "worker_started"), (17, "loaded"), (19, "first_step"), (40, "reported"))


def test_every_second_of_one_trial_has_its_place() -> None:
    trial = events(*WHOLE, (60, "reported"), (61, "trained"), (66, "ended"))
    usage = measure(driver(0, 70), {"001": trial}, {"001": Work(25.0, 10.0)}, now=0)
    assert shares(usage) == {
        "starting": 4,
        "loading": 5,
        "training": 25,
        "evaluation": 10,
        "reporting": 7,  # 42 s from the first step to the last
        "ending": 5,
        "waiting": 10,
        "idle": 4,
    }
    assert usage is not None
    assert usage.utilisation == pytest.approx(25 / 70)


def test_the_base_model_is_not_training() -> None:
    base = events((0, "suggested"), (3, "worker_started"), (5, "loaded"), (20, "ended"))
    trial = events((20, "suggested"), (21, "worker_started"), (22, "loaded"), (22, "first_step"), (42, "ended"))
    usage = measure(driver(0, 42, at_once=2), {BASE_TRIAL: base, "001": trial}, {"001": Work(15.0, 0.0)}, now=0)
    # the second slot has nothing to do while the base model is measured, nor beside the only trial
    assert shares(usage) == {
        "base": 20,
        "waiting": 20,
        "starting": 1,
        "loading": 1,
        "training": 15,
        "reporting": 5,
        "idle": 22,
    }


def test_a_trial_of_several_workers_takes_as_many_slots() -> None:
    trial = events((0, "suggested"), (2, "worker_started"), (5, "loaded"), (5, "first_step"), (25, "ended"))
    rows = [{"step_s": 4.0, "workers": 3}, {"step_s": 4.0, "workers": 3, "eval_s": 2.0}]
    usage = measure(driver(0, 25, workers=3), {"001": trial}, {"001": work_of(rows)}, now=0)
    assert shares(usage) == {"starting": 6, "loading": 9, "training": 24, "evaluation": 6, "reporting": 30}


def test_a_killed_worker_loses_what_came_after_its_checkpoint() -> None:
    again = ((50, "worker_started"), (52, "loaded"), (53, "first_step"), (73, "reported"), (73, "trained"))
    trial = events(*WHOLE, *again, (75, "ended"))
    usage = measure(driver(10, 75), {"001": trial}, {"001": Work(30.0, 5.0)}, now=0)
    assert shares(usage) == {
        "starting": 4,
        "loading": 5 + 3,
        "training": 30,
        "evaluation": 5,
        "reporting": 41 - 35,  # 19 .. 40 and 53 .. 73
        "lost": 10,
        "ending": 2,
    }


def test_while_no_driver_runs_the_clock_stands_still() -> None:
    again = ((1000, "suggested"), (1001, "worker_started"), (1002, "loaded"), (1002, "first_step"), (1012, "ended"))
    trial = events(*WHOLE, *again)
    # the first driver was killed; the last row was written at 45
    run = driver(10, None) + driver(1000, 1012, last=45.0)
    usage = measure(run, {"001": trial}, {"001": Work(25.0, 0.0)}, now=5000)
    assert usage is not None
    assert usage.total_s == 35 + 12
    assert shares(usage) == {"starting": 5, "loading": 6, "training": 25, "reporting": 6, "lost": 5}


def test_what_is_spent_counts_interrupted_trials_up_to_the_last_sign_of_life() -> None:
    # half a GPU for each of two workers; the first driver was killed, its last sign of life was at 45
    run = driver(10, None, workers=2, gpus_per_worker=0.5) + driver(1000, None, last=45.0, gpus_per_worker=4.0)
    trials = {
        BASE_TRIAL: events((12, "suggested"), (20, "worker_started"), (25, "ended")),
        "001": events(
            (20, "suggested"), (30, "worker_started"), (35, "first_step"), (1001, "suggested"), (1011, "ended")
        ),
    }
    assert spent(run, trials, now=1012) == Spent(elapsed_s=35 + 12, gpu_s=(13 + 25) * 2 * 0.5 + 10 * 4)
    assert spent([], {}, now=1012) == Spent(0, 0)


def test_a_driver_that_still_runs_counts_up_to_now() -> None:
    trials = {"001": events(*WHOLE), "002": events((10, "suggested"))}
    usage = measure(driver(10, None, at_once=3), trials, {"001": Work(20.0, 0.0)}, now=50, is_all_suggested=False)
    assert shares(usage) == {"starting": 4 + 40, "loading": 5, "training": 20, "reporting": 11, "waiting": 40}


def test_a_resume_may_have_other_slots() -> None:
    trial = events((0, "suggested"), (10, "ended"))
    usage = measure(driver(0, 10) + driver(100, 110, at_once=4), {"001": trial}, {}, now=0)
    assert shares(usage) == {"starting": 10, "idle": 40}


def test_notices_and_events_of_no_period_change_nothing() -> None:
    trial = events((-5, "suggested"), (0, "suggested"), (3, "notice"), (4, "ended"), (99, "suggested"))
    assert shares(measure(driver(0, 4), {"001": trial}, {}, now=0)) == {"starting": 4}


def test_a_run_that_noted_nothing_has_no_figures() -> None:
    assert measure([], {}, {}, now=10) is None
    assert measure(driver(10, None), {}, {}, now=10) is None


def test_the_last_sign_of_life_is_the_newest_row_or_event(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mix", experiment(), started=["001", "002"])
    assert last_sign(folder) == 0
    os.utime(write_rows(folder, "001", [{"step": 1}]), (500.0, 500.0))
    folder.trial_events_file("002").write_text("")
    os.utime(folder.trial_events_file("002"), (700.0, 700.0))
    assert last_sign(folder) == 700
