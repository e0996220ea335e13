"""What a front is by fresh measurements made by hand: who is picked, who is marked, how much it covers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rltune.pareto.fresh import fresh_volume
from rltune.runs.confirmations import (
    Confirmation,
    comparable,
    confirmed_front,
    measured,
    missing,
    read_confirmations,
)
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.objectives import Front, Objectives, find_front
from rltune.runs.results import TrialResult
from rltune.runs.store import append_line
from tests.run_folders import experiment, result

UNITS = {"brightness": 0.1, "drift": 0.1}
PROMPTS = tuple(f"prompt {i}" for i in range(4))


def chosen(*members: TrialResult) -> Front:
    """The front of the search: brightness up, drift down."""
    front = find_front([result(BASE_TRIAL, 0.5, 0.0), *members], Objectives(("brightness", "drift")), UNITS)
    assert front is not None
    return front


def fresh(
    trial: str, brightness: float, drift: float, checkpoint: str = "", prompts: Sequence[str] = ()
) -> Confirmation:
    return Confirmation(trial, checkpoint, 8, result(trial, brightness, drift).metrics, prompts=prompts)


def per_prompt(trial: str, brightness_P: Sequence[float], drift_P: Sequence[float], reused: int = 0) -> Confirmation:
    metrics = result(trial, float(np.mean(brightness_P)), float(np.mean(drift_P))).metrics
    values = {"brightness": list(brightness_P), "drift": list(drift_P)}
    return Confirmation(trial, "", 4, metrics, values=values, prompts=PROMPTS, num_reused=reused)


def confirmed(front: Front, rows: Sequence[Confirmation], **sections: object) -> Front:
    found = confirmed_front(front, experiment(**sections), rows)
    assert found is not None
    return found


def names(front: Front) -> list[str]:
    return [member.trial for member in front.members]


def test_who_is_picked_is_decided_by_the_search_and_reported_by_the_fresh_numbers() -> None:
    members = [result("001", 1.0, 0.5), result("002", 0.9, 0.1), result("003", 0.6, 0.05)]
    front = chosen(*members)
    assert (names(front), front.knee) == (["001", "002", "003", "000"], members[1])
    rows = [fresh(BASE_TRIAL, 0.4, 0.0), fresh("001", 0.7, 0.12), fresh("002", 0.58, 0.2), fresh("003", 0.75, 0.1)]
    found = confirmed(front, rows)
    assert names(found) == names(front)  # by the fresh numbers 003 would lead, and alone be left beside the base
    assert found.knee is found.members[1]
    assert found.knee.metrics["eval/brightness"] == 0.58
    assert [found.best(name).trial for name in ("brightness", "drift")] == ["001", "003"]
    assert found.best("brightness").metrics["eval/brightness"] == 0.7
    assert [member.metrics["eval/brightness"] for member in found.chosen] == [1.0, 0.9, 0.6, 0.5]
    assert found.not_held == {
        "001": "003 is at least as good in every objective",
        "002": "001 is at least as good in every objective",
    }
    assert found.num_prompts == 8


def test_the_unit_is_that_of_before_and_the_reference_follows_the_base_model_to_the_fresh_prompts() -> None:
    found = confirmed(chosen(result("001", 0.7, 0.05)), [fresh(BASE_TRIAL, 0.4, 0.0), fresh("001", 0.7, 0.02)])
    assert found.unit_D.tolist() == [0.1, 0.1]
    assert found.reference_D == pytest.approx([0.4 - 0.1, 0.0 + 0.1])
    # in units above it: the base at (1, 1), trial 001 at 1 + 0.3 / 0.1 = 4 and 1 - 0.02 / 0.1 = 0.8
    assert found.hypervolume == pytest.approx(4 * 0.8 + 1 * 0.2)
    assert found.fresh is not None
    assert (found.fresh.half_width, found.fresh.half_width_without_effect) == (None, None)  # means alone were kept


def test_the_hypervolume_and_its_interval_are_of_the_gains_on_single_prompts() -> None:
    base = per_prompt(BASE_TRIAL, [0.1, 0.7, 0.4, 0.4], [0.0] * 4)
    row = per_prompt("001", [0.3, 0.8, 0.6, 0.5], [0.01, 0.03, 0.02, 0.02])
    found = confirmed(chosen(result("001", 0.7, 0.05)), [base, row])
    gains_PND = np.zeros((4, 2, 2))
    gains_PND[:, 0] = np.array([[0.2, -0.01], [0.1, -0.03], [0.2, -0.02], [0.1, -0.02]]) / 0.1
    expected = fresh_volume(np.array([[1 + 2.0, 1 - 0.5], [1.0, 1.0]]), gains_PND)
    assert found.hypervolume == pytest.approx(expected.value, rel=1e-9)
    assert found.fresh is not None
    assert found.fresh.half_width == pytest.approx(expected.half_width, rel=1e-9)
    assert found.fresh.half_width_without_effect == pytest.approx(expected.half_width_without_effect, rel=1e-9)


def test_how_probable_a_place_is_goes_by_those_that_count_and_the_base_model() -> None:
    front = chosen(result("001", 0.9, 0.1), result("002", 0.7, 0.05), result("003", 0.6, 0.04))
    jitter = [0.01, -0.01, 0.01, -0.01]
    rows = [
        per_prompt(BASE_TRIAL, [0.1, 0.7, 0.4, 0.4], [0.0] * 4),
        per_prompt("001", [0.6, 1.2, 0.9, 0.9], [0.5] * 4),  # breaks the constraint
        per_prompt("002", [0.6, 1.2, 0.9, 0.9], [0.1 + x for x in jitter]),
        per_prompt("003", [0.0, 0.6, 0.3, 0.3], [0.1 + x for x in jitter]),  # worse than 002, and than the base model
    ]
    bound = {"constraints": {"drift": {"max": 0.3}}}
    found = confirmed(front, rows, **bound).fresh
    assert found is not None
    assert found.non_dominated == {"002": 1.0, "003": 0.0, BASE_TRIAL: 1.0}
    assert found.search_hypervolume == front.hypervolume
    alone = replace(front, members=front.members[2:3], chosen=front.chosen[2:3])
    beaten = confirmed(alone, rows, **bound).fresh  # the search had no base model on the front
    assert beaten is not None
    assert beaten.non_dominated == {"003": 0.0}
    means = confirmed(chosen(result("001", 0.7, 0.05)), [fresh(BASE_TRIAL, 0.4, 0.0), fresh("001", 0.7, 0.02)])
    assert means.fresh is not None
    assert means.fresh.non_dominated == {}  # of before: errors are not known


def test_a_member_that_breaks_a_constraint_on_fresh_prompts_is_neither_picked_nor_counted() -> None:
    bound = {"constraints": {"drift": {"max": 0.15}}}
    front = chosen(result("001", 0.7, 0.1), result("002", 0.9, 0.12))
    assert front.best("brightness").trial == "002"
    rows = [fresh(BASE_TRIAL, 0.5, 0.0), fresh("001", 0.7, 0.08), fresh("002", 0.9, 0.2)]
    found = confirmed(front, rows, **bound)
    assert names(found) == ["002", "001", "000"]
    assert found.not_held == {"002": "breaks drift.max by 0.05"}
    assert found.knee is not None
    assert (found.knee.trial, found.best("brightness").trial) == ("001", "001")
    assert found.hypervolume == pytest.approx(1.0)  # the base's: the search has 001 at the reference in drift
    assert confirmed(front, [*rows, fresh("001", 0.7, 0.3)], **bound).knee is None


def left(front: Front, rows: Sequence[Confirmation]) -> list[str]:
    return [member.trial for member in missing(front.members, comparable(rows))]


def test_a_front_is_confirmed_only_as_a_whole_and_by_its_own_checkpoints() -> None:
    front = chosen(result("001", 0.7, 0.1, checkpoint="a"), result("002", 0.9, 0.2, checkpoint="b"))
    rows = [fresh(BASE_TRIAL, 0.5, 0.0), fresh("001", 0.7, 0.1, "a")]
    assert confirmed_front(front, experiment(), rows) is None
    assert left(front, rows) == ["002"]
    rows.append(fresh("002", 0.9, 0.2, "an older one"))
    assert confirmed_front(front, experiment(), rows) is None
    assert left(front, rows) == ["002"]
    rows.append(fresh("002", 0.9, 0.2, "b"))
    assert confirmed_front(front, experiment(), rows) is not None
    assert left(front, rows) == []
    assert confirmed_front(front, experiment(), rows[1:]) is None  # without the base model there is no reference
    assert left(front, rows[1:]) == ["002", "001"]


def test_measurements_on_other_prompts_do_not_mix() -> None:
    front = chosen(result("001", 0.7, 0.1))
    old = [fresh(BASE_TRIAL, 0.5, 0.0, prompts=("a", "b")), fresh("001", 0.7, 0.1, prompts=("a", "b"))]
    assert confirmed_front(front, experiment(), old) is not None
    rows = [*old, fresh(BASE_TRIAL, 0.6, 0.0, prompts=("a", "c"))]
    assert confirmed_front(front, experiment(), rows) is None
    assert left(front, rows) == ["001"]


def test_a_trial_is_reported_by_its_fresh_numbers_where_there_are_any() -> None:
    asked = experiment(evaluate={"prompts": 6, "select": "brightness"})
    trial = result("001", 0.7, 0.1)
    before = measured(trial, asked, [])
    assert (before.result, before.num_prompts, before.num_reused, before.is_selected) == (trial, 6, None, True)
    rows = [per_prompt(BASE_TRIAL, [0.5] * 4, [0.0] * 4, 4), per_prompt("001", [0.6] * 4, [0.1] * 4, 4)]
    after = measured(trial, asked, rows)
    assert after.result.metrics["eval/brightness"] == pytest.approx(0.6)
    assert (after.num_prompts, after.num_reused) == (4, 4)


def test_measurements_are_read_back_those_of_before_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_confirmations(folder) == []
    append_line(
        folder.confirmed_file,
        '{"trial": "001", "checkpoint": "a", "num_prompts": 4, "metrics": {"eval/x": 1.0}, "spread": {"x": 0.5}}',
    )
    assert read_confirmations(folder) == [Confirmation("001", "a", 4, {"eval/x": 1.0}, {"x": 0.5})]
