"""Runs side by side: by hand, against what the front of each says, and what is refused."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rltune.errors import UserError
from rltune.pareto.fresh import volume_by_prompt
from rltune.records import to_record
from rltune.runs.compare import compare_runs, comparison_as_dict
from rltune.runs.confirmations import Confirmation
from rltune.runs.fronts import read_front
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.record import read_run
from rltune.runs.store import append_line
from tests.run_folders import experiment, result, write_run

PROMPTS = tuple(f"prompt {i}" for i in range(4))
BASE_P = np.array([0.1, 0.7, 0.4, 0.4])
"""Brightness; its drift is 0."""


def measure_again(
    folder: RunFolder, trial: str, gains_P: Sequence[float], drifts_P: Sequence[float], prompts: Sequence[str] = PROMPTS
) -> None:
    values = {"brightness": (BASE_P[: len(prompts)] + gains_P).tolist(), "drift": list(drifts_P)}
    metrics = result(trial, float(np.mean(values["brightness"])), float(np.mean(drifts_P))).metrics
    row = Confirmation(trial, "", len(prompts), metrics, values=values, prompts=prompts)
    append_line(folder.confirmed_file, json.dumps(to_record(asdict(row))))


def a_run(path: Path, gain: float, drift: float = 0.02, *, is_fresh: bool = True, **sections: Any) -> Path:
    """A run with a trial that gains 0.3 in the search, and ``gain`` on fresh prompts; one prompt more than another."""
    rows = [result(BASE_TRIAL, 0.5, 0.0), result("001", 0.8, 0.05)]
    spread = sections.pop("spread", None)
    folder = write_run(path, experiment(**sections), rows, spread=spread)
    if is_fresh:
        measure_again(folder, BASE_TRIAL, [0.0] * 4, [0.0] * 4)
        jitter = np.array([0.05, -0.05, 0.02, -0.02])
        measure_again(folder, "001", (gain + jitter).tolist(), (drift + jitter / 10).tolist())
    return path


@pytest.mark.slow
def test_runs_that_differ_in_seeds_alone_are_one_group(tmp_path: Path) -> None:
    paths = [
        a_run(tmp_path / "first", 0.3, seed=0),
        a_run(tmp_path / "more", 0.2, optim={"lr": 1e-3, "steps": 20, "batch": 4}),
        a_run(tmp_path / "again", 0.4, seed=1, search={"trials": 4, "sampler": "random", "seed": 7}, name="again"),
    ]
    found = compare_runs(paths)
    assert [[entry.path.name for entry in group.entries] for group in found.groups] == [["first", "again"], ["more"]]
    assert [entry.seeds for entry in found.groups[0].entries] == [
        {"seed": 0, "search.seed": 0},
        {"seed": 1, "search.seed": 7},
    ]
    assert found.differing["optim.steps"] == [10, 20]
    assert set(found.differing) == {"optim.steps", "optim.lr", "optim.lr.log_float"}
    assert (found.num_prompts, found.is_fresh, found.objectives) == (4, True, ("brightness", "drift"))


def test_a_hypervolume_is_that_of_the_front_and_differences_are_paired_by_prompt(tmp_path: Path) -> None:
    paths = [a_run(tmp_path / "a", 0.3), a_run(tmp_path / "b", 0.2, optim={"lr": 1e-3})]
    found = compare_runs(paths)
    for path, group in zip(paths, found.groups, strict=True):
        front = read_front(*read_run(path))
        assert front is not None
        assert front.fresh is not None
        assert group.hypervolume == pytest.approx((front.hypervolume, front.fresh.half_width), rel=1e-9)
    # prompts add the same to both: of the difference in brightness, 0.1 / 0.1, no error is left but a product's
    value, half = found.pairs[0].difference
    assert value == pytest.approx(1 * (1 - 0.2) - 0, abs=0.05)
    assert half is not None
    assert half < 0.1 < found.groups[0].hypervolume[1]  # type: ignore[operator]


@pytest.mark.slow
def test_members_that_the_other_has_a_better_one_of(tmp_path: Path) -> None:
    better, worse = a_run(tmp_path / "a", 0.3), a_run(tmp_path / "b", 0.2, 0.03, optim={"lr": 1e-3})
    assert compare_runs([better, worse]).pairs[0].dominated == (0.0, 1.0)
    assert compare_runs([worse, better]).pairs[0].dominated == (1.0, 0.0)
    other = a_run(tmp_path / "c", 0.4, 0.05, optim={"lr": 1e-3})
    assert compare_runs([better, other]).pairs[0].dominated == (0.0, 0.0)
    twin = a_run(tmp_path / "d", 0.3, optim={"lr": 1e-3})
    assert compare_runs([better, twin]).pairs[0].dominated == (0.0, 0.0)  # as good is not better
    nothing = write_run(tmp_path / "e", experiment(optim={"lr": 1e-3}), [result(BASE_TRIAL, 0.5, 0.0)])
    measure_again(nothing, BASE_TRIAL, [0.0] * 4, [0.0] * 4)
    found = compare_runs([better, nothing.path])
    assert found.pairs[0].dominated == (0.0, None)
    assert found.groups[1].hypervolume == pytest.approx((1.0, 0.0))


def test_what_seeds_attain_is_between_their_fronts(tmp_path: Path) -> None:
    found = compare_runs([a_run(tmp_path / "a", 0.3, 0.06), a_run(tmp_path / "b", 0.1, 0.02, seed=1)])
    # in units above the reference, the base model at (1, 1): (4, 0.4) and (2, 0.8)
    once, twice = found.groups[0].attained
    assert once == pytest.approx(4 * 0.4 + 2 * (0.8 - 0.4) + 1 * 0.2)
    assert twice == pytest.approx(2 * 0.4 + 1 * (1 - 0.4))
    content = json.loads(json.dumps(comparison_as_dict(found)))
    assert content["groups"][0]["attained"][1] == {
        "by": 2,
        "hypervolume": pytest.approx(twice),
        "surface": [[1.0, 1.0], [pytest.approx(2.0), pytest.approx(0.4)]],
    }
    assert content["groups"][0]["runs"][0]["members"] == {"001": [pytest.approx(4.0), pytest.approx(0.4)]}
    assert content["pairs"] == []


def test_units_are_the_first_runs(tmp_path: Path) -> None:
    paths = [a_run(tmp_path / "a", 0.3), a_run(tmp_path / "b", 0.3, seed=1, spread={"brightness": 0.2, "drift": 0.4})]
    ours, theirs = compare_runs(paths).groups[0].entries
    assert theirs.points_ND == pytest.approx(ours.points_ND)
    gains_PND = np.stack([theirs.volumes_P, ours.volumes_P])
    assert gains_PND[0] == pytest.approx(gains_PND[1])
    halved = compare_runs(paths[::-1]).groups[0].entries[1]
    assert halved.points_ND == pytest.approx(1 + (ours.points_ND - 1) * [0.5, 0.25])


def test_where_one_was_not_measured_again_all_go_by_the_search(tmp_path: Path) -> None:
    paths = [a_run(tmp_path / "a", 0.1), a_run(tmp_path / "b", 0.1, is_fresh=False, optim={"lr": 1e-3})]
    found = compare_runs(paths)
    assert not found.is_fresh
    # 001 at (4, 0.5), the base model at (1, 1)
    assert [group.hypervolume for group in found.groups] == [(pytest.approx(4 * 0.5 + 1 * 0.5), None)] * 2
    assert found.pairs[0].difference == (0.0, None)


def altered(path: Path, **base_settings: Any) -> Path:
    file = path / "resolved.json"
    record = json.loads(file.read_text())
    for name, value in base_settings.items():
        record["base_settings"][name] = value
    file.write_text(json.dumps(record))
    return path


@pytest.mark.slow
def test_what_was_measured_otherwise_is_refused_in_one_message(tmp_path: Path) -> None:
    first = a_run(tmp_path / "a", 0.3)
    changed = altered(a_run(tmp_path / "b", 0.3), model="another", sampler={"steps": 4})
    with pytest.raises(UserError) as caught:
        compare_runs([first, changed])
    text = str(caught.value)
    assert text.startswith(
        f"{changed}: does not compare with {first}: base model: another; sampler.steps: 4 and not 20"
    )
    other = a_run(tmp_path / "c", 0.3, objectives=["smoothness", "drift"], spread={"smoothness": 0.1, "drift": 0.1})
    results = other / "results.jsonl"
    results.write_text(results.read_text().replace("brightness", "smoothness"))
    with pytest.raises(UserError, match="its objectives are smoothness, drift and not brightness, drift"):
        compare_runs([first, other])
    fresh = a_run(tmp_path / "d", 0.3, seed=3)
    measure_again(RunFolder(fresh), BASE_TRIAL, [0.0] * 2, [0.0] * 2, PROMPTS[:2])
    assert not compare_runs([first, fresh]).is_fresh  # its member was not measured on these
    measure_again(RunFolder(fresh), "001", [0.1] * 2, [0.0] * 2, PROMPTS[:2])
    with pytest.raises(UserError, match="fresh prompts: 2, others than its 4"):
        compare_runs([first, fresh])
    assert compare_runs([first, a_run(tmp_path / "f", 0.3, seed=2)], objectives=["drift"]).objectives == ("drift",)


def test_a_comparison_needs_two_runs_that_have_something(tmp_path: Path) -> None:
    run = a_run(tmp_path / "a", 0.3)
    for paths in ([], [run], [run, run]):
        with pytest.raises(UserError, match="must be two different runs or more, got"):
            compare_runs(paths)
    with pytest.raises(UserError, match="the base model has no result yet"):
        compare_runs([run, write_run(tmp_path / "b", experiment(seed=1)).path])
    old = a_run(tmp_path / "c", 0.3, seed=1)
    (old / "resolved.json").unlink()
    with pytest.raises(UserError, match="an older rltune started it"):
        compare_runs([run, old])


def test_objectives_in_another_order_are_the_same(tmp_path: Path) -> None:
    paths = [a_run(tmp_path / "a", 0.3), a_run(tmp_path / "b", 0.3, objectives=["drift", "brightness"])]
    ours, theirs = (group.entries[0] for group in compare_runs(paths).groups)
    assert theirs.points_ND == pytest.approx(ours.points_ND)


def test_of_no_member_that_counts_the_volume_is_none() -> None:
    assert volume_by_prompt(np.zeros((0, 2)), np.zeros((4, 0, 2))).tolist() == [0.0] * 4
