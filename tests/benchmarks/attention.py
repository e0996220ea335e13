"""Prompts of two kinds of objects: are all drawn, with cross-attention edited, and after training with its loss?

    OMP_NUM_THREADS=1 python tests/benchmarks/attention.py runs/attention           # everything; again: what is missing
    OMP_NUM_THREADS=1 python tests/benchmarks/attention.py runs/attention --seeds 0  # LoRAs of one seed
    python tests/benchmarks/attention.py runs/attention --table                     # the tables of what is there

On the built-in model, sampled as ``experiments/attention.yaml`` says, and LoRAs trained with that file at weights of
the loss and seeds; the steps are the same. ``drawn``: the share of images in which the judge, which no training sees,
finds every kind of object that the prompt names, in its colour and shape; ``exact``: and as many, and nothing else.
``loss``: that on maps, the mean over all steps of ``NUM_LOSS`` images. Each is of the held-out prompts with two kinds,
two images a prompt, the same noise throughout; differences are paired by prompt, with 95 % intervals over prompts, and
over seeds where there are several.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltune.assets import BUILTIN_JUDGE
from rltune.builtin.grammar import Content, parse
from rltune.builtin.judge import Judge, Reading, compare, load_judge
from rltune.config.experiment import RunConfig
from rltune.config.load import load_experiment
from rltune.diffusion.attention import AttentionPlan, attention_layers
from rltune.diffusion.chain import GradientPlan
from rltune.diffusion.lora import remove_lora
from rltune.diffusion.sampler import Sampler
from rltune.intervals import difference, over_prompts_and_seeds
from rltune.rewards.objects import to_network
from rltune.training.adapters.base import adapter_of
from rltune.training.canvases import prompt_set
from rltune.training.checkpoint import load_adapter
from rltune.training.evaluation import EVAL_SEED, ImageSet, draw_images
from rltune.training.loop import train_run
from rltune.training.quiet import quiet_libraries
from rltune.training.reporter import FolderReporter
from rltune.training.setup import Run, build_run
from rltune.training.streams import Stream, noise

FILE = Path(__file__).parents[2] / "experiments" / "attention.yaml"
IMAGES, BATCH, NUM_LOSS = 2, 32, 32
EVERYWHERE = ("down_blocks", "mid_block", "up_blocks")
EDITS: dict[str, tuple[float, str | tuple[str, ...]]] = {
    "no edit": (0.0, "auto"),
    "strength 0.25": (0.25, "auto"),
    "strength 0.5": (0.5, "auto"),
    "strength 1": (1.0, "auto"),
    "strength 1, all layers": (1.0, EVERYWHERE),
}
WEIGHTS = (0.0, 100.0)
SEEDS = (0, 1, 2)
MEASURED = ("drawn", "exact", "faithful", "aesthetic", "loss")


def configure(weight: float, seed: int) -> RunConfig:
    """The experiment of one training run."""
    changes: dict[str, Any] = {"regularize.attention": weight, "seed": seed, "evaluate.every": 1000}
    changes |= {"evaluate.prompts": 4, "evaluate.judges": []}
    overrides = [f"{where}={json.dumps(value)}" for where, value in changes.items()]
    return load_experiment(FILE, overrides=overrides).concrete({})


def two_kinds(config: RunConfig) -> dict[str, Content]:
    """Held-out prompts that name two kinds of objects, in different colours, and what they ask for."""
    contents = {str(prompt): parse(str(prompt)) for prompt in prompt_set(config, "eval").prompts}
    return {
        prompt: content
        for prompt, content in contents.items()
        if content and len(content.groups) == 2 == len({group.color for group in content.groups})
    }


def is_drawn(reading: Reading, content: Content) -> bool:
    """Whether every kind is there, however many of it."""
    return all(reading.groups.get(group.color, (0, ""))[1] == group.shape for group in content.groups)


@torch.no_grad()
def measure(run: Run, sampler: Sampler, judge: Judge) -> dict[str, list[float]]:
    """Each figure's mean over a prompt's images, by prompt; and the loss by image."""
    contents = two_kinds(run.config)
    images = ImageSet(tuple(contents), IMAGES, run.latent_shape)
    found: dict[str, list[float]] = {name: [] for name in MEASURED}
    for start in range(0, len(images), BATCH):
        numbers = range(start, min(start + BATCH, len(images)))
        prompts = [images.prompt_of(number) for number in numbers]
        pixels_B3HW = draw_images(sampler, images, numbers, run.workers.device)
        found["aesthetic"] += run.rewards["aesthetic"](pixels_B3HW, prompts).tolist()
        for prompt, reading in zip(prompts, judge.read(to_network(pixels_B3HW).clamp(-1, 1)), strict=True):
            verdict = compare(reading, contents[prompt])
            found["drawn"].append(float(is_drawn(reading, contents[prompt])))
            found["exact"].append(float(verdict.exact))
            found["faithful"].append((verdict.ground + verdict.colors + verdict.count + verdict.shape) / 4)
    means = {name: torch.tensor(rows).view(-1, IMAGES).mean(1).tolist() for name, rows in found.items() if rows}
    return means | {"loss": loss_of(run, sampler, images).tolist()}


@torch.enable_grad()
def loss_of(run: Run, sampler: Sampler, images: ImageSet) -> Tensor:
    """The loss on maps, the mean over all steps, by image; of the first image of the first prompts."""
    numbers = range(0, NUM_LOSS * IMAGES, IMAGES)
    layers = attention_layers(run.model.network, "auto", where="benchmark", base="builtin")
    plan = replace(sampler.attention or AttentionPlan(layers), is_noted=True)
    x_BCHW = noise(EVAL_SEED, Stream.EVAL_LATENT, [(number,) for number in numbers], images.latent_shape)
    chain = replace(sampler, attention=plan).open([images.prompt_of(number) for number in numbers], x_BCHW, None)
    losses: list[Tensor] = []

    def observe(step: int, x_BCHW: Tensor, f_BCHW: Tensor) -> None:
        assert chain.attended is not None
        losses.append(chain.attended.loss_B().detach())

    num_steps = chain.table.num_steps
    chain.run(replace(GradientPlan.last(num_steps, num_steps), is_through_latent=False), observe=observe)
    return torch.stack(losses).mean(0)


def arms(run: Run, folder: Path, *, seeds: Sequence[int]) -> Iterator[tuple[str, int, Sampler]]:
    """Yield what is compared, with the seed that it was trained with; adapters are on the network meanwhile."""
    plain = replace(run.sampler, attention=None)
    for name, (strength, wanted) in EDITS.items():
        layers = attention_layers(run.model.network, wanted, where="benchmark", base="builtin")
        edited = AttentionPlan(layers, plain.num_steps // 2, strength=strength)
        yield name, 0, replace(plain, attention=edited) if strength > 0 else plain
    for seed in seeds:
        for weight in WEIGHTS:
            config = configure(weight, seed)
            checkpoint = train(config, folder / f"weight-{weight:g}-seed-{seed}")
            adapter_of(config).restore(run.model, load_adapter(checkpoint))
            yield f"LoRA, weight {weight:g}", seed, plain
            remove_lora(run.model.network)


def train(config: RunConfig, folder: Path) -> Path:
    """The checkpoint of a run that was trained now or before."""
    if not list(folder.glob("samples/step-*.json")):
        reporter = FolderReporter(folder / "checkpoints")
        train_run(config, trial_dir=folder, base_dir=folder.parent / "base", reporter=reporter)
    return max((folder / "checkpoints").glob("step-*"))


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table: each arm's figures, and differences from the arm that it is held against."""
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    yield f"| | {' | '.join(MEASURED)} |"
    yield f"|---{'|---' * len(MEASURED)}|"
    for arm, own in by_arm.items():
        without = by_arm.get("LoRA, weight 0" if arm.startswith("LoRA") else "no edit", [])
        cells = []
        for name in MEASURED:
            mean, half = over_prompts_and_seeds([row[name] for row in own])
            cell = f"{mean:.3f} +- {half or 0:.3f}"
            if without and without is not own:
                more, half = difference([row[name] for row in own], [row[name] for row in without])
                cell += f" ({more:+.3f} +- {half or 0:.3f})"
            cells.append(cell)
        yield f"| {arm} ({len(own)}) | {' | '.join(cells)} |"


def read(file: Path) -> list[dict[str, Any]]:
    """What has been measured."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="of LoRAs; none leaves them out")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    file = args.folder / "rows.jsonl"
    if not args.table:
        quiet_libraries()
        args.folder.mkdir(parents=True, exist_ok=True)
        run, judge = build_run(configure(0.0, 0)), load_judge(BUILTIN_JUDGE)
        done = {(row["arm"], row["seed"]) for row in read(file)}
        for arm, seed, sampler in arms(run, args.folder, seeds=args.seeds):
            if (arm, seed) in done:
                continue
            row = {"arm": arm, "seed": seed, **measure(run, sampler, judge)}
            with file.open("a") as lines:  # what is there by then is read if a later one fails
                lines.write(json.dumps(row) + "\n")
            print(arm, seed, {name: sum(row[name]) / len(row[name]) for name in MEASURED}, flush=True)
    print("\n".join(table(read(file))))


if __name__ == "__main__":
    main()
