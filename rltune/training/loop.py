"""The training run: unpacks an experiment, builds what it names, and loops. Knows nothing of Ray."""

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from rltune.config.experiment import RunConfig
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.diffusion.sampling import PromptEmbeddings
from rltune.errors import NonFiniteError, UserError
from rltune.estimators.base import ESTIMATORS, Estimator
from rltune.rewards.base import REWARDS, Reward
from rltune.rewards.mixture import Mixture
from rltune.training.base import BaseReference, load_base, measure_base, save_base
from rltune.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from rltune.training.evaluation import JUDGES, ImageSet, Pixels, per_prompt, sample_and_score, save_grid, summarise
from rltune.training.prompts import read_prompts
from rltune.training.reporter import MetricsFile, Reporter
from rltune.training.step import Batch, Sampler, Sums, apply_gradient, backward
from rltune.training.streams import Stream, generator, noise, prompt_indices, torch_seed
from rltune.training.workers import Stopwatch, Workers, peak_gib

logger = logging.getLogger(__name__)

NUM_CALIBRATION_PROMPTS = 32
"""Prompts, one image each, that the unit of a reward is measured on."""
GRID_PROMPTS = 8
"""Prompts shown in a sample grid."""


@dataclass(frozen=True)
class Run:
    """Everything a run needs, built from its experiment on one worker."""

    config: RunConfig
    workers: Workers
    sampler: Sampler
    rewards: Mapping[str, Reward]
    estimator: Estimator
    train_prompts: tuple[str, ...]
    eval_images: ImageSet
    calibration_images: ImageSet
    latent_shape: tuple[int, int, int]

    @property
    def model(self) -> ModelFamily:
        """The base model, with adapters once they are attached."""
        return self.sampler.model

    @property
    def eval_batch(self) -> int:
        """Images sampled at a time without gradient."""
        return max(16, self.micro_batch)

    @property
    def local_batch(self) -> int:
        """Images of a step on this worker."""
        return self.config.optim.batch // self.workers.count

    @property
    def micro_batch(self) -> int:
        """Images that are differentiated at a time on this worker."""
        return min(self.config.optim.micro_batch or self.local_batch, self.local_batch)


def train_run(
    config: RunConfig,
    *,
    trial_dir: Path,
    base_dir: Path,
    reporter: Reporter,
    resume_from: Path | None = None,
) -> None:
    """Train one LoRA as ``config`` says, from its last checkpoint if there is one.

    Reports ``eval/*`` and ``step`` at step 0 (the base model's), every ``evaluate.every`` steps and at the end, the
    last with ``is_final`` 1.

    Args:
        config: A concrete experiment.
        trial_dir: Receives ``metrics.jsonl`` and ``samples/``.
        base_dir: Where measurements of the base model are shared between trials.
        reporter: Takes results and checkpoints.
        resume_from: A checkpoint of this very experiment.

    Raises:
        UserError: Weights, prompts or a setting are not usable on this machine.
        NonFiniteError: A reward or gradient is not finite, or the gradient is exactly zero.
        RunError: The checkpoint cannot be read.
    """
    run = build_run(config)
    base = _reference(run, base_dir)
    network = run.model.network
    lora = config.model.lora
    adapter_seed = torch_seed(config.seed, Stream.ADAPTER)
    add_lora(network, rank=lora.rank, alpha=lora.alpha_value, targets=lora.targets, seed=adapter_seed)
    parameters = lora_parameters(network)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    progress = Progress(step=0, images_seen=0)
    if resume_from is not None:
        progress = load_checkpoint(resume_from, network, optimizer)
        logger.info("resumed at step %d of %d", progress.step, optim.steps)
    trained = {name: run.rewards[name] for name in config.rewards}
    mixture = Mixture(trained, config.weights, base.calibration)

    metrics_file = MetricsFile(trial_dir / "metrics.jsonl", resume_step=progress.step) if run.workers.is_main else None
    try:
        _loop(run, base, mixture, parameters, optimizer, progress, metrics_file, trial_dir, reporter)
    finally:
        if metrics_file is not None:
            metrics_file.close()


def base_run(config: RunConfig, *, trial_dir: Path, base_dir: Path, reporter: Reporter) -> None:
    """Measure the base model as ``config`` evaluates it: trial 0 of a sweep, and the reference of all others.

    Raises:
        UserError: Weights, prompts or a setting are not usable on this machine.
        NonFiniteError: A reward is not finite.
    """
    run = build_run(config)
    base = _reference(run, base_dir)
    if run.workers.is_main:
        _save_samples(run, base.pixels_NHW3, trial_dir / "samples" / "base.png")
    reporter.report({"step": 0.0, "is_final": 1.0, **base.summary}, None)


def build_run(config: RunConfig) -> Run:
    """Load the model and the rewards of an experiment on this worker's device.

    Raises:
        UserError: Weights, prompts or a setting are not usable on this machine.
    """
    if config.resources.threads_per_worker != "auto":  # Ray has set OMP_NUM_THREADS to the worker's share
        torch.set_num_threads(config.resources.threads_per_worker)
    workers = Workers()
    dtype = _dtype(config.resources.precision, workers.device)
    model = load_model(config.model.base, revision=config.model.revision, dtype=dtype, device=workers.device)
    height_px = config.sampler.height or model.size_px[0]
    width_px = config.sampler.width or model.size_px[1]
    try:
        latent_shape = model.latent_shape(height_px, width_px)
    except ValueError as error:
        raise UserError(f"sampler.height/width: {error}") from error

    options = {name: reward.options for name, reward in config.rewards.items()}
    options |= {judge: {} for judge in config.evaluate.judges if judge not in JUDGES and judge not in options}
    rewards = {name: REWARDS.get(name)(**chosen).to(workers.device) for name, chosen in options.items()}
    train_prompts = read_prompts(config.prompts.train, where="prompts.train")
    held_out = read_prompts(config.prompts.eval, where="prompts.eval")
    if len(held_out) < config.evaluate.prompts:
        raise UserError(
            f"evaluate.prompts: {config.evaluate.prompts} prompts are wanted, but prompts.eval holds "
            f"{len(held_out)}; lower it or give more"
        )
    embeddings = PromptEmbeddings(model)
    eval_prompts = held_out[: config.evaluate.prompts]
    embeddings.add([*train_prompts, *eval_prompts, ""])
    estimator = ESTIMATORS.get(config.estimator.name)(
        k=config.estimator.k, draw=config.estimator.draw, std=config.estimator.std, **config.estimator.options
    )
    return Run(
        config=config,
        workers=workers,
        sampler=Sampler(
            model=model,
            embeddings=embeddings,
            table=model.read_table(num_steps=config.sampler.steps, eta=config.sampler.eta),
            guidance_scale=config.sampler.guidance,
            use_checkpoint=config.estimator.checkpoint == "always",
        ),
        rewards=rewards,
        estimator=estimator,
        train_prompts=train_prompts,
        eval_images=ImageSet(eval_prompts, config.evaluate.images_per_prompt, latent_shape),
        calibration_images=ImageSet(
            train_prompts[:NUM_CALIBRATION_PROMPTS],
            1,
            latent_shape,
            latent_stream=Stream.CALIBRATION_LATENT,
            step_stream=Stream.CALIBRATION_STEP_NOISE,
        ),
        latent_shape=latent_shape,
    )


def base_key(config: RunConfig) -> str:
    """Return a name for the measurements of the base model that this experiment shares with others like it."""
    parts = config.model_dump(mode="json", include={"prompts": True, "sampler": True, "evaluate": True})
    del parts["evaluate"]["every"]
    parts["model"] = [config.model.base, config.model.revision]
    parts["rewards"] = {name: reward.options for name, reward in config.rewards.items()}
    parts["precision"] = config.resources.precision
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _reference(run: Run, base_dir: Path) -> BaseReference:
    folder = base_dir / base_key(run.config)
    # the main worker decides for all, so that no worker waits in a collective that the others skipped
    is_there = run.workers.gather([load_base(folder) is not None])[0]
    if is_there and (base := load_base(folder)) is not None:
        return base
    base = measure_base(
        run.sampler,
        run.rewards,
        run.workers,
        calibration_images=run.calibration_images,
        eval_images=run.eval_images,
        judges=run.config.evaluate.judges,
        batch_size=run.eval_batch,
    )
    if run.workers.is_main:
        save_base(folder, base)
    return base


def _loop(
    run: Run,
    base: BaseReference,
    mixture: Mixture,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    metrics_file: MetricsFile | None,
    trial_dir: Path,
    reporter: Reporter,
) -> None:
    config = run.config
    if progress.step == 0:
        reporter.report({"step": 0.0, "is_final": 0.0, **base.summary}, None)
    elif progress.step >= config.optim.steps:  # killed after its last checkpoint, before its result was taken
        summary = _evaluate(run, base, progress, trial_dir)
        _report(run, optimizer, progress, summary, reporter, is_final=True)
    while progress.step < config.optim.steps:
        step = progress.step
        try:
            row = _train_step(run, mixture, parameters, optimizer, step)
        except NonFiniteError as error:
            raise NonFiniteError(f"step {step + 1}: {error}") from error
        progress = Progress(step=step + 1, images_seen=progress.images_seen + config.optim.batch)
        row |= {"step": progress.step, "images_seen": progress.images_seen}
        is_final = progress.step == config.optim.steps
        if is_final or progress.step % config.evaluate.every == 0:
            summary = _evaluate(run, base, progress, trial_dir)
            row |= summary
            _report(run, optimizer, progress, summary, reporter, is_final=is_final)
        if metrics_file is not None:
            metrics_file.write(row)


def _train_step(
    run: Run, mixture: Mixture, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> dict[str, float]:
    config, workers = run.config, run.workers
    stopwatch = Stopwatch(workers.device)
    start = time.perf_counter()
    plan = run.estimator.plan(config.sampler.steps, generator(config.seed, Stream.ESTIMATOR, step))
    sums = Sums(("reward", *mixture.rewards, *(f"{name}_z" for name in mixture.rewards)))
    first = step * config.optim.batch + workers.rank * run.local_batch
    for offset in range(first, first + run.local_batch, run.micro_batch):
        count = min(run.micro_batch, first + run.local_batch - offset)
        batch = _draw_batch(run, offset, count)
        scores = backward(run.sampler, mixture, plan, batch, num_images=config.optim.batch, stopwatch=stopwatch)
        sums.add(scores)
    with stopwatch.measure("optimizer"):
        grad_norm = apply_gradient(parameters, optimizer, workers, max_grad_norm=config.optim.max_grad_norm)
    means = (workers.sum(sums.totals.to(workers.device)) / config.optim.batch).tolist()
    row = {f"train/{name}": mean for name, mean in zip(sums.names, means, strict=True)}
    row |= {"grad_norm": grad_norm, "k": float(len(plan.active)), "step_s": time.perf_counter() - start}
    row |= {f"{part}_s": seconds for part, seconds in stopwatch.seconds.items()}
    return row | {"peak_gib": peak_gib(workers.device)}


def _draw_batch(run: Run, first: int, count: int) -> Batch:
    """Return training images ``first .. first + count - 1`` of the run, numbered over all steps and workers."""
    seed, device = run.config.seed, run.workers.device
    numbers = range(first, first + count)
    indices = prompt_indices(seed, first, count, len(run.train_prompts))
    x_BCHW = noise(seed, Stream.LATENT, [(number,) for number in numbers], run.latent_shape).to(device)

    def step_noise(k: int) -> torch.Tensor:
        return noise(seed, Stream.STEP_NOISE, [(number, k) for number in numbers], run.latent_shape).to(device)

    return Batch(
        prompts=tuple(run.train_prompts[i] for i in indices),
        x_BCHW=x_BCHW,
        noise=None if run.sampler.table.is_deterministic else step_noise,
    )


def _evaluate(run: Run, base: BaseReference, progress: Progress, trial_dir: Path) -> dict[str, float]:
    start = time.perf_counter()
    samples = sample_and_score(run.sampler, run.eval_images, run.rewards, run.workers, batch_size=run.eval_batch)
    values = per_prompt(samples, base.pixels_NHW3, run.eval_images, run.config.evaluate.judges)
    if run.workers.is_main:
        _save_samples(run, samples.pixels_NHW3, trial_dir / "samples" / f"step-{progress.step:06d}.png")
    return {**summarise(values), "eval_s": time.perf_counter() - start}


def _report(
    run: Run,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    summary: Mapping[str, float],
    reporter: Reporter,
    *,
    is_final: bool,
) -> None:
    checkpoint = None
    if run.workers.is_main:
        checkpoint = Path(tempfile.mkdtemp(prefix="rltune-")) / "checkpoint"
        save_checkpoint(checkpoint, run.model.network, optimizer, progress)
    metrics = {"step": float(progress.step), "images_seen": float(progress.images_seen), **summary}
    reporter.report({**metrics, "is_final": float(is_final)}, checkpoint)


def _save_samples(run: Run, pixels_NHW3: Pixels, path: Path) -> None:
    columns = run.config.evaluate.images_per_prompt
    shown = min(GRID_PROMPTS, len(run.eval_images.prompts)) * columns
    save_grid(pixels_NHW3[:shown], path, columns=columns * 4 if shown >= columns * 4 else columns)


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on an accelerator and float32 on a CPU, where a backward pass in bfloat16 is slower."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
