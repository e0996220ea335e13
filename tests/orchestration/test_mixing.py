"""What a sweep mixes at its end: of whom, by which weights, and not twice."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from rltune.orchestration.mixing import STRENGTHS, mixable, wanted_mixtures, wanted_points
from rltune.records import to_record
from rltune.runs.fronts import read_front
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.store import append_line
from tests.run_folders import SEARCHED, VALUES, experiment, result, write_run
from tests.runs.test_mixtures import CONFIRMATIONS, TRIALS

ASKED = experiment(sweep={"soup": True, "strengths": True})


def confirmed_run(path: Path) -> RunFolder:
    rows = [result(BASE_TRIAL, 0.4, 0.0), *(result(trial, *point) for trial, point in TRIALS.items())]
    folder = write_run(path, ASKED, rows)
    for row in CONFIRMATIONS:
        append_line(folder.confirmed_file, json.dumps(asdict(row)))
    return folder


def test_the_knee_and_the_best_are_mixed_two_at_a_time(tmp_path: Path) -> None:
    folder = confirmed_run(tmp_path / "mix")
    front = read_front(folder, ASKED)
    assert front is not None
    wanted = wanted_mixtures(*mixable(front, ASKED, lambda result: True), folder)
    assert {row.name: dict(row.weights) for row in wanted if row.is_soup} == {
        "soup-1": {"001": 0.75, "002": 0.25},  # the knee first
        "soup-2": {"001": 0.5, "002": 0.5},
        "soup-3": {"001": 0.25, "002": 0.75},
    }
    assert [row.name for row in wanted if not row.is_soup] == [f"{t}@{s:g}" for t in TRIALS for s in STRENGTHS]


def test_what_was_measured_before_is_not_measured_again(tmp_path: Path) -> None:
    folder = confirmed_run(tmp_path / "mix")
    front = read_front(folder, ASKED)
    assert front is not None
    parts = mixable(front, ASKED, lambda result: True)
    first, second, *_ = wanted_mixtures(*parts, folder)
    older = replace(second, prompts=("other prompts",))
    for row in (replace(first, prompts=CONFIRMATIONS[0].prompts), older):
        append_line(folder.mixtures_file, json.dumps(to_record(asdict(row))))
    again = wanted_mixtures(*parts, folder)
    assert [(row.name, dict(row.weights)) for row in again if row.is_soup] == [
        ("soup-3", {"001": 0.5, "002": 0.5}),  # a name is given once
        ("soup-4", {"001": 0.25, "002": 0.75}),
    ]


def test_who_does_not_mix_is_left_out(tmp_path: Path) -> None:
    folder = confirmed_run(tmp_path / "mix")
    front = read_front(folder, ASKED)
    assert front is not None
    assert mixable(front, experiment(), lambda result: True) == ([], [])
    assert mixable(replace(front, fresh=None), ASKED, lambda result: True) == ([], [])
    soup_of, at_strengths = mixable(front, ASKED, lambda result: result.trial != "001")
    assert [[row.trial for row in rows] for rows in (soup_of, at_strengths)] == [["002"], ["002"]]
    rows = tuple(
        replace(member, values={**VALUES, "model.lora.dora": member.trial == "001"}) for member in front.members
    )
    searched = experiment(
        sweep={"soup": True, "strengths": True},
        model={"lora": {"rank": {"choice": [2, 4, 8]}, "dora": {"choice": [False, True]}}},
    )
    with_dora = replace(front, members=rows, chosen=rows, knee=rows[0])
    soup_of, at_strengths = mixable(with_dora, searched, lambda result: True)
    assert [[row.trial for row in rows] for rows in (soup_of, at_strengths)] == [["002"], ["001", "002"]]


def test_the_points_of_a_basis_are_a_grid_without_its_own(tmp_path: Path) -> None:
    asked = experiment(model={**SEARCHED["model"], "adapter": {"kind": "basis"}})
    rows = [result(BASE_TRIAL, 0.4, 0.0), *(result(trial, *point) for trial, point in TRIALS.items())]
    folder = write_run(tmp_path / "slider", asked, rows)
    for row in CONFIRMATIONS:
        append_line(folder.confirmed_file, json.dumps(asdict(row)))
    front = read_front(folder, asked)
    assert front is not None
    wanted = wanted_points(front, asked, folder, lambda result: result.trial == "001")
    mixes = [(row.name, tuple(row.mix.values())) for row in wanted]
    assert mixes == [
        ("001@1,0", (1.0, 0.0)),
        ("001@0.75,0.25", (0.75, 0.25)),
        ("001@0.5,0.5", (0.5, 0.5)),  # and not a quarter, where the trial itself was measured
        ("001@0,1", (0.0, 1.0)),
    ]
    done = replace(wanted[1], num_prompts=4, prompts=CONFIRMATIONS[0].prompts)
    append_line(folder.mixtures_file, json.dumps(to_record(asdict(done))))
    assert wanted_points(front, asked, folder, lambda result: result.trial == "001") == [wanted[0], *wanted[2:]]
    assert wanted_points(front, ASKED, folder, lambda result: True) == []
    both = experiment(model={**SEARCHED["model"], "adapter": {"kind": {"choice": ["lora", "basis"]}}})
    kinds = {"001": "basis", "002": "lora"}
    members = tuple(
        replace(row, values={**row.values, "model.adapter.kind": kinds[row.trial]})
        for row in front.members
        if row.trial in kinds
    )
    of_both = wanted_points(replace(front, members=members), both, folder, lambda result: True)
    assert of_both == [wanted[0], *wanted[2:]]
