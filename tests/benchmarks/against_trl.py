"""Gradient and cost of rltune's step beside TRL 0.12.2's ``AlignPropTrainer``, on the same inputs.

    OMP_NUM_THREADS=1 python tests/benchmarks/against_trl.py --trl-python PATH

PATH is a python with trl 0.12.2, diffusers 0.31, transformers 4.46.3 and peft 0.13.2; it runs ``trl_step.py``. One
thread, least CPU seconds of an optimiser step: sampling, decoding, total-variation reward, backward, clipping, AdamW.

rltune keeps the activations of the K steps, as ``checkpoint: auto`` does where they fit, and merges the adapters for
the steps without gradient. The bf16 columns add ``prefix_precision: bf16``, whose trajectory differs by the rounding,
the compiled ones ``compile``, after a first step that compiles or finds its code in ``TORCHINDUCTOR_CACHE_DIR``.

Prints first how well the gradients agree on a small random pipeline, in float64 (the same formula?) and in float32
(how much rounding?), then the table of costs on the built-in model. "Bare calls" is the sum of the calls that a step
cannot do without: T - K forwards without gradient of the network without adapters, K forwards and backwards with them,
one decoding and one reward with backward, each timed alone. The greatest
relative difference is that of the worst adapter tensor; in float32 it is above rounding on the built-in model, because
its flat backgrounds lie on the kinks of total variation, and the float64 column shows that nothing else is left.

B: images. C, H, W: latent channels, rows, columns. L, D: text tokens and width. T: sampling steps.
"""

import argparse
import copy
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

# a script's path begins at its own folder, and the small pipeline is made in tests/
sys.path.insert(0, str(Path(__file__).parents[2]))

from rltune.assets import BUILTIN_PIPELINE_DIR
from rltune.diffusion.chain import GradientPlan
from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import add_lora, load_lora_state, lora_parameters, lora_state
from rltune.diffusion.sampler import Chain, Sampler, guided_denoiser
from rltune.diffusion.table import ChainTable
from rltune.training.prompts import read_prompts
from rltune.training.quiet import quiet_libraries
from rltune.training.room import compile_kept
from tests.tiny import SD15_SCHEDULE, make_pipeline

TRL_STEP = Path(__file__).with_name("trl_step.py")
RANK = 4
"""TRL's own, as is alpha = 4."""
NOISE_SEED = 7
TINY_STEPS = 5
TINY_KS = (1, 3, TINY_STEPS)
TINY_CASES = (("epsilon", 0.0), ("v_prediction", 1.0))
"""What the small network predicts, and eta."""
GUIDANCE = 3.0


@dataclass(frozen=True)
class Problem:
    """A model with adapters, and all that a step needs so that both sides compute the same number."""

    folder: Path
    """The diffusers pipeline."""
    model: ModelFamily
    table: ChainTable
    eta: float
    x_BCHW: Tensor
    text_BLD: Tensor
    negative_1LD: Tensor
    noise_TBCHW: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.x_BCHW.dtype


@dataclass(frozen=True)
class Step:
    """What one side made of a problem."""

    gradient: Mapping[str, Tensor]
    """Of -mean reward, by peft's key names."""
    images_B3HW: Tensor
    cpu_s: float = float("nan")


@dataclass(frozen=True)
class BareCosts:
    """CPU seconds of single calls at the batch of a step."""

    forward: float
    """The guided network without adapters and without gradient."""
    forward_backward: float
    """The guided network with adapters, backward to them and to the latent."""
    decode: float
    """With backward."""
    reward: float
    """With backward."""

    def sum(self, num_steps: int, num_grad_steps: int) -> float:
        """CPU seconds of a step's calls."""
        prefix = (num_steps - num_grad_steps) * self.forward
        return prefix + num_grad_steps * self.forward_backward + self.decode + self.reward


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="*", default=[12, 20], help="sampling steps T; none: no timing")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5], help="differentiated steps; T is added")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps a round")
    parser.add_argument("--no-agreement", action="store_true", help="leave out the small pipeline and float64")
    parser.add_argument("--rounds", type=int, default=3, help="how often both sides of a row take turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as work:
        if not options.no_agreement:
            print_agreement(options.trl_python, Path(work))
        for num_steps in options.steps:
            problem = builtin_problem(num_steps, options.batch)
            ks = sorted({*options.k, num_steps})
            exact = None if options.no_agreement else in_float64(problem)
            often = {"repeats": options.repeats, "rounds": options.rounds}
            print_costs(options.trl_python, Path(work), problem, exact, ks, **often)


def print_agreement(trl_python: Path, work: Path) -> None:
    """Print how far apart the gradients of the small pipeline are."""
    print(f"Small random pipeline, T {TINY_STEPS}, relative difference of the gradient and of its worst tensor\n")
    print("| predicts | eta | precision | K | gradient | worst tensor | images, max | rltune's own rounding |")
    print("|---|---|---|---|---|---|---|---|")
    for prediction, eta in TINY_CASES:
        for dtype in (torch.float64, torch.float32):
            problem = tiny_problem(work, prediction, eta, dtype)
            theirs = trl_steps(trl_python, problem, TINY_KS, work)
            exact = in_float64(problem)
            for k in TINY_KS:
                ours = rltune_gradient(problem, k)
                whole, worst = gradient_difference(ours.gradient, theirs[k].gradient)
                images = float((ours.images_B3HW - theirs[k].images_B3HW).abs().max())
                rounding, _ = gradient_difference(ours.gradient, rltune_gradient(exact, k).gradient)
                name = str(dtype).removeprefix("torch.")
                print(
                    f"| {prediction} | {eta:g} | {name} | {k} | {whole:.1e} | {worst:.1e} | {images:.1e} "
                    f"| {rounding:.1e} |",
                    flush=True,
                )


def print_costs(
    trl_python: Path,
    work: Path,
    problem: Problem,
    exact: Problem | None,
    ks: Sequence[int],
    *,
    repeats: int,
    rounds: int,
) -> None:
    """Print the cost of a step on the built-in model, and how the gradients agree; ``exact`` is it in float64."""
    num_steps, batch = problem.table.num_steps, len(problem.x_BCHW)
    print(f"\nBuilt-in model, T {num_steps}, batch {batch}, guidance {GUIDANCE:g}, rank {RANK} on attention, float32\n")
    print(
        "| K | TRL CPU s | rltune CPU s | speed-up | bf16 prefix CPU s | speed-up | compiled CPU s | speed-up "
        "| bare calls CPU s | rltune / bare | max relative gradient difference, float32 | float64 | compiled to not |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    compiled = replace(problem, model=copy.deepcopy(problem.model))
    compile_kept(compiled.model.network)
    exact_theirs = trl_steps(trl_python, exact, ks, work) if exact else {}
    for k in ks:
        costs = []
        for _ in range(rounds):  # in turns, because another job may slow the machine for a while
            theirs = trl_steps(trl_python, problem, [k], work, repeats=repeats)[k]
            ours = rltune_timed(problem, k, repeats)
            fast = rltune_timed(problem, k, repeats, use_bf16_prefix=True)
            translated = rltune_timed(compiled, k, repeats)
            bare = bare_costs(problem, 4 * repeats)
            costs.append((theirs.cpu_s, ours.cpu_s, fast.cpu_s, translated.cpu_s, bare.sum(num_steps, k)))
        theirs_s, ours_s, fast_s, compiled_s, bare_s = (min(column) for column in zip(*costs, strict=True))
        rounding, _ = gradient_difference(translated.gradient, ours.gradient)
        _, worst = gradient_difference(ours.gradient, theirs.gradient)
        worst_exact = "-"
        if exact:
            _, found = gradient_difference(rltune_gradient(exact, k).gradient, exact_theirs[k].gradient)
            worst_exact = f"{found:.1e}"
        print(
            f"| {k} | {theirs_s:.2f} | {ours_s:.2f} | {theirs_s / ours_s:.2f} | {fast_s:.2f} | {theirs_s / fast_s:.2f} "
            f"| {compiled_s:.2f} | {theirs_s / compiled_s:.2f} | {bare_s:.2f} | {ours_s / bare_s:.2f} "
            f"| {worst:.1e} | {worst_exact} | {rounding:.1e} |",
            flush=True,
        )
    print(
        f"\nBare calls at the end, CPU ms: forward {1e3 * bare.forward:.1f}, with backward "
        f"{1e3 * bare.forward_backward:.1f}, decode with backward {1e3 * bare.decode:.1f}, reward with backward "
        f"{1e3 * bare.reward:.1f}"
    )


# ---- problems


def tiny_problem(work: Path, prediction_type: str, eta: float, dtype: torch.dtype) -> Problem:
    """A small random pipeline with DDIM on SD 1.5's schedule; the same values in every precision."""
    # said out loud: a schedule that does not mention clip_sample would be clipped by TRL and is not by rltune
    scheduler = DDIMScheduler(**{**SD15_SCHEDULE, "clip_sample": False, "prediction_type": prediction_type})
    folder = work / f"tiny-{prediction_type}"
    if not folder.exists():
        make_pipeline(folder, scheduler)
    prompts = ["a cat", "two red birds", "one fox"]
    return make_problem(folder, prompts, num_steps=TINY_STEPS, eta=eta, dtype=dtype, lora_std=0.1)


def builtin_problem(num_steps: int, batch: int) -> Problem:
    """The built-in model on its first training prompts, in float32."""
    prompts = read_prompts("builtin", where="prompts")[:batch]
    # with 0.1 one of the first eight pictures lies on the edge between two, and rounding grows a thousandfold in it
    return make_problem(BUILTIN_PIPELINE_DIR, prompts, num_steps=num_steps, eta=0.0, dtype=torch.float32, lora_std=0.03)


def make_problem(
    folder: Path, prompts: Sequence[str], *, num_steps: int, eta: float, dtype: torch.dtype, lora_std: float
) -> Problem:
    """Load a pipeline, attach adapters that change the picture, draw the noise."""
    model = load_model(str(folder))
    *text, negative = (row["text"] for row in model.encode_prompts([*prompts, ""]))
    add_lora(model.network, rank=RANK, alpha=RANK, targets="attention", seed=0)
    generator = torch.Generator().manual_seed(3)
    # B is not zero, so that A gets gradient too
    state = lora_state(model.network)
    state = {name: lora_std * torch.randn(value.shape, generator=generator) for name, value in state.items()}
    load_lora_state(model.network, state)
    shape = (len(prompts), *model.latent_shape(*model.size_px))
    x_BCHW = torch.randn(shape, generator=generator).to(dtype)
    # what TRL draws from the global state in each step, in the precision of the network's output
    step_generator = torch.Generator().manual_seed(NOISE_SEED)
    noise = [torch.randn(shape, generator=step_generator, dtype=dtype) for _ in range(num_steps)]
    model.network.to(dtype)
    model.pipeline.vae.to(dtype)
    return Problem(
        folder=folder,
        model=model,
        table=model.read_table(num_steps=num_steps, eta=eta, shape=shape[1:]),
        eta=eta,
        x_BCHW=x_BCHW,
        text_BLD=torch.stack(text).to(dtype),
        negative_1LD=negative[None].to(dtype),
        noise_TBCHW=torch.stack(noise),
    )


def in_float64(problem: Problem) -> Problem:
    """The same problem, with the same noise, computed in float64."""
    model = copy.deepcopy(problem.model)
    model.network.double()
    model.pipeline.vae.double()
    values = (problem.x_BCHW, problem.text_BLD, problem.negative_1LD, problem.noise_TBCHW)
    x_BCHW, text_BLD, negative_1LD, noise_TBCHW = (value.double() for value in values)
    return replace(
        problem, model=model, x_BCHW=x_BCHW, text_BLD=text_BLD, negative_1LD=negative_1LD, noise_TBCHW=noise_TBCHW
    )


# ---- rltune's side


def rltune_step(problem: Problem, k: int, *, use_bf16_prefix: bool = False) -> Tensor:
    """Sample and decode as rltune's training step does -> images (B, 3, H, W), differentiable through K = k steps."""
    sampler = Sampler(
        problem.model,
        PromptEmbeddings(problem.model),
        problem.table,
        GUIDANCE,
        num_kept=k,
        is_decoder_kept=True,
        use_bf16_prefix=use_bf16_prefix,
    )
    rows = [{"text": text_LD} for text_LD in problem.text_BLD]
    negative = {"text": problem.negative_1LD[0]}
    denoise = guided_denoiser(problem.model, rows, negative, problem.x_BCHW.device, guidance_scale=GUIDANCE)
    noise = problem.noise_TBCHW
    chain = Chain(sampler, denoise, problem.table, problem.x_BCHW, lambda step: noise[step], rows)
    return sampler.decode(chain.run(GradientPlan.last(k, problem.table.num_steps)))


def rltune_gradient(problem: Problem, k: int) -> Step:
    """Return the gradient of one step; the adapters keep their values."""
    network = problem.model.network
    images_B3HW = rltune_step(problem, k)
    (-total_variation_reward(images_B3HW).mean()).backward()
    gradient = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            gradient[name.replace(".default.", ".")] = parameter.grad
            parameter.grad = None
    return Step(gradient, images_B3HW.detach())


def rltune_timed(problem: Problem, k: int, repeats: int, *, use_bf16_prefix: bool = False) -> Step:
    """Return one step with its gradient, and the least cost of full optimiser steps, with TRL's clipping and AdamW."""
    step = rltune_gradient(problem, k)  # and a warm-up
    before = lora_state(problem.model.network)
    parameters = lora_parameters(problem.model.network)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4)

    def update() -> None:
        images_B3HW = rltune_step(problem, k, use_bf16_prefix=use_bf16_prefix)
        (-total_variation_reward(images_B3HW).mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = cpu_s(update, repeats, num_warmup=0)
    load_lora_state(problem.model.network, before)
    return Step(step.gradient, step.images_B3HW, seconds)


def total_variation_reward(images_B3HW: Tensor) -> Tensor:
    """Return minus the mean absolute difference of neighbours, ``(B,)``; unlike rltune's own, not cast to float32."""
    rows_B = images_B3HW.diff(dim=-2).abs().mean(dim=(1, 2, 3))
    return -(images_B3HW.diff(dim=-1).abs().mean(dim=(1, 2, 3)) + rows_B)


def bare_costs(problem: Problem, repeats: int) -> BareCosts:
    """Time each call that a step is made of alone."""
    model: Any = problem.model
    x_BCHW = problem.x_BCHW
    x_2BCHW = torch.cat([x_BCHW, x_BCHW])
    text = {"text": torch.cat([problem.negative_1LD.expand_as(problem.text_BLD), problem.text_BLD])}
    t = problem.table.timesteps_T[0]
    image_B3HW = model.decode(x_BCHW).detach()

    def backward_through(call: Callable[[Tensor], Tensor], value: Tensor) -> Callable[[], None]:
        def once() -> None:
            call(value.clone().requires_grad_()).sum().backward()

        return once

    model.network.disable_adapters()
    with torch.no_grad():
        forward = cpu_s(lambda: model.predict(x_2BCHW, t, text), repeats)
    model.network.enable_adapters()
    costs = BareCosts(
        forward=forward,
        forward_backward=cpu_s(backward_through(lambda x: model.predict(x, t, text), x_2BCHW), repeats),
        decode=cpu_s(backward_through(model.decode, x_BCHW), repeats),
        reward=cpu_s(backward_through(total_variation_reward, image_B3HW), repeats),
    )
    for parameter in lora_parameters(model.network):
        parameter.grad = None
    return costs


def cpu_s(work: Callable[[], object], repeats: int, *, num_warmup: int = 1) -> float:
    """Least CPU seconds of ``work``: what else the machine does makes it slower and never faster."""
    seconds = []
    for _ in range(num_warmup + repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds[num_warmup:])


# ---- TRL's side


def trl_steps(
    trl_python: Path | str, problem: Problem, ks: Sequence[int], work: Path, *, repeats: int = 0
) -> dict[int, Step]:
    """Run ``trl_step.py`` on a problem; K -> what came out, with timings if ``repeats`` is not 0."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        for part in ("unet", "vae", "scheduler"):
            shutil.copytree(problem.folder / part, folder / "pipeline" / part)
        # float32 holds the values exactly, they were drawn in it
        inputs = {"x_T": problem.x_BCHW, "text": problem.text_BLD, "negative": problem.negative_1LD}
        inputs |= {f"lora.{key}": value for key, value in lora_state(problem.model.network).items()}
        save_file({key: value.float().contiguous() for key, value in inputs.items()}, folder / "inputs.safetensors")
        config = {
            "steps": problem.table.num_steps,
            "guidance": GUIDANCE,
            "eta": problem.eta,
            "noise_seed": NOISE_SEED,
            "num_grad_steps": list(ks),
            "rank": RANK,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "repeats": repeats,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        done = subprocess.run(
            [trl_python, TRL_STEP, folder],
            cwd=folder,  # nothing of this repository is importable there
            env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{TRL_STEP.name} failed:\n{done.stderr[-4000:]}")
        timings = json.loads((folder / "timings.json").read_text())
        return {
            k: Step(
                load_file(folder / f"gradient_{k}.safetensors"),
                load_file(folder / f"images_{k}.safetensors")["images"],
                timings[str(k)]["cpu_s"] if repeats else float("nan"),
            )
            for k in ks
        }


def gradient_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return ||one - other|| / ||other|| of the whole gradient, and the greatest of its tensors; norms in float64."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())[:3]

    def relative(names: Sequence[str]) -> float:
        a, b = (torch.cat([side[name].flatten().double() for name in names]) for side in (one, other))
        return float((a - b).norm() / b.norm())

    return relative(list(one)), max(relative([name]) for name in one)


if __name__ == "__main__":
    main()
