"""What is drawn of mixtures: each LoRA along its strength, soups beside the trials that they are of."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from rltune.records import to_record
from rltune.report.drawing import Dot, Line
from rltune.report.figures import front_figures
from rltune.report.gather import Gathered, gather
from rltune.report.mixtures import strength_figures
from rltune.report.write import write_figures, write_report
from rltune.runs.confirmations import Confirmation
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.metrics import summarise
from rltune.runs.mixtures import Mixture
from rltune.runs.record import read_run
from rltune.runs.store import append_line
from tests.run_folders import experiment, result, write_run
from tests.runs.test_compare import BASE_P, PROMPTS

JITTER = np.array([0.05, -0.05, 0.02, -0.02])
TRIALS = {"001": (0.3, 0.05), "002": (0.1, 0.01)}
"""Brightness gained, and drift."""


def measured(name: str, gain: float, drift: float) -> Confirmation:
    jitter = 0.0 * JITTER if name == BASE_TRIAL else JITTER
    values = {"brightness": BASE_P + gain + jitter, "drift": drift + jitter / 10}
    metrics = summarise(values, {"brightness": BASE_P, "drift": np.zeros(4)})
    rows = {key: row.tolist() for key, row in values.items()}
    return Confirmation(name, "", 4, metrics, values=rows, prompts=PROMPTS)


def mixture(name: str, gain: float, drift: float, **weights: float) -> Mixture:
    row = measured(name, gain, drift)
    shares = {trial.removeprefix("t"): weight for trial, weight in weights.items()}
    return Mixture(name, shares, dict.fromkeys(shares, ""), 4, row.metrics, row.values, row.prompts)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "mix"
    rows = [result(trial, 0.5 + gain, drift) for trial, (gain, drift) in TRIALS.items()]
    folder = write_run(path, experiment(), [result(BASE_TRIAL, 0.5, 0.0), *rows])
    for row in (measured(BASE_TRIAL, 0.0, 0.0), *(measured(trial, *point) for trial, point in TRIALS.items())):
        append_line(folder.confirmed_file, json.dumps(to_record(asdict(row))))
    for mixed in (
        mixture("001@0.5", 0.2, 0.02, t001=0.5),
        mixture("001@1.25", 0.36, 0.08, t001=1.25),
        mixture("soup-1", 0.25, 0.02, t001=0.5, t002=0.5),
        mixture("soup-2", 0.05, 0.03, t001=0.25, t002=0.75),  # 002 is better in both
    ):
        append_line(folder.mixtures_file, json.dumps(to_record(asdict(mixed))))
    return path


@pytest.fixture(scope="module")
def run(path: Path) -> Gathered:
    return gather(*read_run(path))


def test_a_curve_goes_from_the_base_model_through_the_lora_itself(run: Gathered) -> None:
    figures = {figure.name: figure.drawing for figure in strength_figures(run)}
    assert list(figures) == ["strength-brightness", "strength-drift"]
    dots = [shape for shape in figures["strength-brightness"].shapes if isinstance(shape, Dot)]
    x, y = (np.array([getattr(dot, axis) for dot in dots]) for axis in "xy")
    np.testing.assert_allclose((x - x[0]) / (x[2] - x[0]), [0, 0.5, 1, 1.25], rtol=1e-6)
    np.testing.assert_allclose((y - y[0]) / (y[2] - y[0]), np.array([0, 0.2, 0.3, 0.36]) / 0.3, rtol=1e-6)
    assert y[2] < y[0]  # more of it is better, and above
    drifts = [shape.y for shape in figures["strength-drift"].shapes if isinstance(shape, Dot)]
    assert drifts[2] > drifts[0]  # of drift less is


def test_an_interval_is_that_of_the_gain(run: Gathered) -> None:
    drawing = next(iter(strength_figures(run))).drawing
    dots = [shape for shape in drawing.shapes if isinstance(shape, Dot)]
    bars = [line for line in drawing.shapes if isinstance(line, Line) and line.width == 1.2]
    height = bars[2].points[0][1] - bars[2].points[1][1]
    half = run.gain(run.fresh["001"], "brightness").half  # type: ignore[union-attr]
    assert half == pytest.approx(3.1824 * JITTER.std(ddof=1) / 2, rel=1e-3)  # Student's t of four prompts
    assert height / (dots[0].y - dots[2].y) == pytest.approx(2 * half / 0.3, rel=1e-6)


def test_soups_that_nothing_has_beaten_stand_on_the_front_and_in_a_table(run: Gathered, path: Path) -> None:
    (figure,) = front_figures(run)
    soups = [shape for shape in figure.drawing.shapes if isinstance(shape, Dot) and shape.role == "soup"]
    (base,) = (shape for shape in figure.drawing.shapes if isinstance(shape, Dot) and shape.role == "base")
    knee = next(shape for shape in figure.drawing.shapes if isinstance(shape, Dot) and shape.trial == "001")
    assert len(soups) == 1
    assert (soups[0].x - base.x) / (knee.x - base.x) == pytest.approx(0.25 / 0.3, rel=1e-6)
    text = write_report(*read_run(path)).read_text(encoding="utf-8")
    assert "0.5 x 001 + 0.5 x 002" in text
    assert "0.25 x 001" not in text
    assert "Soups: 2 mixtures of LoRAs of the front, not trained. Nothing has beaten 1 of them" in text
    assert "At other strengths" in text


def test_figures_are_files_too(path: Path, tmp_path: Path) -> None:
    names = {file.name for file in write_figures(*read_run(path), tmp_path)}
    assert {"strength-brightness.svg", "strength-drift.png"} <= names
