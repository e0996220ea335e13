"""Fronts of soups against fronts of training: how much of the swept front do mixed single-reward LoRAs cover?

    OMP_NUM_THREADS=1 python tests/benchmarks/soups.py runs/soups                 # everything; again: what is missing
    OMP_NUM_THREADS=1 python tests/benchmarks/soups.py runs/soups --seeds 0       # one seed; three side by side
    python tests/benchmarks/soups.py runs/soups --table                           # the table of what is there

On the built-in model, from two rewards and from three: a LoRA is trained on each reward alone, and one on every mixture
of a lattice of weights, all with the settings of ``experiments/mix.yaml`` fixed at ``SETTINGS``. The soups of the
former (``exact``, ``predictions``, ``draw``) are measured at the weights of the lattice, ``exact`` at those of a finer
one too, and the latter as they are: on the same fresh prompts and noise. A hypervolume is over the rewards, above the
base model minus its standard deviation over prompts, in units of that, and with the base model's own volume taken off;
its interval is over seeds, by Student's t, and so is that of the difference from the trained front. Beside it stand the
images that rewards have scored in training for it: what it costs. ``ends`` are the LoRAs of single rewards unmixed.
``line-SEED.png`` shows two LoRAs' soups from one end to the other.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from rltune.config.experiment import RunConfig
from rltune.config.load import load_experiment
from rltune.diffusion.lora import remove_lora
from rltune.intervals import half_width, standard_error
from rltune.pareto.hypervolume import hypervolume, reference_point
from rltune.training.assessment import Bench, Subject, make_bench, of_checkpoint
from rltune.training.evaluation import draw_images, to_uint8
from rltune.training.loop import train_run
from rltune.training.model_cache import ModelCache
from rltune.training.quiet import quiet_libraries
from rltune.training.reporter import FolderReporter
from rltune.training.soups import Method, Weights, even_weights, of_point, trained_member

MIX = Path(__file__).parents[2] / "experiments" / "mix.yaml"
REWARDS = ("aesthetic", "alignment", "compressibility")
SETS = (("aesthetic", "compressibility"), REWARDS)
SETTINGS = {"model.lora.rank": 8, "estimator.k": 6, "optim.lr": 7e-4}
METHODS: tuple[Method, ...] = ("exact", "predictions", "draw")
TRAINED_POINTS, FINE_POINTS = {2: 5, 3: 3}, {2: 9, 3: 5}
"""Rewards -> points along an edge."""
FRONTS = ("ends", "trained", *METHODS, "exact, finer")
PROMPTS, IMAGES = 24, 1
Key = tuple[str, Weights]


def configure(weights: Weights, seed: int) -> RunConfig:
    """The experiment of one LoRA."""
    changes: dict[str, Any] = {**SETTINGS, "seed": seed, "evaluate.every": 1000, "evaluate.prompts": 4}
    changes |= {f"rewards.{name}.weight": share for name, share in zip(REWARDS, weights, strict=True)}
    overrides = [f"{where}={json.dumps(value)}" for where, value in changes.items()]
    return load_experiment(MIX, overrides=overrides).concrete({})


def train(config: RunConfig, folder: Path) -> Path:
    """The checkpoint of a LoRA that was trained now or before."""
    reporter = FolderReporter(folder / "checkpoints")
    if not list(folder.glob("samples/step-*.json")):
        train_run(config, trial_dir=folder, base_dir=folder.parent / "base", reporter=reporter)
    (last,) = sorted((folder / "checkpoints").glob("step-*"))[-1:]
    return last


def measure(seed: int, folder: Path) -> None:
    """Measure what is missing of a seed; a line of its ``points-SEED.jsonl`` each."""
    file, wanted = folder / f"points-{seed}.jsonl", list(wanted_points())
    folder.mkdir(parents=True, exist_ok=True)
    bench = bench_of(seed)

    def trained(weights: Weights) -> Path:
        return train(configure(weights, seed), folder / f"loras-{seed}" / ",".join(f"{share:.3g}" for share in weights))

    for method, weights in wanted:
        if method == "trained":
            trained(weights)
    loras = [trained_member(bench.run.model, configure(end, seed), trained(end)) for end in even_weights(3, 2)]
    done = {key for key, _ in read(file)}
    left: dict[Key, Subject] = {}
    for method, weights in wanted:
        if method == "trained":
            left[method, weights] = Subject(method, of_checkpoint(configure(weights, seed), trained(weights), 1.0))
        else:
            used = [i for i, weight in enumerate(weights) if weight]
            mixed = of_point([loras[i] for i in used], tuple(weights[i] for i in used), method)
            left[method, weights] = Subject(method, mixed)
    left = {key: subject for key, subject in left.items() if key not in done}
    measured = bench.assess(left.values())
    base = next(measured)
    spread = {name: float(values_P.std(ddof=1)) for name, values_P in base.values.items()}
    about = {"spread": spread, "mean": {figure.name: figure.value for figure in base.figures}}
    (folder / f"base-{seed}.json").write_text(json.dumps(about))
    for (method, weights), row in zip(left, measured, strict=True):
        figures = {figure.name: figure.value for figure in row.figures}
        with file.open("a") as lines:  # what is there by then is read if a later one fails
            lines.write(json.dumps({"method": method, "weights": weights, "figures": figures}) + "\n")
        print(f"seed {seed} {method} {weights}: {figures}", flush=True)
    two = [loras[REWARDS.index(name)] for name in SETS[0]]
    line = [of_point(two, weights, "exact") for weights in even_weights(2, 5)]
    picture(bench, line).save(folder / f"line-{seed}.png")


def points_of(rewards: Sequence[str], front: str) -> list[tuple[Method | Literal["trained"], Weights]]:
    """The points of a front, by their weights of all rewards; a soup of one LoRA is that LoRA."""
    num = len(rewards)
    kinds: dict[str, tuple[Any, int]] = {"ends": ("trained", 2), "exact, finer": ("exact", FINE_POINTS[num])}
    method, points = kinds.get(front, (front, TRAINED_POINTS[num]))
    found = []
    for weights in even_weights(num, points):
        shares = dict(zip(rewards, weights, strict=True))
        whole = tuple(shares.get(name, 0.0) for name in REWARDS)
        found.append(("trained" if max(whole) == 1 else method, whole))
    return found


def wanted_points() -> Iterator[Any]:
    """Every point of every front, once."""
    yield from dict.fromkeys(point for rewards in SETS for front in FRONTS for point in points_of(rewards, front))


def bench_of(seed: int) -> Bench:
    """Prompts that nothing was trained on, with fresh noise."""
    config = configure((1 / 3, 1 / 3, 1 / 3), seed)
    evaluate = config.evaluate.model_copy(update={"prompts": PROMPTS, "images_per_prompt": IMAGES, "judges": ()})
    return make_bench(config.model_copy(update={"evaluate": evaluate}), "fresh", cache=ModelCache())


def picture(bench: Bench, prepares: Sequence[Any], num_images: int = 8) -> Image.Image:
    """A row of images for each point, the base model's first."""
    run, images = bench.run, replace(bench.images, images_per_prompt=1)
    rows = []
    for prepare in (None, *prepares):
        run.model.pipeline.unload_lora_weights()
        remove_lora(run.model.network)
        sampler = run.sampler if prepare is None else prepare(run.sampler)
        drawn_NHW3 = to_uint8(draw_images(sampler, images, range(num_images), run.workers.device))
        rows.append(np.concatenate(list(drawn_NHW3), axis=1))
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST)


def read(file: Path) -> Iterator[tuple[Key, dict[str, float]]]:
    """Every point that was measured."""
    for line in file.read_text().splitlines() if file.is_file() else ():
        row = json.loads(line)
        yield (row["method"], tuple(row["weights"])), row["figures"]


def volume(rewards: Sequence[str], folder: Path, seed: int, front: str) -> float:
    """The hypervolume of a front's points and the base model, without the base model's own."""
    base = json.loads((folder / f"base-{seed}.json").read_text())
    mean_D, spread_D = (np.array([base[kind][name] for name in rewards]) for kind in ("mean", "spread"))
    measured = dict(read(folder / f"points-{seed}.jsonl"))
    rows = [[measured[point][name] for name in rewards] for point in points_of(rewards, front)]
    points_ND = (np.array([*rows, mean_D]) - mean_D) / spread_D
    return hypervolume(points_ND, reference_point(np.zeros(len(rewards)), np.ones(len(rewards)))) - 1.0


def table(folder: Path, seeds: Sequence[int]) -> None:
    """Print each front's hypervolume over seeds beside what was trained for it, and how far the trained front's is."""
    print("| rewards | front | points | images scored in training | hypervolume | against trained | per 1,000 images |")
    print("|---|---|---|---|---|---|---|")
    optim = configure(even_weights(3, 2)[0], 0).optim
    for rewards in SETS:
        trained = np.array([volume(rewards, folder, seed, "trained") for seed in seeds])
        for front in FRONTS:
            found = np.array([volume(rewards, folder, seed, front) for seed in seeds])
            points = points_of(rewards, front)
            images = optim.steps * optim.batch * sum(method == "trained" for method, _ in points)
            against = "" if front == "trained" else mean_of(found - trained, "+")
            cells = [", ".join(rewards), front, str(len(points)), f"{images:,}", mean_of(found), against]
            print(f"| {' | '.join([*cells, mean_of(1000 * found / images)])} |")


def mean_of(values_S: np.ndarray, sign: str = "") -> str:
    """The mean over seeds with half the width of its interval."""
    half = half_width(standard_error(values_S), len(values_S) - 1)
    return f"{values_S.mean():{sign}.2f}" + ("" if half is None else f" ± {half:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="train and measure nothing")
    options = parser.parse_args()
    quiet_libraries()
    if not options.table:
        for seed in options.seeds:
            measure(seed, options.folder)
    table(options.folder, options.seeds)


if __name__ == "__main__":
    main()
