"""A resumable training loop, counted in steps, and the folder in which a build keeps its state.

Nothing random is carried from one step to the next: step k of a stage draws from a generator seeded with
(seed, stage, k). A run that is killed and started again therefore ends in the same weights, bit for bit, on the same
machine and software.
"""

import csv
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rltune.builtin.pictures import plot_curve
from rltune.errors import NonFiniteError, UserError

OnProgress = Callable[[str, int, int, dict[str, float]], None]
"""``(stage, step, total, figures)``, called every few seconds and once at the end of a stage."""


def no_progress(stage: str, step: int, total: int, figures: dict[str, float]) -> None:
    """Report nothing."""


CPU = torch.device("cpu")


def autocast(device: torch.device) -> torch.autocast:
    """Run a block in bfloat16 where that is faster; a CPU without AVX-512 would take seven times as long."""
    is_fast = device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_fast)


CURVE_POINTS = 200
VALIDATIONS = 20


@dataclass(frozen=True)
class Workshop:
    """Where a build keeps its state, and the three values that decide its result: seed, scale and device."""

    work_dir: Path
    seed: int = 0
    scale: float = 1.0
    """Multiplies every step count and the number of pictures; 1 is the shipped model."""
    device: torch.device = CPU
    on_progress: OnProgress = no_progress
    checkpoint_every_s: float = 60.0

    def scaled(self, count: int, *, at_least: int) -> int:
        """``count`` times the scale, rounded, and no fewer than a stage needs in order to run at all."""
        return max(at_least, round(count * self.scale))

    def generator(self, *key: object) -> torch.Generator:
        """A CPU generator that depends on the build's seed and ``key`` alone."""
        return torch.Generator().manual_seed(self._derive(*key))

    @contextmanager
    def seeded(self, *key: object) -> Iterator[None]:
        """Seed torch's global generator inside, for the initialisers of networks, and restore it after."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._derive(*key))
            yield

    def save(self, name: str, value: Any) -> None:
        """Keep ``value`` as ``name``; a kill leaves either the old file or the new one, never half of one."""
        self.work_dir.mkdir(parents=True, exist_ok=True)
        partial = self.work_dir / f"{name}.pt.partial"
        torch.save(value, partial)
        os.replace(partial, self.work_dir / f"{name}.pt")

    def load(self, name: str) -> Any:
        """What was kept as ``name``, on the CPU, or None."""
        path = self.work_dir / f"{name}.pt"
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    def save_figures(self, stage: str, figures: Mapping[str, float]) -> None:
        """Write a stage's measured figures. Their presence is what marks the stage as finished."""
        partial = self.work_dir / f"{stage}.json.partial"
        partial.write_text(json.dumps(dict(figures), indent=2) + "\n")
        os.replace(partial, self.work_dir / f"{stage}.json")

    def save_curve(self, stage: str, curve: Sequence[Mapping[str, float]]) -> None:
        """Write a learning curve as ``STAGE-curve.csv``, empty where a row lacks a figure, and as a plot."""
        columns = list(dict.fromkeys(name for row in curve for name in row))
        with (self.work_dir / f"{stage}-curve.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in curve)
        plot_curve(self.work_dir / f"{stage}-curve.png", curve, title=stage)

    def load_figures(self, stage: str) -> dict[str, float] | None:
        """The figures of a finished stage, or None while it is not finished."""
        path = self.work_dir / f"{stage}.json"
        return {str(k): float(v) for k, v in json.loads(path.read_text()).items()} if path.exists() else None

    def claim(self) -> None:
        """Take the folder for this seed and scale.

        Raises:
            UserError: If the folder holds a build with another seed or scale.
        """
        mine = {"seed": self.seed, "scale": self.scale}
        path = self.work_dir / "build.json"
        if not path.exists():
            self.work_dir.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(mine) + "\n")
        elif (found := json.loads(path.read_text())) != mine:
            raise UserError(f"{self.work_dir}: holds a build with {found}, not {mine}; give another work folder")

    def _derive(self, *key: object) -> int:
        text = "/".join(str(part) for part in (self.seed, *key))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def cosine_rate(step: int, num_steps: int, *, warmup: int) -> float:
    """Factor of the peak learning rate: a linear rise over ``warmup`` steps, then a cosine down to a fiftieth."""
    return min(1.0, (step + 1) / warmup) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / num_steps)))


def train(
    shop: Workshop,
    stage: str,
    *,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    loss_of: Callable[[int, torch.Generator], Tensor],
    learning_rate_of: Callable[[int, str], float],
    after_step: Callable[[int], None] | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Run ``stage`` to its last step, from its checkpoint if there is one. ``modules`` hold the result.

    Args:
        shop: The build.
        stage: Names the checkpoint and keys the random numbers.
        modules: Everything to be kept, averages included.
        optimizer: Each of its groups has a ``name``.
        num_steps: The last step is ``num_steps - 1``.
        loss_of: Step number and its generator -> scalar loss, with gradient.
        learning_rate_of: Step number and group name -> learning rate.
        after_step: Called with the step number once the weights have moved.
        validate: Held-out figures for the learning curve, taken ``VALIDATIONS`` times over the stage.

    The learning curve, the mean loss of every 1/``CURVE_POINTS`` of the stage, goes to ``STAGE-curve.csv`` and
    ``STAGE-curve.png``.

    Raises:
        NonFiniteError: If the loss is not finite; the last checkpoint stays as it is.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = shop.load(stage)
    start = 0
    curve: list[dict[str, float]] = []
    unfinished: list[float] = []
    if state is not None:
        start, curve, unfinished = int(state["step"]), state.get("curve", []), state.get("unfinished", [])
        optimizer.load_state_dict(state["optimizer"])
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])

    def checkpoint(step: int) -> None:
        kept = {name: module.state_dict() for name, module in modules.items()}
        progress = {"step": step, "curve": curve, "unfinished": unfinished}
        shop.save(stage, progress | {"optimizer": optimizer.state_dict(), "modules": kept})

    point_every, validate_every = (max(1, num_steps // count) for count in (CURVE_POINTS, VALIDATIONS))
    last_saved = last_shown = time.monotonic()
    losses: list[float] = []
    for step in range(start, num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_of(step, group["name"])
        loss = loss_of(step, shop.generator(stage, "step", step))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise NonFiniteError(f"{stage}: the loss is {losses[-1]} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if after_step is not None:
            after_step(step)
        unfinished.append(losses[-1])
        if (step + 1) % point_every == 0 or step + 1 == num_steps:
            point = {"step": step + 1, "loss": sum(unfinished) / len(unfinished)}
            if validate is not None and (step + 1) % validate_every < point_every:
                point |= validate()
            curve.append(point)
            unfinished = []
        now = time.monotonic()
        if now - last_shown > 5.0 or step + 1 == num_steps:
            shop.on_progress(stage, step + 1, num_steps, {"loss": sum(losses) / len(losses)})
            last_shown, losses = now, []
        if now - last_saved > shop.checkpoint_every_s or step + 1 == num_steps:
            checkpoint(step + 1)
            last_saved = now
    if curve:
        shop.save_curve(stage, curve)
