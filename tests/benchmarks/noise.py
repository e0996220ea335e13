"""A combination that training never showed, drawn by noise that is led to a few pictures of it, and by luck.

    OMP_NUM_THREADS=1 python tests/benchmarks/noise.py runs/noise             # everything; again: what is missing
    python tests/benchmarks/noise.py runs/noise --table                       # the table of what is there

The built-in world puts one kind of object into a picture or two. ``GROUPS`` are three, and the script first draws the
whole training corpus again and looks for a picture of three kinds: there is none. Reference pictures are rendered, with
other places and styles than those that are judged. Of ``IMAGES`` noises, drawn once: the model's image as it is; the
best of as many random noises as the optimiser has iterates, by the same reward; the noise that the optimiser leaves,
for each reward; and what it leaves of that best noise. ``shown`` is the share of images on which the independent judge
reads every group, with its number and shape, and the ground, and nothing else; 95 % intervals of the share are
Wilson's, over noises. ``faithful`` is that judge's share of right parts, its change paired by noise. Calls are passes
of an image through the guided network, where a step with gradient counts three: forward, forward again, and backward.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rltune.builtin.corpus import NUM_PICTURES
from rltune.builtin.measure import wilson
from rltune.builtin.render import render
from rltune.builtin.scenes import Group, Scene, Style, make_scenes, place
from rltune.config.experiment import RunConfig
from rltune.intervals import half_width, standard_error
from rltune.rewards.base import REWARDS
from rltune.rewards.pictures import to_pictures
from rltune.training.grids import Starts, drawn, each_model
from rltune.training.noise import LR, optimise_noise
from rltune.training.noise_rows import Aim
from rltune.training.quiet import quiet_libraries

GROUPS = (Group(1, "plain", "red", "ring"), Group(1, "plain", "blue", "star"), Group(1, "plain", "yellow", "circle"))
GROUND = "white"
REFERENCES, RENDERS, IMAGES, STEPS, SHOWN = 5, 64, 16, 20, 8
KINDS = {"centroid": ("centroid",), "both": ("centroid", "presence")}
WEIGHTS = {"centroid": 1.0, "presence": 0.1}
"""Of raw scores: a cosine, and the logarithm of a chance."""


def scene(seed: int) -> Scene:
    """Return a picture of the three kinds, placed and styled at random as those of training are."""
    rng = random.Random(f"noise/{seed}")
    is_regular, *flags = (rng.random() < 0.45 for _ in range(4))
    style = Style(*flags[:2], is_regular, flags[2], rng.uniform(0.75, 1.0))
    placed = place(rng, GROUPS, is_regular=is_regular)
    return Scene(GROUPS, GROUND, False, style, placed, noise_seed=rng.getrandbits(32))


def most_kinds() -> int:
    """Return the largest number of kinds of objects on any picture that the built-in model was trained on."""
    scenes, _ = make_scenes(0, NUM_PICTURES, is_heldout=False)
    captions = {picture.canonical_caption() for picture in scenes}
    assert scene(0).canonical_caption() not in captions
    return max(len(picture.groups) for picture in scenes)


def judged(images_B3HW: Tensor, prompt: str) -> dict[str, list[float]]:
    """Return what the judge, which no training sees, says of each image, and the counter, which is a reward."""
    prompts = [prompt] * len(images_B3HW)
    names = {"shown": "faithful_exact", "faithful": "faithful", "presence": "presence"}
    with torch.no_grad():
        return {said: REWARDS.build(name, {}).metric(images_B3HW, prompts).tolist() for said, name in names.items()}


class Bench:
    """The model, the noises and the rewards of all rows."""

    def __init__(self, folder: Path, lr: float) -> None:
        config = RunConfig.model_validate({"rewards": {"brightness": {}}})
        self.prompt, self.folder, self.lr = scene(0).canonical_caption(), folder, lr
        pictures = folder / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(to_pictures(render([scene(i) for i in range(REFERENCES)]))):
            picture.save(pictures / f"{i}.png")
        ((self.sampler, self.starts),) = each_model(config, [], [self.prompt], num_images=IMAGES, seed=0)
        options: dict[str, dict[str, Any]] = {"centroid": {"images": str(pictures)}, "presence": {}}
        self.rewards = {name: REWARDS.build(name, given) for name, given in options.items()}

    def aim(self, names: Sequence[str]) -> Aim:
        """Return the weighted sum of some of the rewards."""
        return Aim({name: self.rewards[name] for name in names}, {name: WEIGHTS[name] for name in names})

    def draw(self, starts: Starts, x_NCHW: Tensor | None = None) -> Tensor:
        """Return a row of images."""
        return torch.cat([images_B3HW for _, images_B3HW in drawn(self.sampler, starts, x_NCHW)])

    def luckiest(self) -> tuple[Tensor, int]:
        """Return the best of as many noises as there are iterates, the first among them, by the centroid; and calls."""
        best_NCHW, best_N = self.starts.latents(range(IMAGES)), torch.full((IMAGES,), -2.0)
        for seed in range(STEPS + 1):
            starts = Starts(self.starts.prompts, self.starts.shape, seed, self.starts.device)
            with torch.no_grad():
                score_N = self.rewards["centroid"](self.draw(starts), self.starts.prompts)
            is_better_N111 = (score_N > best_N).view(-1, 1, 1, 1)
            best_NCHW = torch.where(is_better_N111, starts.latents(range(IMAGES)), best_NCHW)
            best_N = torch.maximum(score_N, best_N)
        return best_NCHW, (STEPS + 1) * self.sampler.num_steps

    def led(self, names: Sequence[str], x_NCHW: Tensor) -> tuple[Tensor, int]:
        """Return the noise that the optimiser leaves of another, and calls."""
        prompts, aim = self.starts.prompts, self.aim(names)
        found = optimise_noise(self.sampler, prompts, x_NCHW, aim, num_steps=STEPS, lr=self.lr)
        return found.x_BCHW, (3 * STEPS + 1) * self.sampler.num_steps

    def noise(self, row: str) -> tuple[Tensor, int]:
        """Return the noise of a row, and the calls that it took."""
        x_NCHW = self.starts.latents(range(IMAGES))
        if row == "luck":
            return self.luckiest()
        if row == "luck-then-centroid":
            x_NCHW, calls = self.luckiest()
            x_NCHW, more = self.led(("centroid",), x_NCHW)
            return x_NCHW, calls + more
        return (x_NCHW, self.sampler.num_steps) if row == "model" else self.led(KINDS[row], x_NCHW)


def measure(folder: Path, lr: float, rows: Sequence[str]) -> None:
    """Measure what is missing of ``rows``, and keep numbers and images."""
    bench = Bench(folder, lr)
    for row in rows:
        if (folder / f"{row}.json").is_file():
            continue
        start_s, cpu_s, extra = time.perf_counter(), time.process_time(), {}
        if row == "renders":
            images_N3HW, calls = render([scene(1000 + i) for i in range(RENDERS)]), 0
            extra = {"most_kinds": most_kinds(), "prompt": bench.prompt}
        else:
            x_NCHW, calls = bench.noise(row)
            images_N3HW = bench.draw(bench.starts, x_NCHW)
        took = {"seconds": time.perf_counter() - start_s, "cpu_s": time.process_time() - cpu_s, "calls": calls}
        with torch.no_grad():
            centroid = bench.rewards["centroid"](images_N3HW, [""] * len(images_N3HW)).tolist()
        said = {**judged(images_N3HW, bench.prompt), "centroid": centroid}
        for i, picture in enumerate(to_pictures(images_N3HW[:SHOWN])):
            picture.save(folder / f"{row}-{i}.png")
        (folder / f"{row}.json").write_text(json.dumps({**extra, **took, **said}))


def table(folder: Path, rows: Sequence[str]) -> str:
    """Return what is there as a table."""
    lines = [
        "| noise | shown | faithful | change | centroid | presence | calls an image |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {
        row: json.loads((folder / f"{row}.json").read_text()) for row in rows if (folder / f"{row}.json").is_file()
    }
    for row, said in found.items():
        count = len(said["shown"])
        low, high = wilson(np.mean(said["shown"]), count)
        means = {name: float(np.mean(said[name])) for name in ("shown", "faithful", "centroid", "presence")}
        change = ""
        if row not in ("renders", "model") and "model" in found:
            gain = np.array(said["faithful"]) - np.array(found["model"]["faithful"])
            half = half_width(standard_error(gain), count - 1)
            change = f"{gain.mean():+.2f} ± {half:.2f}"
        shown = f"{sum(said['shown']):.0f} of {count}, {100 * low:.0f} to {100 * high:.0f} %"
        lines.append(
            f"| {row} | {shown} | {means['faithful']:.2f} | {change} | {means['centroid']:.3f} | "
            f"{means['presence']:.2f} | {said['calls']} |"
        )
    return "\n".join(lines)


def picture(folder: Path, rows: Sequence[str], path: Path) -> None:
    """Write one row of images a row that is there."""
    zoom = 2
    kept = [row for row in rows if (folder / f"{row}-0.png").is_file()]
    page = Image.new("RGB", (SHOWN * (64 * zoom + 4), len(kept) * (64 * zoom + 4)), "white")
    for y, row in enumerate(kept):
        for x in range(SHOWN):
            image = Image.open(folder / f"{row}-{x}.png").resize((64 * zoom, 64 * zoom), Image.Resampling.NEAREST)
            page.paste(image, (x * (64 * zoom + 4), y * (64 * zoom + 4)))
    page.save(path, quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default="renders,model,luck,centroid,both,luck-then-centroid")
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    rows = given.rows.split(",")
    if not given.table:
        quiet_libraries()
        measure(given.folder, given.lr, rows)
    picture(given.folder, ["renders", *(row for row in rows if row != "renders")], given.folder / "noise.jpg")
    print(table(given.folder, rows))


if __name__ == "__main__":
    main()
