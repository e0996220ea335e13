"""Conditions on trials: what they may name, what they mean, and what is answered to those that mean nothing."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rltune.cli.main import app
from rltune.errors import UserError
from rltune.runs.filters import keep, parse_condition
from rltune.runs.fronts import read_front
from rltune.runs.layout import BASE_TRIAL, RunFolder
from tests.run_folders import VALUES, experiment, result, write_run

BASE = result(BASE_TRIAL, 0.5, 0.0)
LOW = replace(result("001", 0.6, 0.05), values={**VALUES, "model.lora.rank": 2, "model.lora.targets": "all"})
HIGH = replace(result("002", 0.8, 0.3), values={**VALUES, "model.lora.rank": 8, "model.lora.targets": "attention"})
RESULTS = [BASE, LOW, HIGH]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("brightness > 0.6", ["002"]),
        ("brightness>=0.6", ["001", "002"]),
        ("brightness < 8e-1", ["001"]),
        ("  drift <= .05 ", ["001"]),
        ("gain/brightness > 0.2", ["002"]),
        ("rank == 8", ["002"]),
        ("rank = 8", ["002"]),
        ("rank != 8", ["001"]),
        ("model.lora.rank < 8", ["001"]),
        ("targets == all", ["001"]),
        ("targets != all", ["002"]),
        ("drift > 1", []),
    ],
)
def test_a_condition_keeps_the_trials_that_meet_it_and_the_base_model(text: str, kept: list[str]) -> None:
    found = keep(RESULTS, [parse_condition(text, RESULTS)])
    assert [row.trial for row in found] == [BASE_TRIAL, *kept]


def test_all_conditions_must_hold() -> None:
    conditions = [parse_condition(text, RESULTS) for text in ("brightness > 0.5", "rank < 4")]
    assert [row.trial for row in keep(RESULTS, conditions)] == [BASE_TRIAL, "001"]


def test_a_trial_without_the_setting_does_not_meet_a_condition_on_it() -> None:
    bare = replace(HIGH, trial="003", values={})
    for text in ("rank > 0", "rank != 2", "targets != all"):
        assert "003" not in [row.trial for row in keep([*RESULTS, bare], [parse_condition(text, RESULTS)])], text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("diverse", r"--where: must be a name, a comparison and a value, got 'diverse'; write 'diversity > 0.8'"),
        ("brightnes > 1", r"no trial has 'brightnes'; did you mean 'brightness'\? known: "),
        ("brightness > high", r"brightness is a number, got 'brightness > high'; write 'brightness > 0.5'"),
        ("targets > all", r"targets is a word, got 'targets > all'; write 'targets == "),
        ("targets == 3", r"targets is a word, got 'targets == 3'"),
    ],
)
def test_a_condition_that_means_nothing_is_answered_in_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_condition(text, RESULTS)


# ---- the front of what is left


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return write_run(tmp_path / "mix", experiment(), RESULTS)


def trials(folder: RunFolder, **asked: list[str]) -> list[str]:
    front = read_front(folder, experiment(), **asked)
    assert front is not None
    return [member.trial for member in front.members]


def test_a_front_is_of_the_trials_that_are_left(folder: RunFolder) -> None:
    assert trials(folder) == ["002", "001", "000"]  # more brightness costs drift
    assert trials(folder, where=["drift < 0.1"]) == ["001", "000"]


def test_a_front_is_over_the_objectives_asked_for(folder: RunFolder) -> None:
    assert trials(folder, objectives=["brightness"]) == ["002"]
    assert trials(folder, objectives=["drift", "brightness"]) == ["000", "001", "002"]


@pytest.mark.parametrize(
    ("names", "said"),
    [(["drift", "beauty"], "--objectives: 'beauty' was not measured; known: "), (["drift"] * 2, "'drift' is named tw")],
)
def test_objectives_that_were_not_measured_are_said(folder: RunFolder, names: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_front(folder, experiment(), objectives=names)


def test_the_command_prints_what_programs_read(folder: RunFolder) -> None:
    run = str(folder.path)

    def printed(*flags: str) -> str:
        done = CliRunner().invoke(app, ["front", run, *flags])
        assert done.exit_code == 0, done.output
        return done.stdout

    front = json.loads(printed("--json", "--where", "rank > 2"))
    assert [member["trial"] for member in front["members"]] == ["002", "000"]
    assert front["members"][0]["values"]["model.lora.rank"] == 8
    rows = list(csv.DictReader(printed("--csv", "--objectives", "brightness, drift").splitlines()))
    assert [(row["trial"], row["model.lora.targets"]) for row in rows] == [
        ("002", "attention"),
        ("001", "all"),
        ("000", ""),
    ]
    assert "Of the trials with rank > 2, drift < 1 in the search." in " ".join(
        printed("--where", "rank > 2", "--where", "drift < 1").split()
    )
    assert "got both" in str(CliRunner().invoke(app, ["front", run, "--json", "--csv"]).exception)
