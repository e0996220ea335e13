from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from rltune.report.gather import gather
from rltune.report.importance import importances, interval, spearman
from tests.report.synthetic import FOUR, asked, write_synthetic


@pytest.mark.parametrize("num", [6, 12, 200])
def test_it_is_spearmans_correlation_with_ties(num: int) -> None:
    draw = np.random.default_rng(num)
    x = draw.integers(0, 4, num).astype(float)
    y = x + draw.normal(size=num).round()
    assert spearman(x, y) == pytest.approx(float(spearmanr(x, y).statistic), abs=1e-12)


def test_nothing_is_said_of_too_few_points_or_of_what_does_not_vary() -> None:
    assert spearman(np.arange(5.0), np.arange(5.0)) is None
    assert spearman(np.ones(9), np.arange(9.0)) is None


@pytest.mark.parametrize(("num", "slope"), [(12, 0.0), (12, 0.7), (40, 0.7)])
def test_its_interval_covers_the_truth(num: int, slope: float) -> None:
    """Of two normal variables the truth is 6 / pi arcsin(rho / 2); 1,000 draws have an error of 0.7 %."""
    draw = np.random.default_rng(0)
    truth, covered = 6 / np.pi * np.arcsin(slope / 2), 0
    for _ in range(1000):
        x = draw.normal(size=num)
        y = slope * x + (1 - slope**2) ** 0.5 * draw.normal(size=num)
        low, high = interval(spearman(x, y) or 0.0, num)
        covered += low <= truth <= high
    assert 0.93 <= covered / 1000 <= 0.975


def test_a_setting_that_decides_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    experiment = asked(40, FOUR)
    run = gather(write_synthetic(tmp_path / "mix", experiment, with_pictures=False), experiment)
    found = {(row.setting, row.objective): row for row in importances(run)}
    rate, depth = found["optim.lr", "drift"], found["estimator.k", "drift"]
    assert rate.high < -0.8  # a higher rate drifts further, which is worse
    assert depth.low < 0 < depth.high
    assert rate.num_trials == 40
