"""Search samplers on simulated trials: hypervolume against the number of trials, without training anything.

The space, the objectives and the constraints are those of experiments/mix.yaml; a trial is a formula. It has the shape
of what was measured on the built-in model: rewards rise with the push (learning rate, rank, K) and saturate, reward
weights trade them off with diminishing returns, too much push loses alignment and then the prompt, and the best
learning rate depends on rank and K. The search is the one that a sweep uses (rltune.orchestration.search.Search).

    python tests/benchmarks/search_simulated.py --samplers random tpe nsga2 nsga3 quasi_random --seeds 20
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from rltune.config.clashes import Known
from rltune.config.load import load_experiment
from rltune.orchestration.objectives import Objectives, violations
from rltune.orchestration.results import TrialResult
from rltune.orchestration.search import SAMPLERS, Search
from rltune.pareto.hypervolume import hypervolume

MIX = Path(__file__).parents[2] / "experiments" / "mix.yaml"
BASE = {"aesthetic": 5.87, "alignment": 0.877, "compressibility": -2.26, "diversity": 0.15, "faithful": 0.96}
"""Of the built-in model, and below the deviation over prompts (runs/mix)."""
DEVIATION = {"aesthetic": 0.89, "alignment": 0.018, "compressibility": 0.30}
NOISE = 0.05
"""Of a deviation: what another training seed changes."""
SHOWN = (8, 16, 24, 32, 48)


def simulate(values: dict[str, Any], rng: np.random.Generator) -> dict[str, float]:
    """Return the metrics of a trial with these knobs."""
    weight = {name: values[f"rewards.{name}.weight"] for name in DEVIATION}
    depth, rank = values["estimator.k"] / 12, values["model.lora.rank"] / 16
    push = values["optim.lr"] / 1e-3 * (0.4 + 0.6 * rank**0.5) * (0.5 + 0.5 * depth)
    rise, excess = 1 - np.exp(-2.5 * push), max(0.0, push - 0.7)
    gain = {name: weight[name] ** 0.8 * rise for name in DEVIATION}
    metrics = {
        "aesthetic": BASE["aesthetic"]
        + 2.4 * gain["aesthetic"] * (0.6 + 0.4 * depth)
        - 0.6 * weight["compressibility"],
        "alignment": BASE["alignment"] + 0.014 * gain["alignment"] - 0.016 * gain["aesthetic"] - 0.05 * excess,
        "compressibility": BASE["compressibility"] + 0.28 * gain["compressibility"] - 0.06 * gain["aesthetic"],
        "diversity": BASE["diversity"] * (1 - 0.5 * excess),
        "faithful": BASE["faithful"] * (1 - 0.6 * excess - 0.1 * gain["compressibility"]),
    }
    noisy = {name: metrics[name] + NOISE * DEVIATION[name] * rng.standard_normal() for name in DEVIATION}
    return metrics | noisy


def curve(sampler: str, seed: int, num_trials: int) -> tuple[np.ndarray, float]:
    """Return the hypervolume after each trial, in deviations of the base model, and the seconds of search."""
    overrides = [f"search={{sampler: {sampler}, seed: {seed}, trials: {num_trials}}}"]
    experiment = load_experiment(MIX, overrides, Known())
    shared = experiment.shared
    objectives = Objectives(shared.objective_names)
    search = Search(experiment, objectives)
    rng = np.random.default_rng(seed)
    base = {f"eval/{name}": value for name, value in BASE.items()}
    scale = np.array([DEVIATION[name] for name in objectives.names])
    origin = np.array([BASE[name] for name in objectives.names])
    points, volumes, search_s = [np.zeros(len(scale))], [], 0.0
    for _ in range(num_trials):
        start = time.perf_counter()
        spec = search.ask()
        search_s += time.perf_counter() - start
        metrics = {f"eval/{name}": float(value) for name, value in simulate(dict(spec.values), rng).items()}
        broken = violations(shared, metrics, base)
        result = TrialResult(spec.id, "ok", spec.values, spec.params, metrics=metrics, constraints=broken)
        start = time.perf_counter()
        search.tell(result)
        search_s += time.perf_counter() - start
        if result.is_feasible:
            points.append((objectives.raw_D(metrics) - origin) / scale)
        volumes.append(hypervolume(np.array(points), np.full(len(scale), -1.0)))
    return np.array(volumes), search_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in SAMPLERS if name != "grid"]
    parser.add_argument("--samplers", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=48)
    options = parser.parse_args()
    shown = [count for count in SHOWN if count < options.trials] + [options.trials]
    titles = "".join(f" {count} trials |" for count in shown)
    print(f"| sampler |{titles} trials to random's end | share | search, s a trial |\n|{'---|' * (len(shown) + 4)}")
    goal = None
    for sampler in dict.fromkeys(("random", *options.samplers)):
        runs = [curve(sampler, seed, options.trials) for seed in range(options.seeds)]
        curves = np.array([volumes for volumes, _ in runs])
        low, middle, high = np.quantile(curves, [0.25, 0.5, 0.75], axis=0)
        goal = middle[-1] if goal is None else goal
        cells = "".join(f" {middle[n - 1]:.2f} ({low[n - 1]:.2f} to {high[n - 1]:.2f}) |" for n in shown)
        reached = np.flatnonzero(middle >= goal)
        when = str(reached[0] + 1) if len(reached) else "never"
        share = f"{(reached[0] + 1) / options.trials:.0%}" if len(reached) else "-"
        seconds = np.mean([search_s for _, search_s in runs]) / options.trials
        print(f"| `{sampler}` |{cells} {when} | {share} | {seconds:.3f} |", flush=True)


if __name__ == "__main__":
    main()
