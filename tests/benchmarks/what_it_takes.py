"""What does it take to align a model? One table over everything that can be optimised, at equal reward queries.

    OMP_NUM_THREADS=1 python tests/benchmarks/what_it_takes.py runs/what-it-takes             # again: what is missing
    OMP_NUM_THREADS=1 python tests/benchmarks/what_it_takes.py runs/what-it-takes --seeds 0   # one seed
    python tests/benchmarks/what_it_takes.py runs/what-it-takes --table    # the table of what is there

On the built-in model with the sampler, the two rewards and the learning rate of ``experiments/slider.yaml``, at equal
weights. ``QUERIES`` scored images a method: 60 steps of 8 for what is trained; for words as many of the templates of
``experiments/words.yaml`` as they allow, drawn at random and measured on the prompts and noise of a search, the best by
the mean gain; for noise so many steps from the noise of each image that is measured. Everything is then measured on the
same fresh prompts and noise. A mean gain is in standard deviations of the base model over prompts. Intervals are over
seeds, by Student's t. ``numbers`` are those that are optimised, for noise those of an image; seconds are CPU seconds of
one thread for training or search, without the measurement.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rltune.config.distributions import Choice
from rltune.config.experiment import RunConfig
from rltune.config.load import load_experiment
from rltune.diffusion.chain import StepNoise
from rltune.diffusion.sampler import Chain, Sampler
from rltune.intervals import Array, half_width, standard_error
from rltune.training.assessment import Bench, Subject, make_bench, of_checkpoint
from rltune.training.loop import train_run
from rltune.training.noise import Objective, optimise_noise
from rltune.training.quiet import quiet_libraries
from rltune.training.reporter import FolderReporter
from rltune.training.setup import build_run

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
REWARDS = ("aesthetic", "compressibility")
QUERIES, BATCH, PROMPTS, IMAGES = 480, 8, 24, 2
RANKS = (1, 4, 16)
CONDITIONING_LR = 5e-2
"""That of ``experiments/conditioning.yaml``: a number is no weight."""
METHODS = ("nothing", "words", "noise", "conditioning", *(f"LoRA, rank {rank}" for rank in RANKS), "basis, rank 4 each")
COLUMNS = ("mean gain", "aesthetic", "compressibility", "faithful", "diversity", "domination", "collapse")


def configure(seed: int, **changes: Any) -> RunConfig:
    """The experiment, with dotted settings changed; ``__`` stands for the dot."""
    changes = {"seed": seed, "model.adapter.kind": "lora", "evaluate.prompts": 4, **changes}
    overrides = [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in changes.items()]
    return load_experiment(EXPERIMENTS / "slider.yaml", overrides=overrides).concrete({})


@dataclass(frozen=True)
class Method:
    """How something is optimised."""

    prepare: Callable[[], Subject]
    """Trains or searches, and returns what draws with the result."""
    numbers: Callable[[], int]


def trained(config: RunConfig, folder: Path) -> Subject:
    """Train, and return what draws with the last checkpoint."""
    reporter = FolderReporter(folder / "checkpoints")
    train_run(config, trial_dir=folder, base_dir=folder.parent / "base", reporter=reporter)
    return Subject(folder.name, of_checkpoint(config, max((folder / "checkpoints").glob("step-*")), 1.0))


def num_parameters(config: RunConfig) -> int:
    """How many numbers a training changes."""
    run = build_run(config)
    run.adapter.start(run.model, seed=0)
    return sum(parameter.numel() for parameter in run.adapter.parameters(run.model.network))


def mean_gain(values: Mapping[str, Array], base: Mapping[str, Array]) -> float:
    """The mean over rewards and prompts, in standard deviations of the base model over prompts."""
    return float(np.mean([np.mean(values[name] - base[name]) / np.std(base[name], ddof=1) for name in REWARDS]))


def searched_words(seed: int) -> Subject:
    """Measure templates at random as a search would, and return what draws with the best."""
    experiment = load_experiment(EXPERIMENTS / "words.yaml")
    choices = {path: found.options for path, found in experiment.space.items() if isinstance(found, Choice)}
    assert len(choices) == len(experiment.space)
    every = list(itertools.product(*choices.values()))
    chosen = np.random.default_rng(seed).permutation(len(every))[: QUERIES // (PROMPTS * IMAGES)]
    configs = [experiment.concrete(dict(zip(choices, every[number], strict=True))) for number in chosen]
    bench = make_bench(measured_on(configs[0], seed), "search")
    base, *rows = bench.assess([Subject(str(i), words(config)) for i, config in enumerate(configs)])
    gains = [mean_gain(row.values, base.values) for row in rows]
    return Subject("words", words(configs[int(np.argmax(gains))]))


def words(config: RunConfig) -> Callable[[Sampler], Sampler]:
    """What draws with the words of an experiment."""

    def prepare(sampler: Sampler) -> Sampler:
        from rltune.training.adapters.prompt import Words

        Words(config).start(sampler.model, seed=0)
        return sampler

    return prepare


@dataclass(frozen=True)
class FromOptimisedNoise(Sampler):
    """A sampler that starts each image from the noise that is best for it."""

    objective: Objective = field(kw_only=True)

    def open(
        self, prompts: Sequence[str], x_BCHW: Tensor, noise: StepNoise | None, strengths_BM: Tensor | None = None
    ) -> Chain:
        """Return the chain from the optimised noise."""
        plain = Sampler(**settings_of(self))
        num_steps = QUERIES // (PROMPTS * IMAGES) - 1  # the last iterate is scored too
        with torch.enable_grad():
            found = optimise_noise(plain, prompts, x_BCHW, self.objective, noise=noise, num_steps=num_steps)
        return plain.open(prompts, found.x_BCHW, noise, strengths_BM)


def settings_of(sampler: Sampler) -> dict[str, Any]:
    """What a sampler was made with."""
    return {one.name: getattr(sampler, one.name) for one in fields(Sampler)}


def from_optimised_noise(bench: Bench, sampler: Sampler) -> Sampler:
    """Return a sampler that optimises the mean of the rewards, each in the base model's standard deviations."""
    rewards = {name: bench.run.rewards[name] for name in REWARDS}
    units = {name: float(np.std(bench.base.values[name])) for name in REWARDS}

    def objective(images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        terms = [reward(images_B3HW, prompts) / units[name] for name, reward in rewards.items()]
        return torch.stack(terms).mean(dim=0)

    return FromOptimisedNoise(**settings_of(sampler), objective=objective)


def methods(seed: int, folder: Path, bench: Bench) -> Iterator[tuple[str, Method]]:
    """Every row of the table of a seed but the base model's."""
    steps = QUERIES // BATCH
    train = partial(configure, seed, optim__steps=steps, optim__batch=BATCH, evaluate__every=steps)
    configs = {f"LoRA, rank {rank}": train(model__lora__rank=rank) for rank in RANKS}
    configs["basis, rank 4 each"] = train(**{"model.adapter.kind": "basis"}, model__lora__rank=4)
    styled = load_experiment(EXPERIMENTS / "conditioning.yaml").shared.model.conditioning.styled
    numbers = {"model.adapter.kind": "conditioning", "model.lora": {}, "model.conditioning.styled": styled}
    configs["conditioning"] = train(**numbers, optim__lr=CONDITIONING_LR)
    yield "words", Method(partial(searched_words, seed), lambda: 0)
    noise = Subject("noise", partial(from_optimised_noise, bench))
    yield "noise", Method(lambda: noise, lambda: int(np.prod(bench.run.latent_shape)))
    for name, config in configs.items():
        place = folder / f"trained-{seed}" / name.replace(", ", "-").replace(" ", "-")
        yield name, Method(partial(trained, config, place), partial(num_parameters, config))


def measured_on(config: RunConfig, seed: int) -> RunConfig:
    """The experiment that only draws."""
    evaluate = config.evaluate.model_copy(update={"prompts": PROMPTS, "images_per_prompt": IMAGES})
    judges = configure(seed).evaluate.judges
    return config.model_copy(update={"evaluate": evaluate.model_copy(update={"judges": judges}), "seed": seed})


def measure(seed: int, folder: Path) -> None:
    """Measure what is missing of a seed; a line of its ``rows-SEED.jsonl`` each."""
    file = folder / f"rows-{seed}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    bench = make_bench(measured_on(configure(seed), seed), "fresh")
    done = {row["method"] for row in read(file)}
    for name, method in methods(seed, folder, bench):
        if name in done:
            continue
        start = time.process_time()
        subject = method.prepare()
        spent = time.process_time() - start
        start = time.process_time()
        base, row = bench.assess([subject])
        if name == "noise":  # which is found while it is measured
            spent = time.process_time() - start
        rows = [(name, row, method.numbers(), spent)]
        if not done:
            rows.insert(0, ("nothing", base, 0, 0.0))
        with file.open("a") as lines:
            for which, assessed, numbers, seconds in rows:
                values = {key: values_P.tolist() for key, values_P in assessed.values.items()}
                gain = mean_gain(assessed.values, base.values)
                about = {"numbers": numbers, "seconds": seconds, "mean gain": gain}
                lines.write(json.dumps({"method": which, "values": values, **about}) + "\n")
                done.add(which)
        print(f"seed {seed} {name}: {mean_gain(row.values, base.values):+.2f}, {spent:.0f} CPU s", flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a seed that are there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def table(folder: Path) -> None:
    """Print the means over the seeds that are whole."""
    every = [{row["method"]: row for row in read(file)} for file in sorted(folder.glob("rows-?.jsonl"))]
    whole = [rows for rows in every if set(rows) >= set(METHODS)]
    if not whole:
        print("no seed is whole yet")
        return
    print(f"| what is optimised | numbers | {' | '.join(COLUMNS)} | CPU s |")
    print("|---|---|" + "---|" * (len(COLUMNS) + 1))
    for method in METHODS:
        rows = [rows[method] for rows in whole]
        cells = []
        for column in COLUMNS:
            own = [row[column] if column == "mean gain" else float(np.mean(row["values"][column])) for row in rows]
            cells.append(interval(np.array(own)))
        seconds = np.mean([row["seconds"] for row in rows])
        print(f"| {method} | {rows[0]['numbers']:,} | {' | '.join(cells)} | {seconds:.0f} |")
    print(f"\n{len(whole)} seeds")


def interval(values_S: Array) -> str:
    """A mean over seeds and half the width of its 95 % interval, where they differ."""
    half = half_width(standard_error(values_S), len(values_S) - 1) if len(values_S) > 1 else None
    return f"{values_S.mean():.3f}" + ("" if not half else f" ± {half:.3f}")


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
