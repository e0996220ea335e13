"""Which members of a front hold their place on fresh prompts, by hand-made measurements."""

from pathlib import Path

import pytest

from rltune.orchestration.confirming import Confirmation, confirmed_front, missing, read_confirmations
from rltune.orchestration.objectives import Front, Objectives, find_front
from rltune.orchestration.results import TrialResult, append_line
from rltune.orchestration.rundir import BASE_TRIAL, RunFolder
from tests.runs import experiment, result

SPREAD = {"brightness": 0.1, "drift": 0.1}


def chosen(*members: TrialResult) -> Front:
    """The front of the search: brightness up, drift down."""
    front = find_front([result(BASE_TRIAL, 0.5, 0.0), *members], Objectives(("brightness", "drift")), SPREAD)
    assert front is not None
    return front


def fresh(trial: str, brightness: float, drift: float, checkpoint: str = "") -> Confirmation:
    return Confirmation(
        trial, checkpoint, 8, result(trial, brightness, drift).metrics, {"brightness": 0.2, "drift": 0.05}
    )


def test_a_member_that_another_beats_on_fresh_prompts_is_dropped() -> None:
    front = chosen(result("001", 0.7, 0.1), result("002", 0.9, 0.2))
    assert [member.trial for member in front.members] == ["002", "001", "000"]
    rows = [fresh(BASE_TRIAL, 0.4, 0.0), fresh("001", 0.6, 0.12), fresh("002", 0.58, 0.2)]
    found = confirmed_front(front, experiment(), rows)
    assert found is not None
    assert [member.trial for member in found.members] == ["001", "000"]
    assert [member.trial for member in found.dropped] == ["002"]
    assert found.knee is not None
    assert (found.knee.trial, found.num_fresh_prompts) == ("001", 8)
    assert found.knee.metrics["eval/brightness"] == 0.6
    assert found.reference_D == pytest.approx([0.4 - 0.2, 0.0 + 0.05])  # the base model's fresh values and spread
    # in units of the spread from there: the base at (1, 1), trial 001 at (2, -1.4) which lies outside
    assert found.hypervolume == pytest.approx(1.0)


def test_a_member_that_breaks_a_constraint_on_fresh_prompts_is_dropped() -> None:
    asked = experiment(constraints={"drift": {"max": 0.15}})
    front = chosen(result("001", 0.7, 0.1), result("002", 0.9, 0.12))
    rows = [fresh(BASE_TRIAL, 0.5, 0.0), fresh("001", 0.7, 0.1), fresh("002", 0.9, 0.2)]
    found = confirmed_front(front, asked, rows)
    assert found is not None
    assert [member.trial for member in found.dropped] == ["002"]
    assert found.dropped[0].constraints == {"drift.max": pytest.approx(0.05)}


def test_a_front_is_confirmed_only_as_a_whole_and_by_its_own_checkpoints() -> None:
    front = chosen(result("001", 0.7, 0.1, checkpoint="a"), result("002", 0.9, 0.2, checkpoint="b"))
    rows = [fresh(BASE_TRIAL, 0.5, 0.0), fresh("001", 0.7, 0.1, "a")]
    assert confirmed_front(front, experiment(), rows) is None
    assert [member.trial for member in missing(front, rows)] == ["002"]
    rows.append(fresh("002", 0.9, 0.2, "an older one"))
    assert confirmed_front(front, experiment(), rows) is None
    assert [member.trial for member in missing(front, rows)] == ["002"]
    rows.append(fresh("002", 0.9, 0.2, "b"))
    assert confirmed_front(front, experiment(), rows) is not None
    assert missing(front, rows) == []
    assert confirmed_front(front, experiment(), rows[1:]) is None  # without the base model there is no reference


def test_measurements_are_read_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_confirmations(folder) == []
    append_line(
        folder.confirmed_file,
        '{"trial": "001", "checkpoint": "a", "num_prompts": 4, "metrics": {"eval/x": 1.0}, "spread": {"x": 0.5}}',
    )
    assert read_confirmations(folder) == [Confirmation("001", "a", 4, {"eval/x": 1.0}, {"x": 0.5})]
