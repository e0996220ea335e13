"""How a trial's end is judged: a function of what is left of it."""

from pathlib import Path
from typing import Any

import pytest

from rltune.orchestration.outcome import Ending, HandedOn, judge, kept_metrics
from rltune.runs.layout import BASE_TRIAL, TrialSpec
from rltune.runs.objectives import Objectives
from rltune.runs.results import TrialResult
from tests.run_folders import experiment

CONFIG = experiment(constraints={"drift": {"max": 0.2}}).shared
BOTH = Objectives(("brightness", "drift"))
LAST = {"eval/brightness": 0.8, "eval/drift": 0.1, "step": 10.0, "images_seen": 40.0, "is_final": 1.0, "pid": 7}
BASE = {"eval/brightness": 0.5, "eval/drift": 0.0}


def judged(
    last: dict[str, Any], *, trial: str = "001", failure: str = "", stopped: str = "", found: HandedOn | None = None
) -> TrialResult | None:
    spec = TrialSpec(trial, {"optim.lr": 1e-3}, {"lr": 1e-3})
    ending = Ending(spec, last, failure, stopped, duration_s=1.23456, checkpoints=Path("/runs/mix/trials/001"))

    def find(metrics: Any) -> HandedOn | None:
        assert trial != BASE_TRIAL, "the base model has no checkpoint to look for"
        assert not failure, "a failed trial hands nothing on"
        return found

    return judge(ending, CONFIG, BOTH, BASE, find)


def test_a_trial_that_came_to_its_end_is_what_its_checkpoint_says() -> None:
    row = judged(LAST, found=("trials/001/c", {"eval/brightness": 0.7, "eval/drift": 0.3, "step": 5.0}))
    assert row is not None
    assert (row.state, row.reason, row.checkpoint, row.duration_s) == ("ok", "", "trials/001/c", 1.235)
    assert row.metrics == {"eval/brightness": 0.7, "eval/drift": 0.3, "step": 5.0}
    assert row.constraints == {"drift.max": pytest.approx(0.1)}
    assert (row.values, row.params) == ({"optim.lr": 1e-3}, {"lr": 1e-3})
    assert not row.is_feasible


def test_one_that_neither_ended_nor_failed_was_interrupted() -> None:
    assert judged({**LAST, "is_final": 0.0}) is None
    assert judged({}) is None


def test_one_that_was_stopped_is_a_result_with_its_reason() -> None:
    row = judged({**LAST, "is_final": 0.0}, stopped="diverged: so", found=("c", dict(kept_metrics(LAST))))
    assert row is not None
    assert (row.state, row.reason, row.checkpoint) == ("stopped", "diverged: so", "c")


@pytest.mark.parametrize(
    ("last", "how", "reason"),
    [
        (LAST, {"failure": "step 3: nan"}, "step 3: nan"),
        (LAST, {"failure": "step 3: nan", "stopped": "out of time"}, "step 3: nan"),  # a failure is the stronger word
        (LAST, {}, "no whole checkpoint of an evaluation is left in /runs/mix/trials/001"),
        (LAST, {"found": ("c", {"eval/brightness": 0.7})}, "an objective is missing or a metric is not finite"),
        (LAST, {"found": ("c", {**BASE, "step": float("nan")})}, "an objective is missing or a metric is not finite"),
    ],
)
def test_a_failed_one_keeps_its_settings_and_no_numbers(last: dict[str, Any], how: Any, reason: str) -> None:
    row = judged(last, **how)
    assert row is not None
    assert row.state == "failed"
    assert row.reason.startswith(reason)
    assert (row.metrics, row.constraints, row.checkpoint) == ({}, {}, "")
    assert row.values == {"optim.lr": 1e-3}


def test_the_base_model_is_what_it_reported() -> None:
    row = judged(LAST, trial=BASE_TRIAL)
    assert row is not None
    assert (row.state, row.checkpoint) == ("ok", "")
    assert row.metrics == {"eval/brightness": 0.8, "eval/drift": 0.1, "step": 10.0, "images_seen": 40.0}
