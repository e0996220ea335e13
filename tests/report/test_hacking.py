from pathlib import Path

import pytest

from rltune.report.gather import gather
from rltune.report.hacking import hacked_trials, judges
from tests.run_folders import SEARCHED, experiment, result, write_run


@pytest.mark.parametrize(
    ("reward", "judge", "why"),
    [
        (0.1, -0.1, "brightness rose, diversity fell"),
        (0.1, 0.1, ""),
        (0.1, -0.001, ""),  # within its interval
        (-0.1, -0.1, ""),
        (0.001, -0.1, ""),
    ],
)
def test_a_trial_looks_hacked_where_a_judge_falls_while_a_reward_rises(
    tmp_path: Path, reward: float, judge: float, why: str
) -> None:
    asked = experiment(SEARCHED, evaluate={"judges": ["diversity", "drift"], "prompts": 16, "images_per_prompt": 2})
    rows = [result("000", 0.5, 0.0), result("001", 0.5 + reward, 0.3)]
    for row, gain in zip(rows, (0.0, judge), strict=True):
        row.metrics.update(  # type: ignore[attr-defined]
            {"eval/diversity": 0.2 + gain, "gain/diversity": gain, "gain/diversity_se": 0.005}
        )
    units = {"brightness": 0.1, "drift": 0.1, "diversity": 0.1}
    run = gather(write_run(tmp_path / "mix", asked, rows, spread=units), asked)
    assert judges(run) == ("diversity",)  # drift only says how far
    assert hacked_trials(run) == ({"001": why} if why else {})
