"""What the built-in networks cost: parameters, multiply-adds, milliseconds; loading, sampling, and an AlignProp step.

    OMP_NUM_THREADS=1 python tests/benchmarks/builtin_costs.py

One thread; CPU time, the least of several runs, so that another job on the machine disturbs little. Backward is to the
input only, as a frozen network inside a reward gradient runs.
"""

import time
from collections.abc import Callable

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rltune.assets import BUILTIN_COUNTER, BUILTIN_JUDGE, BUILTIN_PIPELINE_DIR
from rltune.builtin.counter import load_counter
from rltune.builtin.judge import load_judge
from rltune.config.load import parse_experiment
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.estimators.base import Batch, Round, Tally
from rltune.rewards.clip_loading import load_clip
from rltune.rewards.mixture import Calibration, Mixture
from rltune.training.quiet import quiet_libraries
from rltune.training.room import with_room
from rltune.training.setup import build_run
from rltune.training.step import Updater
from rltune.training.streams import Stream, generator, noise
from rltune.training.workers import Stopwatch

BATCH = 16
REPEATS = 5


def cpu_s(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Least CPU seconds of ``work``, after one call that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times[1:])


def row(name: str, parameters: int, forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Print one network's line; ``forward`` maps a batch of ``BATCH`` to a tensor."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(x)
    macs = counter.get_total_flops() / 2 / BATCH
    with torch.no_grad():
        ahead = cpu_s(lambda: forward(x))
    both = "-"
    if x.is_floating_point():
        x = x.requires_grad_()
        both = f"{1e3 * cpu_s(lambda: torch.autograd.grad(forward(x).sum(), x)) / BATCH:.2f}"
    print(f"| {name} | {parameters / 1e6:.2f} | {macs / 1e6:.1f} | {1e3 * ahead / BATCH:.2f} | {both} |", flush=True)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def networks() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(BUILTIN_PIPELINE_DIR, dtype=torch.float32, local_files_only=True)
    unet, vae, text = (
        network.requires_grad_(False) for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    )
    tower = load_clip("builtin")
    counter, judge = load_counter(BUILTIN_COUNTER), load_judge(BUILTIN_JUDGE)
    ids = pipeline.tokenizer(["two red stars"] * BATCH, padding="max_length", return_tensors="pt").input_ids
    hidden = text(ids)[0]
    latents, images = torch.randn(BATCH, 16, 8, 8), torch.rand(BATCH, 3, 64, 64)
    clip = tower.model
    print(
        "| network | M parameters | M multiply-adds | forward (ms) | forward and backward (ms) |\n|---|---|---|---|---|"
    )
    row("UNet, one evaluation", count(unet), lambda x: unet(x, 500, hidden).sample, latents)
    row("text encoder", count(text), lambda x: text(x)[0], ids)
    row("autoencoder: decode", count(vae.decoder) + count(vae.post_quant_conv), lambda x: vae.decode(x).sample, latents)
    encode = count(vae.encoder) + count(vae.quant_conv)
    row("autoencoder: encode", encode, lambda x: vae.encode(x).latent_dist.mean, images)
    row("image-text model: image", count(clip.visual), lambda x: clip.encode_image(x), images)
    row("image-text model: text", count(clip) - count(clip.visual), lambda x: clip.encode_text(x), ids)
    row("counter", count(counter), lambda x: torch.cat([part.flatten(1) for part in counter(x)], 1), images)
    row("judge", count(judge), lambda x: judge(x)["count"], images)


def step() -> None:
    config = parse_experiment(
        "sampler: {steps: 12, guidance: 3.0}\nestimator: {name: alignprop, k: 3, draw: fixed, checkpoint: never}\n"
        "rewards: {aesthetic: {weight: 1.0}}\nmodel: {lora: {rank: 8}}\noptim: {batch: 8}"
    ).concrete({})
    start = time.process_time()
    run = build_run(config)
    print(f"\nmodel, rewards and prompts loaded: {time.process_time() - start:.2f} s")
    add_lora(run.model.network, rank=8, alpha=8, targets=config.model.lora.targets, seed=0)
    parameters = lora_parameters(run.model.network)
    optimizer = torch.optim.AdamW(parameters)
    mixture = Mixture(run.rewards, {"aesthetic": 1.0}, {"aesthetic": Calibration(0.0, 1.0)})
    batch = Batch(run.train_prompts[:8], noise(0, Stream.LATENT, [(i,) for i in range(8)], run.latent_shape))
    sampler = with_room(run, config)

    def once() -> None:
        run.estimator.train(
            Round(
                sampler=sampler,
                mixture=mixture,
                batches=(batch,),
                num_images=8,
                rng=generator(0, Stream.ESTIMATOR, 0),
                parameters=parameters,
                peers=run.workers,
                timer=Stopwatch(run.workers.device),
                update=Updater(parameters, optimizer, run.workers, max_grad_norm=1.0),
                tally=Tally(("reward",)),
            )
        )

    print(f"AlignProp step, batch 8, T = 12, K = 3, LoRA rank 8 on attention: {cpu_s(once, 3):.2f} CPU-s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    quiet_libraries()
    networks()
    step()
