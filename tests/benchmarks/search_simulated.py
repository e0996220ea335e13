"""Search samplers and early stopping on simulated trials: hypervolume against compute, without training anything.

The space, the objectives and the constraints are those of experiments/mix.yaml; a trial is a formula, evaluated four
times on its way. Trials run as in a sweep, two at a time: the search (rltune.search.searcher.Search) is asked
while others run, the rules (rltune.search.stopping.Rules) see every evaluation, and a stopped trial enters
search and front with what it was by then. What it left undone goes into further trials.

Five problems. ``measured`` has the shape of what was measured on the built-in model (runs of experiments/mix.yaml and
mixtures.yaml): rewards rise with the push (learning rate, rank, K) times the steps and saturate, reward weights trade
them off with diminishing returns, and too much push loses alignment and then the prompt, later than it gains.
``crossing`` is made to be hard on early stopping: deep gradients rise late and end higher, so that learning curves
cross, what breaks breaks late, small adapters want higher learning rates, and noise is three times as large. ``apart``
has two rewards, another optimum of every knob, an option without an order, and no interaction; no sampler was chosen
by it. In two problems trials fail, each of which counts as a whole one, as it does in a sweep: in ``memory`` where rank
times K is above 160, and the rewards rise towards there; in ``fragile`` deep gradients run out of time half way,
high learning rates on one reward give NaN, and one trial in 25 is lost with its node, whatever its settings.
Variants were compared on seeds 100 to 115 (``--first-seed 100``), tables are of seeds 0 to 19.

    python tests/benchmarks/search_simulated.py --samplers random tpe nsga2 nsga3 quasi_random --seeds 20
"""

import argparse
import heapq
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rltune.config.load import load_experiment
from rltune.config.rules import Known
from rltune.pareto.hypervolume import hypervolume
from rltune.runs.layout import TrialSpec
from rltune.runs.metrics import violations
from rltune.runs.objectives import Objectives
from rltune.runs.results import TrialResult
from rltune.search.searcher import SAMPLERS, Search
from rltune.search.stopping import Rules

MIX = Path(__file__).parents[2] / "experiments" / "mix.yaml"
BASE = {"aesthetic": 5.87, "alignment": 0.877, "compressibility": -2.26, "diversity": 0.15, "faithful": 0.96}
"""Of the built-in model, and below the deviation over prompts (runs/mix)."""
DEVIATION = {"aesthetic": 0.89, "alignment": 0.018, "compressibility": 0.30, "diversity": 0.08, "faithful": 0.05}
REWARDS = ("aesthetic", "alignment", "compressibility")
SHOWN = (0.1, 0.2, 0.3, 0.4, 0.6, 1.0)
"""Shares of the compute of all trials at which hypervolumes are shown."""

Metrics = dict[str, float]


def measured(values: Mapping[str, Any], share: float) -> Metrics:
    """Return the metrics without noise of a trial with these knobs after a share of its steps."""
    weight = {name: values[f"rewards.{name}.weight"] for name in REWARDS}
    depth, rank = values["estimator.k"] / 12, values["model.lora.rank"] / 16
    push = values["optim.lr"] / 1e-3 * (0.4 + 0.6 * rank**0.5) * (0.5 + 0.5 * depth) * share**1.2
    rise, excess = 1 - np.exp(-2.5 * push), max(0.0, push - 0.7)
    gain = {name: weight[name] ** 0.8 * rise for name in REWARDS}
    return {
        "aesthetic": BASE["aesthetic"]
        + 2.4 * gain["aesthetic"] * (0.6 + 0.4 * depth)
        - 0.6 * weight["compressibility"] * rise,
        "alignment": BASE["alignment"] + 0.014 * gain["alignment"] - 0.016 * gain["aesthetic"] - 0.05 * excess,
        "compressibility": BASE["compressibility"] + 0.28 * gain["compressibility"] - 0.06 * gain["aesthetic"],
        "diversity": BASE["diversity"] * (1 - 0.5 * excess),
        "faithful": BASE["faithful"] * (1 - 0.6 * excess - 0.1 * gain["compressibility"]),
    }


def crossing(values: Mapping[str, Any], share: float) -> Metrics:
    """Return the metrics without noise of a trial with these knobs after a share of its steps."""
    weight = {name: values[f"rewards.{name}.weight"] for name in REWARDS}
    depth, rank = values["estimator.k"] / 12, np.log2(values["model.lora.rank"]) / 4
    miss = np.log(values["optim.lr"] / (1.2e-3 - 0.8e-3 * rank))  # the best rate is 1e-3 at rank 2, 4e-4 at rank 16
    height = np.exp(-1.5 * miss**2) * (0.5 + 0.3 * depth + 0.2 * rank)
    late = 0.2 + 0.5 * depth  # share of the steps at which half the rise is done
    rise = (share**3 / (share**3 + late**3)) * (1 + late**3) * height
    excess = max(0.0, miss) * share**4 * (0.6 + 0.4 * depth)
    gain = {name: rise * weight[name] / (0.3 + 0.7 * weight[name]) for name in REWARDS}
    return {
        "aesthetic": BASE["aesthetic"] + 2.0 * gain["aesthetic"] - 1.0 * gain["compressibility"] - 0.3 * excess,
        "alignment": BASE["alignment"] + 0.02 * gain["alignment"] - 0.01 * gain["aesthetic"] - 0.03 * excess,
        "compressibility": BASE["compressibility"] + 0.3 * gain["compressibility"] - 0.1 * gain["alignment"],
        "diversity": BASE["diversity"] * (1 - 0.4 * excess),
        "faithful": BASE["faithful"] * (1 - 0.3 * excess - 0.08 * gain["compressibility"]),
    }


def apart(values: Mapping[str, Any], share: float) -> Metrics:
    """Return the metrics without noise of a trial with these knobs after a share of its steps."""
    weight = {name: values[f"rewards.{name}.weight"] for name in ("aesthetic", "compressibility")}
    rate, rank = values["optim.lr"], {2: 0.6, 4: 1.0, 8: 0.8, 16: 0.5}[values["model.lora.rank"]]
    depth = 1 - 0.6 * abs(values["estimator.k"] - 3) / 9
    layers = 1.0 if values["model.lora.targets"] == "attention" else 0.75
    rise = np.exp(-0.5 * (np.log(rate / 2.5e-4) / 0.8) ** 2) * depth * rank * layers * share**0.7
    excess = max(0.0, np.log(rate / 1e-3)) * share**2
    return {
        "aesthetic": BASE["aesthetic"] + 1.8 * rise * np.sin(weight["aesthetic"] * np.pi / 2) - 0.4 * excess,
        "compressibility": BASE["compressibility"] + 0.5 * rise * weight["compressibility"] ** 0.5 - 0.1 * excess,
        "diversity": BASE["diversity"] * (1 - 0.5 * excess),
        "faithful": BASE["faithful"] * (1 - 0.1 * excess - 0.05 * rise * weight["compressibility"]),
    }


def memory(values: Mapping[str, Any], share: float) -> Metrics:
    """Return the metrics without noise of a trial with these knobs after a share of its steps, had it the memory."""
    weight = {name: values[f"rewards.{name}.weight"] for name in REWARDS}
    size = np.log(values["model.lora.rank"] * values["estimator.k"]) / np.log(160)  # 1 where memory ends
    rise = np.exp(-0.5 * (np.log(values["optim.lr"] / 7e-4) / 0.8) ** 2) * (0.2 + 0.8 * size) * share**0.7
    gain = {name: weight[name] ** 0.7 * rise for name in REWARDS}
    return {
        "aesthetic": BASE["aesthetic"] + 2.0 * gain["aesthetic"] - 0.4 * gain["compressibility"],
        "alignment": BASE["alignment"] + 0.03 * gain["alignment"] - 0.01 * gain["aesthetic"],
        "compressibility": BASE["compressibility"] + 0.4 * gain["compressibility"] - 0.1 * gain["alignment"],
        "diversity": BASE["diversity"] * (1 - 0.1 * rise),
        "faithful": BASE["faithful"] * (1 - 0.05 * gain["compressibility"]),
    }


def out_of_memory(values: Mapping[str, Any], share: float, luck: float) -> bool:
    """Whether memory ends."""
    return bool(values["model.lora.rank"] * values["estimator.k"] > 160)


def falls_over(values: Mapping[str, Any], share: float, luck: float) -> bool:
    """Whether a trial runs out of time, meets a NaN or is lost with its node; ``luck`` is uniform in [0, 1)."""
    is_late = values["estimator.k"] > 9 and share >= 0.5
    is_nan = values["optim.lr"] > 1e-3 and values["rewards.aesthetic.weight"] > 0.4
    return bool(is_late or is_nan or luck < 0.04)


@dataclass(frozen=True)
class Problem:
    """A formula in the place of training."""

    metrics: Callable[[Mapping[str, Any], float], Metrics]
    noise: float
    """What another training seed changes at the end, in deviations."""
    rewards: tuple[str, ...] = REWARDS
    changes: tuple[str, ...] = ()
    """To the experiment."""
    fails: Callable[[Mapping[str, Any], float, float], bool] = lambda values, share, luck: False
    """Whether a trial with these knobs has failed after a share of its steps; its luck is uniform in [0, 1)."""


APART = (
    "rewards={aesthetic: {weight: {simplex: true}}, compressibility: {weight: {simplex: true}}}",
    "objectives=[aesthetic, compressibility]",
    "model.lora.targets={choice: [attention, all]}",
    "optim.lr={log_float: [5.0e-5, 5.0e-3]}",
)
LARGE = "model.lora.rank={choice: [2, 4, 8, 16, 32, 64]}"
PROBLEMS = {
    "measured": Problem(measured, 0.05),
    "crossing": Problem(crossing, 0.15),
    "apart": Problem(apart, 0.1, ("aesthetic", "compressibility"), APART),
    "memory": Problem(memory, 0.05, changes=(LARGE,), fails=out_of_memory),
    "fragile": Problem(measured, 0.05, fails=falls_over),
}


@dataclass
class Trial:
    """A trial on its way."""

    spec: TrialSpec
    luck: dict[str, float]
    """Of its training seed: the part of the noise that all of its evaluations share, which grows as it trains."""
    fate: float
    step: int = 0


@dataclass
class Curve:
    """What a sweep came to."""

    steps: list[int] = field(default_factory=list)
    """Training steps of all trials when a trial ended."""
    volumes: list[float] = field(default_factory=list)
    """Hypervolume then, in deviations of the base model."""
    num_stopped: int = 0
    num_failed: int = 0
    search_s: float = 0.0

    def at(self, steps: float) -> float:
        """Return the hypervolume when so many steps were trained."""
        ended = int(np.searchsorted(self.steps, steps, side="right"))
        return self.volumes[ended - 1] if ended else 1.0


def sweep(
    problem: Problem,
    overrides: list[str],
    *,
    seed: int,
    num_trials: int,
    num_slots: int,
    search_type: Callable[..., Search] = Search,
) -> Curve:
    """Run trials until the training steps of ``num_trials`` whole ones are spent."""
    experiment = load_experiment(
        MIX, [*problem.changes, *overrides, f"search.seed={seed}", f"search.trials={num_trials}"], Known()
    )
    shared = experiment.shared
    num_steps, every = shared.optim.steps, shared.evaluate.every
    objectives = Objectives(shared.objective_names)
    search = search_type(experiment, objectives)
    rng, fates = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    base = {f"eval/{name}": value for name, value in BASE.items()}
    rules = Rules(shared, objectives, base, DEVIATION)
    scale = np.array([DEVIATION[name] for name in objectives.names])
    origin = objectives.raw_D(base)
    points, curve, spent = [np.zeros(len(scale))], Curve(), 0

    def ask() -> Trial:
        start = time.perf_counter()
        spec = search.ask()
        curve.search_s += time.perf_counter() - start
        luck = {name: float(rng.standard_normal()) for name in problem.rewards}
        return Trial(spec, luck, fates.random())

    # (step of its slot at which a trial is evaluated next, slot); a slot starts a bit later than the one before
    running = {slot: ask() for slot in range(num_slots)}
    due = [(every + slot / num_slots, slot) for slot in range(num_slots)]
    while spent < num_trials * num_steps:
        now, slot = heapq.heappop(due)
        trial = running[slot]
        trial.step += every
        spent += every
        share = trial.step / num_steps
        metrics = {f"eval/{name}": value for name, value in problem.metrics(trial.spec.values, share).items()}
        for name in problem.rewards:
            noise = 0.8 * share * trial.luck[name] + 0.6 * float(rng.standard_normal())
            metrics[f"eval/{name}"] += problem.noise * DEVIATION[name] * noise
        is_final = trial.step >= num_steps
        row = {"step": float(trial.step), "is_final": float(is_final), **metrics}
        spec, is_failed = trial.spec, problem.fails(trial.spec.values, share, trial.fate)
        reason = None if is_failed else rules.on_report(spec.id, row)
        if is_final or reason or is_failed:
            broken = violations(shared, metrics, base)
            state = "stopped" if reason else "ok"
            result = TrialResult(spec.id, state, spec.values, spec.params, row, broken, reason or "")
            if is_failed:
                result = TrialResult(spec.id, "failed", spec.values, spec.params, reason="it failed")
                spent += num_steps - trial.step
            start = time.perf_counter()
            search.tell(result)
            curve.search_s += time.perf_counter() - start
            curve.num_stopped += bool(reason)
            curve.num_failed += is_failed
            if result.is_ok and result.is_feasible:
                points.append((objectives.raw_D(metrics) - origin) / scale)
            curve.steps.append(spent)
            curve.volumes.append(hypervolume(np.array(points), np.full(len(scale), -1.0)))
            running[slot] = ask()
        heapq.heappush(due, (now + every, slot))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in SAMPLERS if name != "grid"]
    parser.add_argument("--samplers", nargs="+", choices=names, default=names)
    parser.add_argument("--problem", choices=PROBLEMS, default="measured")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--prune", nargs="+", choices=("false", "true"), default=("false", "true"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    setting = ["optim.steps=40", "evaluate.every=10", *options.overrides]
    problem = PROBLEMS[options.problem]
    budget = 40 * options.trials
    titles = "".join(f" {share:.0%} |" for share in SHOWN)
    print(f"| sampler | stopping |{titles} to random's end | trials, stopped, failed | search, s a trial |")
    print(f"|{'---|' * (len(SHOWN) + 5)}", flush=True)
    goal = None
    for sampler in dict.fromkeys(("random", *options.samplers)):
        for prune in options.prune:
            overrides = [*setting, f"search.sampler={sampler}", f"search.prune={prune}"]
            seeds = range(options.first_seed, options.first_seed + options.seeds)
            curves = [
                sweep(problem, overrides, seed=seed, num_trials=options.trials, num_slots=options.slots)
                for seed in seeds
            ]
            grid = np.arange(0, budget + 1, 10)
            low, middle, high = np.quantile([[c.at(s) for s in grid] for c in curves], [0.25, 0.5, 0.75], axis=0)
            goal = middle[-1] if goal is None else goal
            at = [int(share * (len(grid) - 1)) for share in SHOWN]
            cells = "".join(f" {middle[i]:.2f} ({low[i]:.2f} to {high[i]:.2f}) |" for i in at)
            reached = np.flatnonzero(middle >= goal)
            when = f"{grid[reached[0]] / budget:.0%}" if len(reached) else "never"
            counts = np.mean([(len(c.steps), c.num_stopped, c.num_failed) for c in curves], axis=0)
            seconds = sum(c.search_s for c in curves) / sum(len(c.steps) for c in curves)
            shown = ", ".join(f"{count:.0f}" for count in counts)
            name = "MO-ASHA" if prune == "true" else "none"
            print(f"| `{sampler}` | {name} |{cells} {when} | {shown} | {seconds:.3f} |", flush=True)


if __name__ == "__main__":
    main()
