"""A basis of LoRAs against sweeps, soups and blends, at equal reward queries: one set that slides along the front.

    OMP_NUM_THREADS=1 python tests/benchmarks/sliders.py runs/sliders             # everything; again: what is missing
    OMP_NUM_THREADS=1 python tests/benchmarks/sliders.py runs/sliders --seeds 0   # one seed; three side by side
    python tests/benchmarks/sliders.py runs/sliders --table                       # the table of what is there

On the built-in model, with ``experiments/slider.yaml``, two rewards, and ``QUERIES`` a method: one basis; a sweep's
separate LoRAs, one at each weight; two LoRAs, one a reward, mixed as a soup (``soup``), and by their predictions
(``blend``). ``basis, a third`` has a third of the queries. All are drawn from K ~ U(1, 8), so that equal queries are
equal network calls on average; the calls of each are in the table. Every point is measured on the same fresh prompts
and noise. The hypervolume is above the base model minus its standard deviation over prompts, in units of that; its
interval is over seeds, by Student's t. P(non-dominated) is the mean over a method's points of the probability that no
point of any method, nor the base model, is better by its true values. Coverage is the share of the other methods'
points that a method's points beat. ``faithful`` is the judge, its least value along the line as a share of the base's;
"where it keeps 95 %" is the hypervolume of the points where the judge has 0.95 of the base's or more. A row of images a
weight, the base model's first, is in ``line-SEED.png``.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rltune.config.experiment import RunConfig
from rltune.config.load import load_experiment
from rltune.diffusion.sampler import Sampler
from rltune.intervals import Array, half_width, standard_error
from rltune.pareto.fresh import prob_non_dominated
from rltune.pareto.hypervolume import hypervolume
from rltune.training.adapters.basis import Basis
from rltune.training.assessment import Bench, Subject, make_bench, of_checkpoint
from rltune.training.checkpoint import load_adapter, read_checkpoint_meta
from rltune.training.loop import train_run
from rltune.training.quiet import quiet_libraries
from rltune.training.reporter import FolderReporter
from rltune.training.soups import Weights, even_weights, of_point, trained_member
from tests.benchmarks.soups import picture

SLIDER = Path(__file__).parents[2] / "experiments" / "slider.yaml"
REWARDS = ("aesthetic", "compressibility")
QUERIES = 480
BATCH, POINTS, PROMPTS, IMAGES = 8, 5, 24, 1
GRID = even_weights(2, POINTS)
KEPT = 0.95
METHODS = ("basis", "basis, a third", "sweep", "soup", "blend")


def configure(kind: str, weights: Weights, queries: int, seed: int) -> RunConfig:
    """The experiment of one training run."""
    steps = queries // BATCH
    changes: dict[str, Any] = {"model.adapter.kind": kind, "optim.steps": steps, "seed": seed}
    changes |= {"evaluate.every": steps, "evaluate.prompts": 4, "model.lora.rank": 4}
    changes |= {f"rewards.{name}.weight": share for name, share in zip(REWARDS, weights, strict=True)}
    overrides = [f"{where}={json.dumps(value)}" for where, value in changes.items()]
    return load_experiment(SLIDER, overrides=overrides).concrete({})


def train(config: RunConfig, folder: Path) -> Path:
    """The checkpoint of a run that was trained now or before."""
    if not list(folder.glob("samples/step-*.json")):
        reporter = FolderReporter(folder / "checkpoints")
        train_run(config, trial_dir=folder, base_dir=folder.parent / "base", reporter=reporter)
    return max((folder / "checkpoints").glob("step-*"))


def at_mix(config: RunConfig, checkpoint: Path, weights: Weights, sampler: Sampler) -> Sampler:
    """Put a basis at some weights on a model."""
    Basis(config, weights).restore(sampler.model, load_adapter(checkpoint))
    return sampler


def subjects(bench: Bench, folder: Path, seed: int) -> Iterator[tuple[str, Weights, Subject, int]]:
    """Train what is missing, and yield every point: method, weights, what draws it, network calls of its method."""
    even: Weights = (0.5, 0.5)

    def run(kind: str, weights: Weights, queries: int, name: str) -> tuple[RunConfig, Path, int]:
        config = configure(kind, weights, queries, seed)
        checkpoint = train(config, folder / f"loras-{seed}" / name)
        return config, checkpoint, read_checkpoint_meta(checkpoint).progress.calls

    for method, queries in (("basis", QUERIES), ("basis, a third", QUERIES // 3)):
        config, checkpoint, calls = run("basis", even, queries, method.replace(", ", "-").replace(" ", "-"))
        for weights in GRID:
            yield method, weights, Subject(method, partial(at_mix, config, checkpoint, weights)), calls
    swept = {w: run("lora", w, QUERIES // POINTS, f"sweep-{w[0]:g}") for w in GRID}
    for weights, (config, checkpoint, _) in swept.items():
        subject = Subject("sweep", of_checkpoint(config, checkpoint, 1.0))
        yield "sweep", weights, subject, sum(calls for _, _, calls in swept.values())
    ends = [run("lora", end, QUERIES // 2, f"end-{end[0]:g}") for end in ((1.0, 0.0), (0.0, 1.0))]
    loras = [trained_member(bench.run.model, config, checkpoint) for config, checkpoint, _ in ends]
    for method, how in (("soup", "exact"), ("blend", "predictions")):
        for weights in GRID:
            used = [i for i, weight in enumerate(weights) if weight]
            mixed = of_point([loras[i] for i in used], tuple(weights[i] for i in used), how)  # type: ignore[arg-type]
            yield method, weights, Subject(method, mixed), sum(calls for _, _, calls in ends)


def measure(seed: int, folder: Path) -> None:
    """Measure what is missing of a seed; a line of its ``points-SEED.jsonl`` each."""
    file = folder / f"points-{seed}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    config = configure("lora", (0.5, 0.5), QUERIES, seed)
    evaluate = config.evaluate.model_copy(update={"prompts": PROMPTS, "images_per_prompt": IMAGES})
    bench = make_bench(config.model_copy(update={"evaluate": evaluate}), "fresh")
    done = {(row["method"], tuple(row["weights"])) for row in read(file)}
    for method, weights, subject, calls in subjects(bench, folder, seed):
        if (method, weights) in done:
            continue
        base, row = bench.assess([subject])
        values = {name: values_P.tolist() for name, values_P in row.values.items()}
        about = {"base": {name: values_P.tolist() for name, values_P in base.values.items()}, "calls": calls}
        with file.open("a") as lines:  # what is there by then is read if a later one fails
            lines.write(json.dumps({"method": method, "weights": weights, "values": values, **about}) + "\n")
        print(f"seed {seed} {method} {weights}", flush=True)
    line = folder / f"line-{seed}.png"
    if not line.is_file():
        basis = configure("basis", (0.5, 0.5), QUERIES, seed)
        checkpoint = train(basis, folder / f"loras-{seed}" / "basis")
        picture(bench, [partial(at_mix, basis, checkpoint, weights) for weights in GRID]).save(line)


def read(file: Path) -> list[dict[str, Any]]:
    """The points of a seed that are there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def figures(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each method's figures of one seed."""
    base_PD = np.array([rows[0]["base"][name] for name in REWARDS]).T
    unit_D = base_PD.std(axis=0, ddof=1)
    gains_PND = np.stack([(np.array([row["values"][n] for n in REWARDS]).T - base_PD) / unit_D for row in rows], axis=1)
    places_ND = gains_PND.mean(axis=0)
    probable_N = prob_non_dominated(np.concatenate([gains_PND, np.zeros_like(gains_PND[:, :1])], axis=1))
    judge_N = np.array([np.mean(row["values"]["faithful"]) / np.mean(row["base"]["faithful"]) for row in rows])
    found = {}
    for method in METHODS:
        own = np.array([row["method"] == method for row in rows])
        kept = own & (judge_N >= KEPT)
        beaten = [(places_ND[own] >= other_D).all(axis=1).any() for other_D in places_ND[~own]]
        found[method] = {
            "hypervolume": float(hypervolume(places_ND[own] + 1.0, np.zeros(2))),
            "P(non-dominated)": float(np.mean([p for p, is_own in zip(probable_N, own, strict=False) if is_own])),
            "coverage": float(np.mean(beaten)),
            "faithful": float(judge_N[own].min()),
            "kept": float(hypervolume(places_ND[kept] + 1.0, np.zeros(2))) if kept.any() else 0.0,
            "calls": float(next(row["calls"] for row in rows if row["method"] == method)),
        }
    return found


def table(folder: Path) -> None:
    """Print the means over the seeds that are whole."""
    whole = [rows for file in sorted(folder.glob("points-?.jsonl")) if len(rows := read(file)) == POINTS * len(METHODS)]
    if not whole:
        print("no seed is whole yet")
        return
    found = [figures(rows) for rows in whole]
    print("| method | hypervolume | where it keeps 95 % | P(non-dominated) | coverage | faithful | network calls |")
    print("|---|---|---|---|---|---|---|")
    for method in METHODS:
        columns = {name: np.array([seed[method][name] for seed in found]) for name in found[0][method]}
        volumes = " | ".join(interval(columns[name]) for name in ("hypervolume", "kept"))
        rest = [f"{columns[name].mean():.2f}" for name in ("P(non-dominated)", "coverage", "faithful")]
        print(f"| {method} | {volumes} | {' | '.join(rest)} | {columns['calls'].mean():.0f} |")
    print(f"\n{len(found)} seeds")


def interval(values_S: Array) -> str:
    """A mean over seeds and half the width of its 95 % interval."""
    half = half_width(standard_error(values_S), len(values_S) - 1) if len(values_S) > 1 else None
    return f"{values_S.mean():.2f}" + ("" if half is None else f" ± {half:.2f}")


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    quiet_libraries()
    for seed in () if asked.table else asked.seeds:
        measure(seed, asked.folder)
    table(asked.folder)


if __name__ == "__main__":
    main()
