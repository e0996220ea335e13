"""Is a head that was fine-tuned against counterfactuals hacked later? Two heads trained on, at equal settings.

    rltune rewards finetune aesthetic -o runs/robust/robust.safetensors
    OMP_NUM_THREADS=1 python tests/benchmarks/robust_head.py runs/robust            # everything; again: what is missing
    OMP_NUM_THREADS=1 python tests/benchmarks/robust_head.py runs/robust --seeds 0 --heads robust   # one run
    python tests/benchmarks/robust_head.py runs/robust --table                      # table and picture of what is there

``experiments/aesthetic.yaml`` with ``STEPS`` steps: one run trains on the built-in head, the other on the head of the
file. Both are measured by the built-in head, whose gain over the base model's images of the same noise is the axis, and
by the judge and by diversity, which neither sees. A run's curve is read at equal gains, straight between evaluations;
a cell is the mean over seeds, with half the width of its 95 % interval, by Student's t. The difference is paired by
seed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from rltune.config.experiment import RunConfig
from rltune.config.load import load_experiment
from rltune.intervals import Array, half_width, standard_error
from rltune.training.loop import train_run
from rltune.training.quiet import quiet_libraries
from rltune.training.reporter import FolderReporter

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "aesthetic.yaml"
HEADS = ("built-in", "robust")
STEPS, EVERY, PROMPTS = 60, 20, 48
GAINS = (1.0, 2.0, 3.0)
FIGURES = ("faithful", "diversity")


def configure(head: str, file: Path, seed: int) -> RunConfig:
    """The experiment of one run."""
    changes: dict[str, Any] = {"seed": seed, "optim.steps": STEPS}
    changes |= {"evaluate.every": EVERY, "evaluate.prompts": PROMPTS, "evaluate.images_per_prompt": 2}
    if head == "robust":
        own = {"reward": "aesthetic", "weight": 1.0, "options": {"head": str(file)}}
        changes |= {"rewards.aesthetic.weight": 0.0, "rewards.robust": own}
    overrides = [f"{where}={json.dumps(value)}" for where, value in changes.items()]
    return load_experiment(EXPERIMENT, overrides=overrides).concrete({})


def train(head: str, folder: Path, seed: int) -> None:
    """Train what was not trained before; its evaluations are in ``samples``."""
    run = folder / f"{head}-{seed}"
    if not (run / "samples" / f"step-{STEPS:06d}.json").is_file():
        reporter = FolderReporter(run / "checkpoints")
        config = configure(head, folder / "robust.safetensors", seed)
        train_run(config, trial_dir=run, base_dir=folder / "base", reporter=reporter)
        print(f"{head} {seed}", flush=True)


def curve(run: Path) -> dict[str, Array] | None:
    """Each evaluation's mean gain over the base model, which is first; None where the run is not whole."""
    files = [run / "samples" / f"step-{step:06d}.json" for step in range(EVERY, STEPS + 1, EVERY)]
    if not all(file.is_file() for file in files):
        return None
    gains = [json.loads(file.read_text())["gain"] for file in files]
    return {name: np.array([0.0, *(np.mean(gain[name]) for gain in gains)]) for name in ("aesthetic", *FIGURES)}


def at_gain(found: dict[str, Array], name: str, gain: float) -> float:
    """A figure where the built-in score has risen by ``gain``; not a number where it never has."""
    reached = np.maximum.accumulate(found["aesthetic"])
    return float(np.interp(gain, reached, found[name])) if reached[-1] >= gain else float("nan")


def interval(values_S: Array) -> str:
    """A mean over seeds and half the width of its 95 % interval."""
    half = half_width(standard_error(values_S), len(values_S) - 1) if len(values_S) > 1 else None
    return f"{values_S.mean():+.3f}" + ("" if half is None else f" ± {half:.3f}")


def table(curves: dict[int, dict[str, dict[str, Array]]]) -> None:
    """Print what is lost of each figure at equal gains."""
    print("| gain of the built-in score | figure | built-in head | robust head | difference |")
    print("|---|---|---|---|---|")
    for gain in GAINS:
        for name in FIGURES:
            rows = np.array([[at_gain(seed[head], name, gain) for head in HEADS] for seed in curves.values()])
            rows = rows[np.isfinite(rows).all(axis=1)]
            if len(rows):
                cells = [interval(rows[:, 0]), interval(rows[:, 1]), interval(rows[:, 1] - rows[:, 0])]
                print(f"| {gain:g} ({len(rows)} seeds) | {name} | {' | '.join(cells)} |")


def picture(curves: dict[int, dict[str, dict[str, Array]]], file: Path) -> None:
    """Draw the figures over the gain, a line a seed."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7.2, 3.2), layout="constrained")
    for axes, name in zip(drawing.subplots(1, len(FIGURES)), FIGURES, strict=True):
        for head, colour in zip(HEADS, ("tab:red", "tab:blue"), strict=True):
            for number, seed in enumerate(curves.values()):
                label = f"trained on the {head} head" if number == 0 else None
                axes.plot(seed[head]["aesthetic"], seed[head][name], color=colour, marker="o", ms=3, label=label)
        axes.set(xlabel="gain of the built-in score", ylabel=f"change of {name}")
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    drawing.savefig(file, dpi=110)


def main() -> None:
    """Train, or print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--heads", nargs="*", choices=HEADS, default=HEADS)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    quiet_libraries()
    for seed in () if asked.table else asked.seeds:
        for head in asked.heads:
            train(head, asked.folder, seed)
    found = {seed: {head: curve(asked.folder / f"{head}-{seed}") for head in HEADS} for seed in asked.seeds}
    whole = {seed: {h: c for h, c in by.items() if c is not None} for seed, by in found.items() if all(by.values())}
    table(whole)
    if whole:
        picture(whole, asked.folder / "robust.png")


if __name__ == "__main__":
    main()
