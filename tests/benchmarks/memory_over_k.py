"""Memory and time of one training step against K, on the built-in model: python tests/benchmarks/memory_over_k.py

Three ways of treating the activations of the K steps (``estimator.checkpoint``), for AlignProp; and serial mode for K
steps whose inputs are detached, as DRTune has them.

Resident memory says little on a CPU, whose allocator keeps what it once had; so the bytes that autograd holds for the
backward pass are counted, at the moment when they are most. On a GPU the allocator's own peak is shown instead.

B: images. C, H, W: latent channels, rows, columns.
"""

import argparse
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.diffusion.chain import GradientPlan
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.estimators.backprop import follow
from rltune.estimators.base import Batch, Round, Tally
from rltune.rewards.mixture import Calibration, Mixture
from rltune.training.quiet import quiet_libraries
from rltune.training.setup import Run, build_run
from rltune.training.streams import Stream, noise
from rltune.training.workers import Stopwatch

MIB = 2**20
MODES = ("always", "never", "serial")


class Peak:
    """The most bytes that autograd held at one time, weights not counted."""

    def __init__(self, frozen: list[torch.nn.Module]) -> None:
        self._weights = {p.untyped_storage().data_ptr() for module in frozen for p in module.parameters()}
        self._held: dict[int, tuple[int, int]] = {}
        self.most = self._now = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Take note of a tensor that is saved, until it is freed; views of one storage count once."""
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer not in self._weights:
            copy = tensor.view_as(tensor) if tensor.is_leaf else tensor.detach()
            count, size = self._held.get(pointer, (0, storage.nbytes()))
            self._now += size if count == 0 else 0
            self._held[pointer] = (count + 1, size)
            self.most = max(self.most, self._now)
            weakref.finalize(copy, self._free, pointer)
            return copy
        return tensor

    def _free(self, pointer: int) -> None:
        count, size = self._held[pointer]
        self._held[pointer] = (count - 1, size)
        self._now -= size if count == 1 else 0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="sampling steps T")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    quiet_libraries()
    config = RunConfig.model_validate(
        {
            "rewards": {"aesthetic": {}},
            "sampler": {"steps": options.steps, "guidance": 3.0},
            "optim": {"batch": options.batch},
            "resources": {"threads_per_worker": 1},
        }
    )
    run = build_run(config)
    add_lora(run.model.network, rank=4, alpha=4, targets="attention", seed=0)
    latent_kib = options.batch * torch.Size(run.latent_shape).numel() * 4 / 1024
    print(f"batch {options.batch}, T {options.steps}, {run.workers.device}; a stored latent has {latent_kib:.0f} KiB")
    print("| K | peak: always (MiB) | never | serial | step: always (CPU s) | never | serial |")
    print("|---|---|---|---|---|---|---|")
    for k in sorted({1, 2, 4, options.steps // 2, options.steps}):
        cells = [measure(run, k, mode, repeats=options.repeats) for mode in MODES]
        peaks = " | ".join(f"{bytes_ / MIB:.2f}" for bytes_, _ in cells)
        print(f"| {k} | {peaks} | {' | '.join(f'{seconds:.2f}' for _, seconds in cells)} |", flush=True)


def measure(run: Run, k: int, mode: str, *, repeats: int) -> tuple[float, float]:
    """Return the peak of bytes held for the backward pass, and the median CPU seconds of a step without the update."""
    count, device = run.config.optim.batch, run.workers.device
    mixture = Mixture(run.rewards, {"aesthetic": 1.0}, {"aesthetic": Calibration(0.0, 1.0)})
    x_BCHW = noise(0, Stream.LATENT, [(i,) for i in range(count)], run.latent_shape).to(device)
    plan = replace(GradientPlan.last(k, run.config.sampler.steps), is_through_latent=mode != "serial")
    sampler = replace(run.sampler, num_kept=k, is_decoder_kept=True) if mode == "never" else run.sampler
    parameters = lora_parameters(run.model.network)

    def clear(*, may_vanish: bool = False) -> None:
        for parameter in parameters:
            parameter.grad = None

    def step() -> None:
        follow(
            Round(
                sampler=sampler,
                mixture=mixture,
                batches=(Batch(run.train_prompts[:count], x_BCHW),),
                num_images=count,
                rng=np.random.default_rng(0),
                parameters=parameters,
                peers=run.workers,
                timer=Stopwatch(device),
                update=clear,
                tally=Tally(("reward",)),
                is_serial=mode == "serial",
            ),
            plan,
        )

    peak = held_bytes(step, [run.model.network, run.model.pipeline.vae], device)
    seconds = []
    for _ in range(repeats):
        start = time.process_time() if device.type == "cpu" else time.perf_counter()
        step()
        seconds.append((time.process_time() if device.type == "cpu" else time.perf_counter()) - start)
    return peak, sorted(seconds)[len(seconds) // 2]


def held_bytes(step: Callable[[], None], frozen: list[torch.nn.Module], device: torch.device) -> float:
    """Return the most bytes held for a backward pass; on a GPU the allocator's peak above what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    peak = Peak(frozen)
    with torch.autograd.graph.saved_tensors_hooks(peak.pack, lambda tensor: tensor):
        step()
    return peak.most


if __name__ == "__main__":
    main()
