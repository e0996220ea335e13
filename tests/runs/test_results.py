import json
from pathlib import Path

import pytest

from rltune.runs.results import TrialResult, append_result, read_results

FIRST = TrialResult(
    trial="001",
    state="ok",
    values={"optim.lr": 1e-3, "model.lora.targets": "all", "sampler.height": None},
    params={"optim.lr": 1e-3, "simplex[0]": 0.1 + 0.2},
    metrics={"eval/brightness": 1 / 3, "step": 10.0},
    constraints={"drift.max": -0.125},
    checkpoint="trials/001/checkpoints/x",
    duration_s=1.5,
    ended_at="2026-01-01T00:00:00+00:00",
)
SECOND = TrialResult("002", "failed", {}, {}, reason='two\nlines, a "quote" and \u2028 a separator')


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def test_what_is_appended_is_read_back_exactly_and_in_order(path: Path) -> None:
    assert read_results(path) == []
    append_result(path, FIRST)
    append_result(path, SECOND)
    assert read_results(path) == [FIRST, SECOND]
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("torn", ['{"trial": "003", "sta', json.dumps({"trial": "003"}), "\u00fc"])
def test_a_line_that_a_kill_cut_short_is_ignored_and_then_dropped(path: Path, torn: str) -> None:
    append_result(path, FIRST)
    with path.open("ab") as file:
        file.write(torn.encode())
    assert read_results(path) == [FIRST]
    append_result(path, SECOND)
    assert read_results(path) == [FIRST, SECOND]
    assert path.read_text().count("\n") == 2


def test_a_file_that_is_one_torn_line_starts_again(path: Path) -> None:
    path.write_text('{"trial"')
    assert read_results(path) == []
    append_result(path, FIRST)
    assert read_results(path) == [FIRST]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_and_the_file_stays_whole(path: Path, value: float) -> None:
    append_result(path, FIRST)
    with pytest.raises(ValueError, match="JSON compliant"):
        append_result(path, TrialResult("002", "ok", {}, {}, metrics={"eval/brightness": value}))
    append_result(path, SECOND)
    assert read_results(path) == [FIRST, SECOND]


def test_a_broken_constraint_makes_a_trial_infeasible() -> None:
    def is_feasible(**constraints: float) -> bool:
        return TrialResult("001", "ok", {}, {}, constraints=constraints).is_feasible

    assert is_feasible()
    assert is_feasible(a=0.0, b=-1.0)
    assert not is_feasible(a=1e-9, b=-1.0)
