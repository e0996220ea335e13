"""Seconds that a network takes to compile, as a whole and by the blocks it repeats, and those of a step with it.

    OMP_NUM_THREADS=1 python tests/benchmarks/compiled_steps.py                 built-in model and FLUX, both ways
    OMP_NUM_THREADS=1 python tests/benchmarks/compiled_steps.py builtin --repeats 10

Each line is two processes, one after the other, on a folder of code that is empty before the first. "Compiling" is the
CPU time, that of compilers it starts among it, and the wall time of the first step less a later one's: one step draws
images in four sampling steps, the last of them with gradient, decodes them and goes backward to adapters of rank 4.
What a step takes is the least of several CPU times, eager and compiled ones in turns, in the second process.

FLUX is of the true class, with few and narrow blocks: 3 double and 6 single ones. Weights are random but the built-in
model's, and text encoders are left out of what is timed.
"""

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

# a script's path begins at its own folder, and small pipelines are made in tests/
sys.path.insert(0, str(Path(__file__).parents[2]))

from rltune.assets import BUILTIN_PIPELINE_DIR
from rltune.diffusion.chain import GradientPlan
from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.diffusion.sampler import Sampler
from rltune.training.quiet import quiet_libraries
from rltune.training.room import compile_kept
from tests import tiny_families

T = 4
RANK = 4
PROMPTS = ("two red cats", "a blue dog")
BATCH = {"builtin": 8, "flux": 2}
GUIDANCE = {"builtin": 3.0, "flux": 1.0}
SIZE_PX = {"builtin": None, "flux": (64, 64)}
"""Of the images, where it is not the model's own."""
WAYS = ("regional", "whole")


def main() -> None:
    """Print the table, or measure one process of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(BATCH), help=" or ".join(BATCH))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--repeats", type=int, default=8, help="timed steps of each kind")
    parser.add_argument("--process", action="store_true", help="measure the one named here and now, and print JSON")
    options = parser.parse_args()
    if options.process:
        torch.set_num_threads(1)
        quiet_libraries()
        print(json.dumps(measure(options.names[0], options.ways[0], options.repeats)))
        return
    columns = ("network", "compiled", "compiling, first process (CPU s, wall s)", "second process (CPU s, wall s)")
    columns += ("eager step (CPU s)", "compiled step (CPU s)", "speed-up", "gradient differs by")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in options.names:
        for way in options.ways:
            print(table_line(name, way, options.repeats), flush=True)


def table_line(name: str, way: str, repeats: int) -> str:
    """Return a line of the table, from two processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, name, "--ways", way, "--repeats", str(repeats), "--process"]
        first, second = (
            json.loads(
                subprocess.run(
                    command,
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    check=True,
                    text=True,
                ).stdout.splitlines()[-1]
            )
            for _ in range(2)
        )
    eager, compiled = second["eager"], second["compiled"]
    spent = " | ".join(f"{one['compile_cpu']:.0f}, {one['compile_wall']:.0f}" for one in (first, second))
    return (
        f"| {name} | {way}, {first['num_parts']} parts | {spent} | {eager:.3f} | {compiled:.3f} "
        f"| {eager / compiled:.2f} | {second['difference']:.1e} |"
    )


def measure(name: str, way: str, repeats: int) -> dict[str, float]:
    """Compile in this process, then time eager and compiled steps in turns."""
    model = make_model(name)
    eager_step, eager_gradient = stepper(model, name)
    model = copy.deepcopy(model)
    if way == "regional":
        compile_kept(model.network)
    else:
        model.network.compile()
    step, gradient = stepper(model, name)
    eager_step()  # a warm-up
    wall, cpu = time.perf_counter(), cpu_s()
    step()
    wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for times, call in zip(seconds, (eager_step, step), strict=True):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    eager, compiled = map(min, seconds)
    expected = eager_gradient()
    return {
        "compile_cpu": cpu - compiled,
        "compile_wall": wall - compiled,
        "eager": eager,
        "compiled": compiled,
        "difference": float((gradient() - expected).norm() / expected.norm()),
        "num_parts": sum(part._compiled_call_impl is not None for part in model.network.modules()),
    }


def cpu_s() -> float:
    """CPU seconds of this process and of those it has started and seen end."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in spent)


def make_model(name: str) -> ModelFamily:
    """A model with adapters that are not zero."""
    torch.manual_seed(0)
    if name == "builtin":
        model = load_model(str(BUILTIN_PIPELINE_DIR))
    else:
        pipeline = tiny_families.flux()
        few = pipeline.transformer.config
        pipeline.transformer = type(pipeline.transformer).from_config({**few, "num_layers": 3, "num_single_layers": 6})
        model = tiny_families.family_of(tiny_families.lively(pipeline))
    add_lora(model.network, rank=RANK, alpha=RANK, targets=model.lora_layers("attention"), seed=0)
    for parameter in lora_parameters(model.network):
        torch.nn.init.normal_(parameter, std=0.03)
    return model


def stepper(model: ModelFamily, name: str) -> tuple[Callable[[], None], Callable[[], torch.Tensor]]:
    """Return one step, and what gives the gradient that the last one left."""
    batch = BATCH[name]
    prompts = (list(PROMPTS) * batch)[:batch]
    shape = model.latent_shape(*(SIZE_PX[name] or model.size_px))
    table = model.read_table(num_steps=T, eta=0.0, shape=shape)
    embeddings = PromptEmbeddings(model, prompts)
    sampler = Sampler(model, embeddings, table, GUIDANCE[name], num_kept=1, is_decoder_kept=True)
    x_BCHW = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))
    parameters = lora_parameters(model.network)

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        x_0 = sampler.latents(prompts, x_BCHW, plan=GradientPlan.last(1, T), noise=None)
        sampler.decode(x_0).square().mean().backward()

    def gradient() -> torch.Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])

    return step, gradient


if __name__ == "__main__":
    main()
