"""Seconds, peak memory and share of the matrix rate of one optimiser step, full-size networks with random weights.

python tests/benchmarks/gpu_step.py                     every architecture in bf16, K = 1, 5 and T, 512 and 1024 px
python tests/benchmarks/gpu_step.py sdxl --px 256 --k 1 --device cpu --process-each

Reward and text encoders are left out: the reward is the images' mean, prompts are random numbers. The share is of the
floating-point operations that network and decoder need for the step, what is computed again among them, to the rate
that this device multiplies large matrices at in the same number format.
"""

import argparse
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from rltune.config.experiment import RunConfig
from rltune.diffusion.blocks import checkpoint_blocks
from rltune.diffusion.chain import GradientPlan
from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.forecast import fused_attention
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.diffusion.memory import GIB
from rltune.diffusion.sampler import Sampler
from rltune.training.forecast import DTYPES, forecast
from rltune.training.sampling import image_shape, make_sampler
from tests.benchmarks.architectures import Architecture, architectures

RANK = 16
META = torch.device("meta")


class Texts(PromptEmbeddings):
    """Random numbers for every prompt, of the shapes that the encoder would give."""

    def rows(self, prompts: Any) -> list[Any]:
        row = {name: torch.randn(blank.shape) for name, blank in self._model.blank_text().items()}
        return [row] * len(prompts)

    def negative(self, prompt: str) -> Any:
        return self.rows([prompt])[0]


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    name: str
    px: int
    k: int
    steps: int
    precision: str
    has_blocks: bool

    def config(self, architecture: Architecture) -> RunConfig:
        return RunConfig.model_validate(
            {
                "rewards": {"brightness": {}},
                "evaluate": {"judges": [], "prompts": 1, "images_per_prompt": 1},
                "model": {"lora": {"rank": RANK}},
                "sampler": {
                    "height": self.px,
                    "width": self.px,
                    "steps": self.steps,
                    "guidance": architecture.guidance,
                },
                "estimator": {"name": "alignprop", "k": self.k, "draw": "fixed", "checkpoint": "always"},
                "optim": {"batch": 1},
                "resources": {"checkpoint_blocks": self.has_blocks, "precision": self.precision},
            }
        )


def step(sampler: Sampler, setting: Setting, device: torch.device, optimizer: torch.optim.Optimizer) -> None:
    """One image drawn, scored and backpropagated, one update."""
    x_BCHW = torch.randn(1, *sampler_shape(sampler, setting), device=device)
    x_0 = sampler.latents(["a"], x_BCHW, plan=GradientPlan.last(setting.k, setting.steps), noise=None)
    (-sampler.decode(x_0).mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def sampler_shape(sampler: Sampler, setting: Setting) -> tuple[int, int, int]:
    return sampler.model.latent_shape(setting.px, setting.px)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return floating-point operations a second of square matrices, the best of five."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operations(outline: ModelFamily, setting: Setting, config: RunConfig) -> float:
    """Return floating-point operations of a step: a backward pass through frozen weights is as long as a forward one.

    Attention's two products are added by hand, since its fused form is not counted.
    """
    sampler = replace(make_sampler(config, outline), embeddings=Texts(outline))
    x_BCHW = torch.empty(1, *image_shape(config, outline), device=META)
    products: list[int] = []
    with torch.no_grad(), fused_attention(products), FlopCounterMode(display=False) as network:
        sampler.open(["a"], x_BCHW, None).predict(0, x_BCHW)
    call = network.get_total_flops() + sum(products)
    products.clear()
    with torch.no_grad(), fused_attention(products), FlopCounterMode(display=False) as decoder:
        outline.decode(x_BCHW)
    decoding = decoder.get_total_flops() + sum(products)
    return float(call * (setting.steps - setting.k + (4 if setting.has_blocks else 3) * setting.k) + 3 * decoding)


def measure(architecture: Architecture, setting: Setting, device: torch.device) -> str:
    """Return a line of the table."""
    config = setting.config(architecture)
    outline = architecture.family()
    foreseen = forecast(config, outline, precision=setting.precision)
    left_out = {"evaluation"} | ({"sampling"} if setting.k == setting.steps else set())
    phases = {name: size for name, size in foreseen.phases.items() if name not in left_out}
    expected = (sum(foreseen.fixed.values()) + max(phases.values())) / GIB
    model = architecture.family(str(device), DTYPES[setting.precision])
    model.to(device)
    add_lora(model.network, rank=RANK, alpha=RANK, targets=model.lora_layers("attention"), seed=0)
    checkpoint_blocks(model.network, enabled=setting.has_blocks)
    sampler = replace(make_sampler(config, model), embeddings=Texts(model))
    optimizer = torch.optim.AdamW(lora_parameters(model.network), lr=1e-4)
    seconds = []
    for _ in range(3 if device.type == "cuda" else 1):
        synchronise(device)
        start = time.perf_counter()
        step(sampler, setting, device, optimizer)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device) / GIB
        torch.cuda.reset_peak_memory_stats(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    rate = matrix_rate(device, DTYPES[setting.precision], 8192 if device.type == "cuda" else 1024)
    share = operations(outline, setting, config) / min(seconds) / rate
    cells = (architecture.name, setting.precision, setting.px, setting.k, setting.steps, f"{min(seconds):.1f}")
    return f"| {' | '.join(map(str, (*cells, f'{peak:.1f}', f'{expected:.1f}', f'{share:.0%}')))} |"


HEAD = """| model | precision | px | K | T | step (s) | peak (GiB) | predicted (GiB) | share of the matrix rate |
|---|---|---|---|---|---|---|---|---|"""


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    found = architectures()
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=[], help=", ".join(found))
    parser.add_argument("--px", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--k", type=int, nargs="+", default=None, help="1, 5 and T if left out")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--no-blocks", action="store_true", help="no checkpoints around blocks")
    parser.add_argument("--process-each", action="store_true", help="measure each line in a process of its own")
    given = parser.parse_args(arguments)
    if given.process_each:
        print(HEAD)
        for name in given.models or found:
            for px in given.px:
                for k in given.k or [1, 5, given.steps]:
                    words = [name, "--px", px, "--k", k, "--steps", given.steps, "--device", given.device]
                    words += ["--precision", given.precision, *(["--no-blocks"] if given.no_blocks else [])]
                    line = subprocess.run(
                        [sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True
                    )
                    print(line.stdout.splitlines()[-1] if line.returncode == 0 else f"| {name} | {px} | {k} | failed |")
        return
    device = torch.device(given.device)
    print(HEAD)
    for name in given.models or found:
        for px in given.px:
            for k in given.k or sorted({1, min(5, given.steps), given.steps}):
                setting = Setting(name, px, k, given.steps, given.precision, not given.no_blocks)
                print(measure(found[name], setting, device), flush=True)


if __name__ == "__main__":
    main()
