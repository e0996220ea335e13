"""Every estimator at the same number of reward queries: what it gains, what it costs, what an independent judge says.

    OMP_NUM_THREADS=1 python tests/benchmarks/estimators_compared.py runs/estimators --train 0/2    # two side by side,
    OMP_NUM_THREADS=1 python tests/benchmarks/estimators_compared.py runs/estimators --train 1/2    # half the runs each
    python tests/benchmarks/estimators_compared.py runs/estimators                                  # tables and plots

Trains ``experiments/estimators/NAME.yaml`` for two rewards and three seeds each; what has ended is not run again.
Gains are over the base model, on held-out prompts, paired by prompt and noise. Intervals are 95 % over prompts and
seeds together, by Student's t with Satterthwaite's degrees of freedom (``rltune.intervals``); bands of the pictures are
over the three seeds. The queries that a method needs to reach DDPO's final gain are read off its curve, straight lines
between evaluations.

S: seeds. P: prompts. E: evaluations.
"""

import argparse
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot as plt

from rltune.config.experiment import RunConfig
from rltune.config.load import load_experiment
from rltune.intervals import half_width, over_prompts_and_seeds, standard_error
from rltune.runs.rows import read_metrics
from rltune.training.loop import train_run
from rltune.training.quiet import quiet_libraries
from rltune.training.reporter import FolderReporter

EXPERIMENTS = Path(__file__).parents[2] / "experiments" / "estimators"
METHODS = ("alignprop", "draft", "draft_lv", "refl", "drtune", "ddpo", "dpok")
REWARDS = ("aesthetic", "compressibility")
SEEDS = (0, 1, 2)
JUDGE = "faithful_exact"
KEPT = 0.95
"""Share of the base model's judgement that a gain must leave to count as honest."""
REFERENCE = "ddpo"
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One run: the start, then every evaluation."""

    queries_E: Array
    calls_E: Array
    cpu_s_E: Array
    """CPU seconds of training, evaluations left out."""
    values_E: tuple[Mapping[str, Mapping[str, list[float]]], ...]
    """``eval`` and ``gain`` -> reward or judge -> a value a held-out prompt; of the evaluations, the start left out."""

    def gain_E(self, name: str) -> Array:
        """Mean gain at the start, 0, and at every evaluation."""
        return np.array([0.0, *(float(np.mean(values["gain"][name])) for values in self.values_E)])

    def last_P(self, kind: str, name: str) -> Array:
        """A value a held-out prompt at the end."""
        return np.array(self.values_E[-1][kind][name])

    def honest_gain(self, name: str, kept: float) -> float:
        """Greatest mean gain of an evaluation where the judge still scores ``kept`` of what the base model gets."""
        base = float(np.mean(self.last_P("eval", JUDGE) - self.last_P("gain", JUDGE)))
        judged_E = [base, *(float(np.mean(values["eval"][JUDGE])) for values in self.values_E)]
        return max(gain for gain, judged in zip(self.gain_E(name), judged_E, strict=True) if judged >= kept * base)

    def queries_to(self, name: str, gain: float) -> float:
        """Reward queries until the mean gain is first reached, infinite if it never is."""
        gain_E = self.gain_E(name)
        for i in range(1, len(gain_E)):
            if gain_E[i] >= gain:
                share = (gain - gain_E[i - 1]) / (gain_E[i] - gain_E[i - 1])
                return float(self.queries_E[i - 1] + share * (self.queries_E[i] - self.queries_E[i - 1]))
        return float("inf")


def configure(method: str, reward: str, seed: int) -> RunConfig:
    """The experiment of one run."""
    changes = [f"seed={seed}"] + [f"rewards.{name}.weight={float(name == reward)}" for name in REWARDS]
    return load_experiment(EXPERIMENTS / f"{method}.yaml", [*changes, "resources.threads_per_worker=1"]).concrete({})


def folder_of(root: Path, method: str, reward: str, seed: int) -> Path:
    """Where a run is."""
    return root / reward / f"{method}-{seed}"


def train(root: Path, method: str, reward: str, seed: int) -> None:
    """Train one run if it has not ended before, from its last checkpoint."""
    folder = folder_of(root, method, reward, seed)
    if (folder / "done").exists():
        return
    reporter = FolderReporter(folder / "checkpoints")
    config = configure(method, reward, seed)
    train_run(config, trial_dir=folder, base_dir=root / "base", reporter=reporter, resume_from=reporter.latest())
    (folder / "done").touch()
    curve = read(folder)
    print(
        f"{reward} {method} seed {seed}: {curve.queries_E[-1]:.0f} queries, {curve.gain_E(reward)[-1]:+.3f}", flush=True
    )


def read(folder: Path) -> Curve:
    """Read one finished run."""
    rows = read_metrics(folder / "metrics.jsonl")
    seconds = np.cumsum([row["cpu_s"] for row in rows])
    due = [i for i, row in enumerate(rows) if f"gain/{REWARDS[0]}" in row]
    values = [json.loads((folder / "samples" / f"step-{int(rows[i]['step']):06d}.json").read_text()) for i in due]
    return Curve(
        queries_E=np.array([0.0, *(rows[i]["queries"] for i in due)]),
        calls_E=np.array([0.0, *(rows[i]["calls"] for i in due)]),
        cpu_s_E=np.array([0.0, *(seconds[i] for i in due)]),
        values_E=tuple(values),
    )


def table(reward: str, curves: Mapping[str, list[Curve]]) -> str:
    """The methods of one reward, a row each."""
    final = {method: float(np.mean([c.gain_E(reward)[-1] for c in runs])) for method, runs in curves.items()}
    goal = final[REFERENCE]
    reference = float(np.mean([c.queries_E[-1] for c in curves[REFERENCE]]))
    lines = [
        f"| {reward} | queries | network calls | training (CPU s) | gain | gain while the judge "
        f"keeps {KEPT:.0%} | faithful_exact | diversity "
        f"| queries to {REFERENCE}'s {goal:+.3f} | times fewer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, runs in curves.items():
        gain, half = over_prompts_and_seeds(np.stack([c.last_P("gain", reward) for c in runs]))
        costs = ("queries_E", "calls_E", "cpu_s_E")
        cells = [f"{np.mean([getattr(c, cost)[-1] for c in runs]):,.0f}" for cost in costs]
        kept = []
        for judge in (JUDGE, "diversity"):
            after = float(np.mean([c.last_P("eval", judge).mean() for c in runs]))
            base = after - float(np.mean([c.last_P("gain", judge).mean() for c in runs]))
            kept.append(f"{base:.3f} -> {after:.3f} ({after / base:.0%})")
        needed = [c.queries_to(reward, goal) for c in runs]
        if method == REFERENCE:
            last = f"{reference:,.0f} | 1" if goal > 0 else " | "
        elif goal <= 0:
            last = f"{REFERENCE} gained nothing | "
        elif np.isinf(needed).any():
            last = f"not reached by {np.isinf(needed).sum()} of {len(needed)} | "
        else:
            times = sorted(reference / n for n in needed)
            last = f"{np.mean(needed):,.0f} | {reference / np.mean(needed):.0f} ({times[0]:.0f} to {times[-1]:.0f})"
        honest = float(np.mean([c.honest_gain(reward, KEPT) for c in runs]))
        cells += [f"{gain:+.3f} ± {half:.3f}", f"{honest:+.3f}", *kept, last]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(root: Path, reward: str, curves: Mapping[str, list[Curve]]) -> None:
    """Held-out gain against queries, network calls and time, and the judge against the gain: ``REWARD.png``."""
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.2), layout="constrained")
    for colour, (method, runs) in zip(itertools.cycle(plt.cm.tab10.colors), curves.items(), strict=False):
        gain_SE = np.stack([c.gain_E(reward) for c in runs])
        mean_E = gain_SE.mean(0)
        spread_E = np.array([half_width(standard_error(gain_S), len(runs) - 1) for gain_S in gain_SE.T])
        for axis, what in zip(axes, ("queries", "calls", "cpu_s"), strict=False):
            x_E = np.mean([getattr(c, f"{what}_E") for c in runs], axis=0)
            axis.plot(x_E, mean_E, color=colour, label=method)
            axis.fill_between(x_E, mean_E - spread_E, mean_E + spread_E, color=colour, alpha=0.15)
        judged_SE = [[float(np.mean(v["eval"][JUDGE])) for v in c.values_E] for c in runs]
        base = float(np.mean(runs[0].last_P("eval", JUDGE) - runs[0].last_P("gain", JUDGE)))
        axes[3].plot(mean_E, [base, *np.mean(judged_SE, axis=0)], color=colour, marker=".")
    for axis, label in zip(
        axes, ("reward queries", "network calls (image x pass)", "training, CPU seconds"), strict=False
    ):
        axis.set_xlabel(label)
        axis.set_ylabel(f"gain of {reward} on held-out prompts")
    axes[3].set_xlabel(f"gain of {reward}")
    axes[3].set_ylabel("pictures exactly right (judge)")
    axes[0].legend()
    figure.suptitle(f"{reward}: mean of {len(SEEDS)} seeds, bands 95 % over seeds (Student's t)")
    figure.savefig(root / f"{reward}.png", dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", metavar="I/N", help="train part I of N of the runs instead of printing")
    args = parser.parse_args()
    quiet_libraries()
    # seed by seed, so that what is there is comparable whenever it is stopped
    runs = [(method, reward, seed) for seed in SEEDS for reward in REWARDS for method in METHODS]
    if args.train:
        part, count = (int(number) for number in args.train.split("/"))
        for method, reward, seed in runs[part::count]:
            train(args.folder, method, reward, seed)
        return
    for reward in REWARDS:
        curves = {method: [read(folder_of(args.folder, method, reward, seed)) for seed in SEEDS] for method in METHODS}
        print(table(reward, curves), end="\n\n")
        plot(args.folder, reward, curves)


if __name__ == "__main__":
    main()
