"""Run folders of any size, as a sweep leaves them: trials with settings, measurements, curves and pictures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rltune.config.load import Experiment
from rltune.records import to_record
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.results import TrialResult
from tests.run_folders import SEARCHED, experiment, write_run

PROMPTS = ["a red circle", "a blue square", "a green star", "two black rings"]
EVALUATE = {"every": 5, "prompts": 4, "images_per_prompt": 2, "judges": ["diversity", "drift"]}
FOUR = ["brightness", "smoothness", "drift", "diversity"]
TILE_PX = 8
UNITS = {"brightness": 0.1, "smoothness": 0.1, "drift": 0.05, "diversity": 0.05}


def asked(num_trials: int, objectives: Sequence[str], prompts: Sequence[str] = PROMPTS, **sections: Any) -> Experiment:
    """An experiment over some objectives that searches rank, K, learning rate and weights."""
    return experiment(
        SEARCHED,
        prompts={"train": ["a"], "eval": list(prompts)},
        evaluate=EVALUATE,
        estimator={"name": "alignprop", "k": {"int": [1, 12]}},
        objectives=list(objectives),
        search={"trials": num_trials, "sampler": "random"},
        **sections,
    )


def write_synthetic(path: Path, asked: Experiment, *, seed: int = 0, with_pictures: bool = True) -> RunFolder:
    """Write a run all of whose trials have ended; a higher learning rate gives more brightness for more drift."""
    draw = np.random.default_rng(seed)
    num = asked.num_trials
    results = [_result(BASE_TRIAL, {}, dict.fromkeys(UNITS, 0.0), 0)]
    for i in range(1, num + 1):
        a = draw.random()
        values = {
            "model.lora.rank": int(draw.choice([2, 4, 8])),
            "estimator.k": int(draw.integers(1, 13)),
            "rewards.brightness.weight": a,
            "rewards.smoothness.weight": 1 - a,
            "optim.lr": float(10 ** draw.uniform(-4, -2)),
        }
        push = np.log10(values["optim.lr"]) + 4
        gains = {
            "brightness": 0.1 * push * a + draw.normal() * 0.01,
            "smoothness": 0.1 * push * (1 - a) + draw.normal() * 0.01,
            "drift": 0.02 * push**2 + abs(draw.normal()) * 0.005,
            "diversity": -0.02 * push + draw.normal() * 0.01,
        }
        results.append(_result(f"{i:03d}", values, gains, i))
    folder = write_run(path, asked, results[:1], spread=UNITS)
    with folder.results_file.open("a") as file:  # append_result waits for the disk at every line
        file.writelines(json.dumps(to_record(asdict(row))) + "\n" for row in results[1:])
    for row in results[1:]:
        _write_curve(folder, row, draw)
    _write_events(folder, num)
    if with_pictures:
        for row in results:
            name = "base.png" if row.trial == BASE_TRIAL else "step-000010.png"
            write_grid(folder.trial_dir(row.trial) / "samples" / name, len(asked.shared.prompts.eval), color=row.trial)
    return folder


def write_grid(path: Path, num_prompts: int, *, color: str) -> None:
    """Write a grid as an evaluation does, all of one colour that only this trial has."""
    columns = 2 * (4 if num_prompts >= 4 else 1)
    rows = -(-2 * min(num_prompts, 8) // columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (columns * TILE_PX, rows * TILE_PX), color_of(color)).save(path)


def color_of(trial: str) -> tuple[int, int, int]:
    """The colour of a trial's pictures."""
    number = int(trial)
    return (40 + number * 37 % 200, 40 + number * 91 % 200, 40 + number * 53 % 200)


def _result(trial: str, values: Mapping[str, Any], gains: Mapping[str, float], place: int) -> TrialResult:
    metrics: dict[str, float] = {"step": 10.0, "selected_step": 10.0}
    for name, gain in gains.items():
        metrics |= {f"eval/{name}": 0.5 + gain, f"eval/{name}_se": 0.02}
        metrics |= {f"gain/{name}": gain, f"gain/{name}_se": 0.0 if trial == BASE_TRIAL else 0.003}
    ended = f"2026-01-01T{place // 3600:02d}:{place // 60 % 60:02d}:{place % 60:02d}+00:00"
    return TrialResult(trial, "ok", values, {}, metrics, ended_at=ended, duration_s=1.0)


def _write_curve(folder: RunFolder, result: TrialResult, draw: np.random.Generator) -> None:
    rows: list[dict[str, Any]] = [
        {"step": step, "train/reward": float(step * 0.01 + draw.normal() * 0.01), "step_s": 0.5}
        for step in range(1, 11)
    ]
    for share, row in ((0.5, rows[4]), (1.0, rows[9])):
        row |= {key: share * value for key, value in result.metrics.items() if key.startswith("gain/")}
    path = folder.trial_dir(result.trial) / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_events(folder: RunFolder, num_trials: int) -> None:
    start = 1767225600.0  # 2026-01-01 in UTC
    lines = [
        {"time": start, "event": "driver_started", "trials_at_once": 2, "workers": 1, "gpus_per_worker": 0.0},
        {"time": start + num_trials, "event": "driver_ended"},
    ]
    folder.events_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
