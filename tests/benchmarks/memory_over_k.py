"""Memory and time of one training step against K, on the built-in model: python tests/benchmarks/memory_over_k.py

Resident memory says little on a CPU, whose allocator keeps what it once had; so the bytes that autograd keeps for the
backward pass are counted. On a GPU the allocator's own peak is shown beside them.

B: images. C, H, W: latent channels, rows, columns.
"""

import argparse
import time

import torch
from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.diffusion.chain import GradientPlan
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.rewards.mixture import Calibration, Mixture
from rltune.training.setup import Run, build_run
from rltune.training.step import Batch, Sampler, backward
from rltune.training.streams import Stream, noise
from rltune.training.workers import Stopwatch

MIB = 2**20


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="sampling steps T")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
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
    device = run.workers.device
    print(f"batch {options.batch}, T {options.steps}, {device}; a stored latent has {latent_kib:.0f} KiB")
    print("| K | kept, checkpointed (MiB) | kept, not (MiB) | step, checkpointed (s) | step, not (s) |")
    print("|---|---|---|---|---|")
    for k in sorted({1, 2, 4, options.steps // 2, options.steps}):
        cells = [measure(run, k, use_checkpoint=flag, repeats=options.repeats) for flag in (True, False)]
        kept = " | ".join(f"{bytes_ / MIB:.2f}" for bytes_, _ in cells)
        times = " | ".join(f"{seconds:.2f}" for _, seconds in cells)
        print(f"| {k} | {kept} | {times} |")
    if run.workers.device.type == "cuda":
        print(f"peak of the allocator {torch.cuda.max_memory_allocated() / MIB:.0f} MiB")


def measure(run: Run, k: int, *, use_checkpoint: bool, repeats: int) -> tuple[int, float]:
    """Return the bytes kept between forward and backward, and the median seconds of a step without the update."""
    sampler = Sampler(run.model, run.sampler.embeddings, run.sampler.table, 3.0, use_checkpoint=use_checkpoint)
    mixture = Mixture(run.rewards, {"aesthetic": 1.0}, {"aesthetic": Calibration(0.0, 1.0)})
    count = run.config.optim.batch
    x_BCHW = noise(0, Stream.LATENT, [(i,) for i in range(count)], run.latent_shape).to(run.workers.device)
    batch = Batch(run.train_prompts[:count], x_BCHW)
    plan = GradientPlan.last(k, run.config.sampler.steps)
    weights = {parameter.data_ptr() for parameter in run.model.network.parameters()}
    weights |= {parameter.data_ptr() for parameter in run.model.pipeline.vae.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        image = sampler.decode(sampler.latents(batch.prompts, x_BCHW, plan=plan, noise=None))
    kept_bytes = sum(kept.values())
    del image
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        backward(sampler, mixture, plan, batch, num_images=count, stopwatch=Stopwatch(run.workers.device))
        seconds.append(time.perf_counter() - start)
        for parameter in lora_parameters(run.model.network):
            parameter.grad = None
    return kept_bytes, sorted(seconds)[len(seconds) // 2]


if __name__ == "__main__":
    main()
