"""What a search learns from the trials of another run: which of them, in whose terms, and which run cannot."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rltune.config.load import Experiment
from rltune.errors import UserError
from rltune.runs.layout import RunFolder
from rltune.runs.results import TrialResult
from rltune.search.warm_start import keep_prior_results, read_prior_results
from tests.run_folders import SEARCHED, VALUES, experiment, result, write_run

BASE = result("000", 0.5, 0.0)


def values(**changes: Any) -> dict[str, Any]:
    names = {"rank": "model.lora.rank", "lr": "optim.lr"}
    return VALUES | {names[name]: value for name, value in changes.items()}


def params(**changes: Any) -> dict[str, Any]:
    """A quarter of two weights is a quarter of the unit interval: the first of two is uniform."""
    found = values(**changes) | {"simplex[0]": 0.25}
    return {name: value for name, value in found.items() if not name.endswith(".weight")}


def starting_from(path: Path, **sections: Any) -> Experiment:
    search = {"trials": 4, "sampler": "tpe", "warm_start": str(path)}
    return experiment(SEARCHED, **{"search": search, **sections})


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A run with two trials that ended well, one of them early, one that failed, and one that is not finished."""
    rows = [
        BASE,
        result("001", 0.75, 0.25),
        replace(result("002", 0.6, 0.125, values=values(rank=8, lr=2e-3)), state="stopped", reason="fell behind"),
        result("003", reason="it died", values=values(rank=2)),
    ]
    write_run(tmp_path / "other", experiment(), rows, started=["004"])
    return tmp_path / "other"


def test_ended_trials_of_the_other_run_are_taken_as_they_are(other: Path, tmp_path: Path) -> None:
    prior_results = read_prior_results(starting_from(other), RunFolder(tmp_path / "new"))
    assert [(result.trial, result.state) for result in prior_results] == [
        ("other/001", "ok"),
        ("other/002", "stopped"),
        ("other/003", "failed"),
    ]
    assert [result.params for result in prior_results] == [params(), params(rank=8, lr=2e-3), params(rank=2)]
    assert [result.metrics.get("eval/brightness") for result in prior_results] == [0.75, 0.6, None]
    assert read_prior_results(experiment(), RunFolder(tmp_path / "new")) == []


def test_weights_are_those_of_the_rewards_in_whatever_order(other: Path, tmp_path: Path) -> None:
    rewards = dict(reversed(SEARCHED["rewards"].items()))
    result = read_prior_results(starting_from(other, rewards=rewards), RunFolder(tmp_path / "new"))[0]
    assert result.params["simplex[0]"] == 0.75


def test_constraints_are_this_experiments(other: Path, tmp_path: Path) -> None:
    constraints = {"drift": {"max": 0.2}, "brightness": {"min_ratio_to_base": 1.25}}
    prior_results = read_prior_results(starting_from(other, constraints=constraints), RunFolder(tmp_path / "new"))
    assert prior_results[0].constraints == pytest.approx({"drift.max": 0.05, "brightness.min_ratio_to_base": -0.125})
    assert prior_results[1].constraints == pytest.approx({"drift.max": -0.075, "brightness.min_ratio_to_base": 0.025})
    assert prior_results[2].constraints == {}


def test_shares_of_images_are_over_the_same_objectives_or_refused(other: Path, tmp_path: Path) -> None:
    asked = starting_from(other, constraints={"collapse": {"max": 0.2}})
    what = r"has no collapse over brightness, which the search goes by, got '.*'; name a run with these objectives"
    with pytest.raises(UserError, match=what):  # a run of before measured none
        read_prior_results(asked, RunFolder(tmp_path / "new"))
    file = RunFolder(other).results_file
    file.write_text(file.read_text().replace('"metrics": {"step"', '"metrics": {"eval/collapse": 0.3, "step"'))
    found = read_prior_results(asked, RunFolder(tmp_path / "new"))
    assert found[0].constraints == {"collapse.max": pytest.approx(0.1)}
    more = starting_from(other, constraints={"collapse": {"max": 0.2}}, objectives=["brightness", "smoothness"])
    with pytest.raises(UserError, match="has no collapse over brightness, smoothness"):
        read_prior_results(more, RunFolder(tmp_path / "new"))


def test_objectives_may_be_others_that_were_measured(other: Path, tmp_path: Path) -> None:
    assert len(read_prior_results(starting_from(other, objectives=["drift"]), RunFolder(tmp_path / "new"))) == 3


def test_what_lies_outside_of_the_ranges_is_left_out_and_counted(
    other: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prior_results = read_prior_results(
        starting_from(other, optim={"lr": {"log_float": [1e-4, 1.5e-3]}, "steps": 10, "batch": 4}),
        RunFolder(tmp_path / "new"),
    )
    assert [result.trial for result in prior_results] == ["other/001", "other/003"]
    assert f"1 of the 3 trials of {other} lie outside of what is searched now" in caplog.text


def test_a_condition_that_the_other_run_did_not_have_leaves_out_what_breaks_it(other: Path, tmp_path: Path) -> None:
    optim = {"lr": {"log_float": [1e-4, 1e-2], "when": {"model.lora.rank": [4, 8]}}, "steps": 10, "batch": 4}
    prior_results = read_prior_results(starting_from(other, optim=optim), RunFolder(tmp_path / "new"))
    assert [result.trial for result in prior_results] == ["other/001", "other/002"]


def test_a_setting_that_a_trial_had_no_use_for_keeps_what_was_drawn_for_it(tmp_path: Path) -> None:
    sections = {"optim": {"lr": {"log_float": [1e-4, 1e-2], "when": {"model.lora.rank": 4}}, "steps": 10, "batch": 4}}
    idle = values(rank=8)
    del idle["optim.lr"]
    rows = [BASE, result("001", 0.7, values=idle, params=params(rank=8, lr=5e-4)), result("002", 0.7, values=idle)]
    write_run(tmp_path / "other", experiment(SEARCHED, **sections), rows)
    prior_results = read_prior_results(starting_from(tmp_path / "other", **sections), RunFolder(tmp_path / "new"))
    assert [result.values for result in prior_results] == [idle, idle]
    assert prior_results[0].params == params(rank=8, lr=5e-4)
    assert prior_results[1].params == pytest.approx(params(rank=8, lr=1e-3))  # none is known: the middle of its range


def test_a_resumed_run_learns_the_same_though_the_other_has_gone(other: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    folder.path.mkdir()
    prior_results = read_prior_results(starting_from(other), folder)
    keep_prior_results(starting_from(other), folder, prior_results)
    other.rename(tmp_path / "gone")
    assert read_prior_results(starting_from(other), folder) == prior_results
    keep_prior_results(starting_from(other), folder, [])  # what is there stays
    assert read_prior_results(starting_from(other), folder) == prior_results
    keep_prior_results(experiment(), RunFolder(tmp_path / "none"), [])  # nothing is asked for, so nothing is written
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("rows", "num"), [([BASE], 0), ([BASE, result("001", reason="it died")], 1), ([result("001", 0.7)], 0)]
)
def test_a_run_without_a_trial_to_learn_from_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: list[TrialResult], num: int
) -> None:
    write_run(tmp_path / "other", experiment(), rows)
    assert len(read_prior_results(starting_from(tmp_path / "other"), RunFolder(tmp_path / "new"))) == num
    assert "can be used; the search starts without any" in caplog.text


def test_trials_that_were_trained_otherwise_are_taken_and_it_is_said(
    other: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read_prior_results(starting_from(other), RunFolder(tmp_path / "new"))
        assert not caplog.text
        optim = {"lr": {"log_float": [1e-4, 1e-2]}, "steps": 20, "batch": 4}
        read_prior_results(starting_from(other, optim=optim, resources={"workers": 2}), RunFolder(tmp_path / "new"))
    assert "were trained with other settings: optim.steps 10 there and 20 here\n" in caplog.text


def refused(asked: Experiment, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_prior_results(asked, RunFolder(folder))
    return str(caught.value)


def test_what_cannot_be_started_from_is_refused(other: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert refused(starting_from(tmp_path / "nope"), new).startswith(
        "search.warm_start: not a run folder, it has no experiment"
    )
    assert refused(starting_from(other), other).startswith("search.warm_start: a run cannot start from itself")
    message = refused(
        starting_from(other, optim={"lr": 1e-3, "ema": {"float": [0, 0.5]}, "steps": 10, "batch": 4}), new
    )
    assert message.endswith("got only here: optim.ema; only there: optim.lr; search the same, or delete it")
    message = refused(starting_from(other, sampler={"guidance": 3.0}, evaluate={"every": 9, "prompts": 8}), new)
    assert "measured otherwise" in message
    assert "sampler.guidance 5.0 there and 3.0 here; evaluate.prompts 16 there and 8 here;" in message
    message = refused(starting_from(other, model={"base": "sd", "lora": {"rank": {"choice": [2, 4, 8]}}}), new)
    assert "got model 'builtin' there and 'sd' here;" in message
    rewards = {**SEARCHED["rewards"], "brightness": {"weight": {"simplex": True}, "negate": True}}
    assert "rewards.brightness.negate false there and true here" in refused(starting_from(other, rewards=rewards), new)


def test_what_is_kept_is_lines_as_in_the_results(other: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    folder.path.mkdir()
    keep_prior_results(starting_from(other), folder, read_prior_results(starting_from(other), folder))
    lines = (tmp_path / "new" / "warm_start.jsonl").read_text().splitlines()
    assert [json.loads(line)["trial"] for line in lines] == ["other/001", "other/002", "other/003"]
