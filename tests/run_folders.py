"""Experiments and run folders made by hand, as a sweep leaves them, without one having run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rltune.config.load import Experiment, parse_experiment
from rltune.config.yamlfile import write_yaml
from rltune.orchestration.claiming import claim_run
from rltune.rewards.mixture import Calibration
from rltune.runs.base_scores import BaseScores
from rltune.runs.layout import BASE_TRIAL, RunFolder, TrialSpec
from rltune.runs.results import TrialResult, append_result
from rltune.training.reference import BaseReference, save_base

SEARCHED: dict[str, Any] = {
    "name": "mix",
    "model": {"lora": {"rank": {"choice": [2, 4, 8]}}},
    "rewards": {"brightness": {"weight": {"simplex": True}}, "smoothness": {"weight": {"simplex": True}}},
    "optim": {"lr": {"log_float": [1e-4, 1e-2]}, "steps": 10, "batch": 4},
    "evaluate": {"every": 5},
    "objectives": ["brightness", "drift"],
    "search": {"trials": 4, "sampler": "random"},
}
"""Two objectives, of which the second is minimised."""
VALUES = {
    "model.lora.rank": 4,
    "rewards.brightness.weight": 0.25,
    "rewards.smoothness.weight": 0.75,
    "optim.lr": 1e-3,
}


OWN = {"sampler.steps": 20, "sampler.guidance": 5.0, "sampler.eta": 0.0}
"""What the built-in model is sampled with."""


def experiment(raw: Mapping[str, Any] = SEARCHED, **sections: Any) -> Experiment:
    """An experiment as a plan hands it on: settled."""
    return parse_experiment(write_yaml({**raw, **sections}), "mix.yaml").settled(OWN)


def result(
    trial: str,
    brightness: float = 0.0,
    drift: float = 0.0,
    *,
    constraints: Mapping[str, float] | None = None,
    reason: str = "",
    stopped_at: int | None = None,
    **fields: Any,
) -> TrialResult:
    """A trial that ended: well, or stopped at a step, or with a reason alone failed."""
    metrics = {
        "step": 10.0 if stopped_at is None else float(stopped_at),
        "eval/brightness": brightness,
        "eval/brightness_se": 0.01,
        "eval/drift": drift,
        "eval/drift_se": 0.02,
        "gain/brightness": brightness - 0.5,
        "gain/brightness_se": 0.005,
        "gain/drift": drift,
        "gain/drift_se": 0.015,
    }
    return TrialResult(
        trial=trial,
        state="stopped" if stopped_at is not None else "failed" if reason else "ok",
        values=fields.pop("values", {} if trial == BASE_TRIAL else VALUES),
        params=fields.pop("params", {}),
        metrics={} if reason and stopped_at is None else metrics,
        constraints=constraints or {},
        reason=reason,
        **fields,
    )


def write_run(
    path: Path,
    asked: Experiment,
    results: Sequence[TrialResult] = (),
    *,
    started: Sequence[str] = (),
    spread: Mapping[str, float] | None = None,
) -> RunFolder:
    """Write a run folder: its experiment, the base model's spread, results, and trials that have only started."""
    folder = RunFolder(path)
    folder.path.mkdir(parents=True)
    claim = claim_run(folder, asked, precision="fp32")
    save_base(
        folder.base_dir / claim.record.base_key,
        BaseReference(
            # two prompts at +-a have the standard deviation a * sqrt(2)
            BaseScores(
                {
                    name: np.array([std, -std]) / 2**0.5
                    for name, std in (spread or {"brightness": 0.1, "drift": 0.1}).items()
                }
            ),
            calibration={name: Calibration(mean=0.0, std=1.0) for name in asked.shared.rewards},
            pixels_NHW3=np.zeros((1, 8, 8, 3), np.uint8),
        ),
    )
    for trial in [row.trial for row in results if row.trial != BASE_TRIAL] + list(started):
        folder.write_trial(TrialSpec(trial, VALUES if asked.is_searched else {}, {}))
    for row in results:
        append_result(folder.results_file, row)
    return folder


def write_rows(folder: RunFolder, trial: str, rows: Sequence[Mapping[str, float]]) -> Path:
    path = folder.trial_dir(trial) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"step_s": 0.5, **row}) + "\n" for row in rows))
    return path
