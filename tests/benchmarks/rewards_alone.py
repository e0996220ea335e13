"""Each reward of the built-in model trained alone: its gain on held-out prompts, and what an independent judge says.

    OMP_NUM_THREADS=1 python tests/benchmarks/rewards_alone.py runs/rewards            # everything
    OMP_NUM_THREADS=1 python tests/benchmarks/rewards_alone.py runs/rewards aesthetic  # one reward; two side by side

Trains ``experiments/REWARD.yaml`` (``gain``), the same with far too high a learning rate (``push``), and for the
aesthetic reward two controls: learning rate 0 (``still``, one seed) and the reward's sign flipped (``flip``). Three
seeds each. A finished run is read from its folder. Prints the table of ``experiments/README.md`` and draws
``REWARD.png``. Gains are over the base model, paired by prompt and noise; intervals are 95 % over prompts and
seeds together, by Student's t with Satterthwaite's degrees of freedom (``rltune.intervals``).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from rltune.config.experiment import RunConfig
from rltune.config.load import load_experiment
from rltune.intervals import over_prompts_and_seeds
from rltune.rewards.base import REWARDS
from rltune.rewards.wrappers import Negate
from rltune.training.loop import train_run
from rltune.training.quiet import quiet_libraries
from rltune.training.reference import load_base
from rltune.training.reporter import FolderReporter
from rltune.training.setup import base_key

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SEEDS = (0, 1, 2)
PUSHED: Mapping[str, Mapping[str, Any]] = {
    "aesthetic": {"optim.lr": 4e-3, "optim.steps": 40, "optim.batch": 8},
    "compressibility": {"optim.lr": 4e-3, "optim.steps": 40, "optim.batch": 8},
    "alignment": {"optim.lr": 1e-2, "optim.steps": 60, "optim.batch": 8},
    "count": {"optim.lr": 1e-2, "optim.steps": 60, "optim.batch": 8},
    "presence": {"optim.lr": 1e-2, "optim.steps": 60, "optim.batch": 8},
}
CONTROLLED = "aesthetic"
PROMPTS_SHOWN = 8
JUDGES = ("faithful", "faithful_exact")
Run = dict[str, dict[str, npt.NDArray[np.float64]]]
"""``eval`` and ``gain`` -> reward or judge -> a value a held-out prompt."""


def _negated(reward: str) -> Negate:
    return Negate(REWARDS.build(reward, {}))


def configure(reward: str, setting: str, seed: int) -> RunConfig:
    """The experiment of one run."""
    changes: dict[str, Any] = {"seed": seed, "evaluate.every": 1000}
    if setting == "push":
        changes |= PUSHED[reward]
    elif setting == "still":
        changes["optim.lr"] = 0.0
    elif setting == "flip":
        changes |= {f"rewards.{reward}.weight": 0.0, f"rewards.minus_{reward}.weight": 1.0}
    overrides = [f"{where}={json.dumps(value)}" for where, value in changes.items()]
    return load_experiment(EXPERIMENTS / f"{reward}.yaml", overrides=overrides).concrete({})


def train(reward: str, setting: str, seed: int, folder: Path) -> Run:
    """Final values of one run on every held-out prompt, trained now or read."""
    trial_dir = folder / reward / f"{setting}-{seed}"
    if not list(trial_dir.glob("samples/step-*.json")):
        config = configure(reward, setting, seed)
        reporter = FolderReporter(trial_dir / "checkpoints")
        train_run(config, trial_dir=trial_dir, base_dir=folder / "base", reporter=reporter)
    (result,) = trial_dir.glob("samples/step-*.json")
    run: Run = {
        kind: {name: np.array(values_P) for name, values_P in rows.items()}
        for kind, rows in json.loads(result.read_text()).items()
    }
    print(f"{reward} {setting} seed {seed}: {line(reward, [run])}", flush=True)
    return run


def gain(runs: Sequence[Run], name: str) -> tuple[float, float | None]:
    """Mean gain and the half width of its 95 % interval over prompts and seeds; of one seed, over prompts alone."""
    return over_prompts_and_seeds(np.stack([run["gain"][name] for run in runs]))


def line(reward: str, runs: Sequence[Run]) -> str:
    """One row's cells: base and trained reward, gain with interval, the judge's two scores before and after."""
    rise, half_width = gain(runs, reward)
    after = {name: float(np.mean([run["eval"][name] for run in runs])) for name in (reward, *JUDGES, "diversity")}
    cells = [f"{after[reward] - rise:.3f} -> {after[reward]:.3f}", f"{rise:+.3f} ± {half_width:.3f}"]
    for judge in JUDGES:
        base = after[judge] - gain(runs, judge)[0]
        cells.append(f"{base:.3f} -> {after[judge]:.3f} ({after[judge] / base:.0%})")
    return " | ".join([*cells, f"{after['diversity']:.3f}"])


def show(reward: str, folder: Path) -> None:
    """Write ``REWARD.png``: base model, ``gain`` and ``push`` of the first seed, a picture of each of eight prompts."""
    config = configure(reward, "gain", SEEDS[0])
    base = load_base(folder / "base" / base_key(config))
    assert base is not None
    each = config.evaluate.images_per_prompt
    rows = [base.pixels_NHW3[: PROMPTS_SHOWN * each : each]]
    for setting in ("gain", "push"):
        (grid,) = (folder / reward / f"{setting}-{SEEDS[0]}" / "samples").glob("step-*.png")
        pixels = np.asarray(Image.open(grid))
        size = rows[0].shape[1]
        cells = pixels.reshape(-1, size, pixels.shape[1] // size, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
        rows.append(cells[: PROMPTS_SHOWN * each : each])
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    Image.fromarray(sheet).resize((2 * sheet.shape[1], 2 * sheet.shape[0]), Image.Resampling.NEAREST).save(
        folder / f"{reward}.png"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("rewards", nargs="*", default=list(PUSHED))
    args = parser.parse_args()
    quiet_libraries()
    for reward in args.rewards:
        REWARDS.register(f"minus_{reward}")(partial(_negated, reward))
    rows = []
    for setting, seeds in (("gain", SEEDS), ("push", SEEDS), ("flip", SEEDS), ("still", SEEDS[:1])):
        for reward in args.rewards:
            if setting in ("gain", "push") or reward == CONTROLLED:
                runs = [train(reward, setting, seed, args.folder) for seed in seeds]
                rows.append(f"| {reward} | {setting} | {line(reward, runs)} |")
    for reward in args.rewards:
        show(reward, args.folder)
    print("\n| reward | setting | base -> trained | gain | faithful | faithful_exact | diversity |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
