"""Each reward of the built-in model trained alone: its gain on held-out prompts, and what an independent judge says.

    OMP_NUM_THREADS=1 python tests/benchmarks/rewards_alone.py runs/rewards            # everything, an hour on one core
    OMP_NUM_THREADS=1 python tests/benchmarks/rewards_alone.py runs/rewards aesthetic  # one reward; two side by side

Trains ``experiments/REWARD.yaml`` (``gain``), the same with the settings of ``HACKS`` (``hack``), and for the first
reward two controls: learning rate 0 (``still``) and the reward's sign flipped (``flip``), three seeds each. A finished
run is read from its folder. Prints the table of ``experiments/README.md``: gains are over the base model, paired by
prompt and noise; intervals are 95 %, from the spread over prompts and that over seeds together.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltune.config.load import load_experiment
from rltune.orchestration.job import quiet_libraries
from rltune.rewards.base import REWARDS, Reward
from rltune.training.loop import train_run

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SEEDS = (0, 1, 2)
HACKS: Mapping[str, Mapping[str, Any]] = {
    "aesthetic": {"optim.lr": 3e-3, "optim.steps": 60},
    "alignment": {"optim.lr": 3e-3, "optim.steps": 60},
    "compressibility": {"optim.lr": 3e-3, "optim.steps": 60},
    "count": {"optim.lr": 3e-3, "optim.steps": 60},
    "presence": {"optim.lr": 3e-3, "optim.steps": 60},
}
JUDGES = ("faithful", "faithful_exact")


@dataclass
class LastReport:
    """A reporter that keeps the last metrics."""

    metrics: dict[str, float] = field(default_factory=dict)

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None) -> None:
        self.metrics = dict(metrics)


class Negated:
    """Another reward with its sign flipped."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self.is_differentiable, self.metric_unit = reward.is_differentiable, reward.metric_unit
        self.value_range = (-reward.value_range[1], -reward.value_range[0])

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return -self._reward(images_B3HW, prompts)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return -self._reward.metric(images_B3HW, prompts)

    def to(self, device: torch.device) -> "Negated":
        self._reward.to(device)
        return self


def train(reward: str, setting: str, seed: int, folder: Path) -> dict[str, float]:
    """Final metrics of one run, trained now or read."""
    result = folder / reward / f"{setting}-{seed}" / "result.json"
    if result.is_file():
        read: dict[str, float] = json.loads(result.read_text())
        return read
    changes: dict[str, Any] = {"seed": seed, "evaluate.judges": ["diversity", "drift", *JUDGES]}
    if setting == "hack":
        changes |= HACKS[reward]
    elif setting == "still":
        changes["optim.lr"] = 0.0
    elif setting == "flip":
        REWARDS.register(f"minus_{reward}")(lambda: Negated(REWARDS.build(reward, {})))
        changes |= {f"rewards.{reward}.weight": 0.0, f"rewards.minus_{reward}.weight": 1.0}
    overrides = [f"{where}={json.dumps(value)}" for where, value in changes.items()]
    config = load_experiment(EXPERIMENTS / f"{reward}.yaml", overrides=overrides).concrete({})
    reporter = LastReport()
    train_run(config, trial_dir=result.parent, base_dir=folder / "base", reporter=reporter)
    result.write_text(json.dumps(reporter.metrics))
    print(f"{reward} {setting} seed {seed}: {line(reward, [reporter.metrics])}", flush=True)
    return reporter.metrics


def line(reward: str, runs: Sequence[Mapping[str, float]]) -> str:
    """One row's cells: base and trained reward, gain with interval, the judge's two scores before and after."""
    gains = [run[f"gain/{reward}"] for run in runs]
    error = statistics.mean(run[f"gain/{reward}_se"] for run in runs)
    if len(runs) > 1:
        error = (error**2 + statistics.variance(gains) / len(gains)) ** 0.5
    after = statistics.mean(run[f"eval/{reward}"] for run in runs)
    gain = statistics.mean(gains)
    cells = [f"{after - gain:.3f} -> {after:.3f}", f"{gain:+.3f} ± {1.96 * error:.3f}"]
    for judge in JUDGES:
        after = statistics.mean(run[f"eval/{judge}"] for run in runs)
        base = after - statistics.mean(run[f"gain/{judge}"] for run in runs)
        cells.append(f"{base:.3f} -> {after:.3f} ({after / base:.0%})")
    cells.append(f"{statistics.mean(run['eval/diversity'] for run in runs):.3f}")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("rewards", nargs="*", default=list(HACKS))
    args = parser.parse_args()
    quiet_libraries()
    rows = []
    for reward in args.rewards:
        settings = ("gain", "hack", "still", "flip") if reward == next(iter(HACKS)) else ("gain", "hack")
        for setting in settings:
            runs = [train(reward, setting, seed, args.folder) for seed in SEEDS]
            rows.append(f"| {reward} | {setting} | {line(reward, runs)} |")
    print("\n| reward | setting | base -> trained | gain | faithful | faithful_exact | diversity |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
