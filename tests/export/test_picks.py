from pathlib import Path

import pytest

from rltune.errors import UserError
from rltune.export.picks import best_picks, pick_trial
from rltune.runs.fronts import read_front
from rltune.runs.layout import BASE_TRIAL, RunFolder
from tests.run_folders import experiment, result, write_run


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """001 is best in brightness, 003 in drift, 002 is the bulge between them, 004 failed, 005 is dominated."""
    results = [
        result(BASE_TRIAL, 0.5, 0.0),
        result("001", 1.0, 1.0),
        result("002", 0.9, 0.2),
        result("003", 0.6, 0.1),
        result("004", reason="step 3: nan"),
        result("005", 0.6, 0.9),
    ]
    return write_run(tmp_path / "mix", experiment(), results, started=["006"])


@pytest.mark.parametrize(
    ("pick", "trial"),
    [("knee", "002"), ("best:brightness", "001"), ("best:drift", "003"), ("001", "001"), ("005", "005")],
)
def test_a_trial_is_picked_by_what_it_is(folder: RunFolder, pick: str, trial: str) -> None:
    assert pick_trial(pick, folder, experiment()).trial == trial


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        ("004", r"--pick: trial '004' has no LoRA, it failed: step 3: nan; pick another"),
        (BASE_TRIAL, r"--pick: trial '000' has no LoRA, it is the base model; pick another"),
        *(
            (
                wrong,
                rf"--pick: '{wrong}' is not a choice; write knee, best:brightness, best:drift, "
                r"or a trial: 001, 002, 003, 005$",
            )
            for wrong in ("006", "7", "best:smoothness", "best", "worst:drift", "")
        ),
    ],
)
def test_what_cannot_be_picked_is_answered_with_what_can(folder: RunFolder, pick: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pick_trial(pick, folder, experiment())


def test_a_run_without_a_trained_front_has_no_knee(tmp_path: Path) -> None:
    broken = result("001", 0.9, 0.1, constraints={"diversity.min": 0.1})
    folder = write_run(tmp_path / "mix", experiment(), [result(BASE_TRIAL, 0.5), broken])
    with pytest.raises(UserError, match=r"no trained trial of .*mix is on its front; name one that ended well: 001$"):
        pick_trial("knee", folder, experiment())
    assert pick_trial("001", folder, experiment()) == broken  # by name it can be had
    empty = write_run(tmp_path / "empty", experiment())
    with pytest.raises(UserError, match=r"no trained trial of .* is on its front; and none has ended well yet"):
        pick_trial("best:drift", empty, experiment())


def test_the_best_are_the_knee_and_the_ends_each_once(folder: RunFolder, tmp_path: Path) -> None:
    front = read_front(folder, experiment())
    assert front is not None
    assert [picked.trial for picked in best_picks(front)] == ["002", "001", "003"]
    one = read_front(
        write_run(tmp_path / "one", experiment(), [result(BASE_TRIAL, 0.5), result("001", 0.6, 0.1)]), experiment()
    )
    assert one is not None
    assert [picked.trial for picked in best_picks(one)] == ["001"]
    none = read_front(write_run(tmp_path / "none", experiment(), [result(BASE_TRIAL, 0.5)]), experiment())
    assert none is not None
    assert best_picks(none) == []
