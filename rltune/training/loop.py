"""The training run: unpacks an experiment, builds what it names, and loops. Knows nothing of Ray."""

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from rltune.config.experiment import RunConfig
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.errors import NonFiniteError, RunError, UserError
from rltune.rewards.mixture import Mixture
from rltune.training.base import BaseReference, load_base, measure_base, save_base
from rltune.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from rltune.training.evaluation import Pixels, Values, per_prompt, sample_and_score, save_grid, summarise
from rltune.training.reporter import MetricsFile, Reporter
from rltune.training.setup import Run, base_key, build_run
from rltune.training.step import Batch, Sums, apply_gradient, backward
from rltune.training.streams import Stream, generator, noise, prompt_indices, torch_seed
from rltune.training.workers import Stopwatch, peak_gib

logger = logging.getLogger(__name__)

GRID_PROMPTS = 8
"""Prompts shown in a sample grid."""


@dataclass(frozen=True)
class Training:
    """A run with what training adds to it."""

    run: Run
    base: BaseReference
    mixture: Mixture
    parameters: tuple[torch.nn.Parameter, ...]
    optimizer: torch.optim.Optimizer
    trial_dir: Path
    reporter: Reporter


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
        trial_dir: Receives ``metrics.jsonl`` and ``samples/``: a grid and every prompt's values per evaluation.
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
    try:
        add_lora(network, rank=lora.rank, alpha=lora.alpha_value, targets=lora.targets, seed=adapter_seed)
    except ValueError as error:
        raise UserError(f"model.lora.targets: {error}; name endings of the network's own modules") from error
    parameters = lora_parameters(network)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    progress = Progress(step=0, images_seen=0)
    if resume_from is not None:
        progress = load_checkpoint(resume_from, network, optimizer)
        logger.info("resumed at step %d of %d", progress.step, optim.steps)
    mixture = Mixture({name: run.rewards[name] for name in config.rewards}, config.weights, base.calibration)
    if not mixture.is_differentiable:
        raise UserError(
            f"rewards: {', '.join(config.rewards)}: one with a positive weight has no gradient, which "
            f"{config.estimator.name} needs; give it weight 0 to measure it only"
        )
    training = Training(run, base, mixture, tuple(parameters), optimizer, trial_dir, reporter)
    if not run.workers.is_main:
        _loop(training, progress, None)
        return
    with closing(MetricsFile(trial_dir / "metrics.jsonl", resume_step=progress.step)) as metrics_file:
        _loop(training, progress, metrics_file)


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
    reporter.report({"step": 0.0, "is_final": 1.0, **summarise(base.values, base.values)}, None)


def _reference(run: Run, base_dir: Path) -> BaseReference:
    folder = base_dir / base_key(run.config)
    # the main worker decides for all, so that no worker waits in a collective that the others skipped
    is_there = run.workers.gather([load_base(folder) is not None])[0]
    if is_there:
        base = load_base(folder)
        if base is None:
            raise RunError(
                f"{folder}: the first worker sees the base model's measurements here, this one does not; "
                "--storage must be shared by all nodes"
            )
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


def _loop(training: Training, progress: Progress, metrics_file: MetricsFile | None) -> None:
    config, base = training.run.config, training.base
    if progress.step == 0:
        training.reporter.report({"step": 0.0, "is_final": 0.0, **summarise(base.values, base.values)}, None)
    elif progress.step >= config.optim.steps:  # killed after its last checkpoint, before its result was taken
        _report(training, progress, _evaluate(training, progress))
    while progress.step < config.optim.steps:
        try:
            row = _train_step(training, progress.step)
        except NonFiniteError as error:
            raise NonFiniteError(f"step {progress.step + 1}: {error}") from error
        progress = Progress(step=progress.step + 1, images_seen=progress.images_seen + config.optim.batch)
        row |= {"step": progress.step, "images_seen": progress.images_seen}
        is_due = progress.step == config.optim.steps or progress.step % config.evaluate.every == 0
        summary = _evaluate(training, progress) if is_due else {}
        if metrics_file is not None:  # before the checkpoint: a resumed run drops rows too many, but cannot add one
            metrics_file.write(row | summary)
        if is_due:
            _report(training, progress, summary)


def _train_step(training: Training, step: int) -> dict[str, float]:
    run, mixture = training.run, training.mixture
    config, workers = run.config, run.workers
    stopwatch = Stopwatch(workers.device)
    start = time.perf_counter()
    plan = run.estimator.plan(config.sampler.steps, generator(config.seed, Stream.ESTIMATOR, step))
    sums = Sums(("reward", *mixture.rewards, *(f"{name}_z" for name in mixture.rewards)))
    first = step * config.optim.batch + workers.rank * run.local_batch
    for offset in range(first, first + run.local_batch, run.micro_batch):
        count = min(run.micro_batch, first + run.local_batch - offset)
        batch = _draw_batch(run, offset, count)
        sums.add(backward(run.sampler, mixture, plan, batch, num_images=config.optim.batch, stopwatch=stopwatch))
    with stopwatch.measure("optimizer"):
        grad_norm = apply_gradient(
            training.parameters, training.optimizer, workers, max_grad_norm=config.optim.max_grad_norm
        )
    means = (workers.sum(sums.totals.to(workers.device)) / config.optim.batch).tolist()
    row = {f"train/{name}": mean for name, mean in zip(sums.names, means, strict=True)}
    row |= {"grad_norm": grad_norm, "k": len(plan.active), "workers": workers.count}
    row |= {"step_s": time.perf_counter() - start}
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


def _evaluate(training: Training, progress: Progress) -> dict[str, float]:
    run, base = training.run, training.base
    start = time.perf_counter()
    samples = sample_and_score(run.sampler, run.eval_images, run.rewards, run.workers, batch_size=run.eval_batch)
    values = per_prompt(samples, base.pixels_NHW3, run.eval_images, run.config.evaluate.judges)
    if run.workers.is_main:
        path = training.trial_dir / "samples" / f"step-{progress.step:06d}.png"
        _save_samples(run, samples.pixels_NHW3, path)
        _save_values(values, base.values, path.with_suffix(".json"))
    return {**summarise(values, base.values), "eval_s": time.perf_counter() - start}


def _report(training: Training, progress: Progress, summary: Mapping[str, float]) -> None:
    run = training.run
    checkpoint = None
    if run.workers.is_main:
        checkpoint = Path(tempfile.mkdtemp(prefix="rltune-"))
        save_checkpoint(checkpoint, run.model.network, training.optimizer, progress)
    metrics = {"step": float(progress.step), "images_seen": float(progress.images_seen), **summary}
    is_final = progress.step == run.config.optim.steps
    training.reporter.report({**metrics, "is_final": float(is_final)}, checkpoint)


def _save_values(values: Mapping[str, Values], base_values: Mapping[str, Values], path: Path) -> None:
    """Write every held-out prompt's values and its gains over the base model, for analyses of one's own."""
    gains = {name: (values_P - base_values[name]).tolist() for name, values_P in values.items()}
    rows = {"eval": {name: values_P.tolist() for name, values_P in values.items()}, "gain": gains}
    path.write_text(json.dumps(rows))


def _save_samples(run: Run, pixels_NHW3: Pixels, path: Path) -> None:
    columns = run.config.evaluate.images_per_prompt
    shown = min(GRID_PROMPTS, len(run.eval_images.prompts)) * columns
    save_grid(pixels_NHW3[:shown], path, columns=columns * 4 if shown >= columns * 4 else columns)
