"""The training run: unpacks an experiment, builds what it names, and loops. Knows nothing of Ray."""

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from rltune.config.experiment import RunConfig
from rltune.diffusion.lora import add_lora, lora_parameters, lora_state
from rltune.errors import NonFiniteError, RunError, UserError
from rltune.estimators.base import Batch, EstimatorState, Regularisers, Round, Setting, Stateful, Tally
from rltune.rewards.mixture import Mixture
from rltune.training.base import BaseReference, load_base, measure_base, save_base
from rltune.training.checkpoint import Part, Progress, load_checkpoint, save_checkpoint
from rltune.training.evaluation import Pixels, Values, per_prompt, sample_and_score, save_grid, summarise
from rltune.training.events import EVENTS_FILE, append_event
from rltune.training.loading import Shelf
from rltune.training.reporter import MetricsFile, Reporter, RowWriter
from rltune.training.rewards import build_mixture
from rltune.training.setup import Run, base_key, build_run, with_room
from rltune.training.step import MovingAverage, Updater
from rltune.training.streams import Stream, generator, noise, prompt_indices, torch_seed
from rltune.training.tracking import TrackedMetrics
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
    average: MovingAverage
    state: EstimatorState | None
    trial_dir: Path
    reporter: Reporter

    @property
    def parts(self) -> dict[str, Part]:
        """What a checkpoint holds besides the adapters that are evaluated."""
        parts: dict[str, Part] = {"optimizer": self.optimizer}
        if self.run.config.optim.ema > 0:
            parts |= {"average": self.average, "adapters": _Values(self.parameters)}
        if self.state is not None:
            parts["estimator"] = self.state
        return parts

    def is_over(self, progress: Progress) -> bool:
        """Whether the steps or the reward queries are used up."""
        optim = self.run.config.optim
        return progress.step >= optim.steps or (optim.queries is not None and progress.queries >= optim.queries)


@dataclass(frozen=True)
class _Values:
    """The adapters' own values, where a checkpoint's adapter file holds their average."""

    parameters: tuple[torch.nn.Parameter, ...]

    def state_dict(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def load_state_dict(self, state: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, state, strict=True):
            parameter.copy_(value)


def train_run(
    config: RunConfig,
    *,
    trial_dir: Path,
    base_dir: Path,
    reporter: Reporter,
    resume_from: Path | None = None,
    shelf: Shelf | None = None,
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
        shelf: What earlier runs of this process have loaded; it changes no number.

    Raises:
        UserError: Weights, prompts or a setting are not usable on this machine.
        NonFiniteError: A reward or gradient is not finite, or the gradient is exactly zero.
        RunError: The checkpoint cannot be read.
    """
    torch.manual_seed(torch_seed(config.seed, Stream.PROCESS))  # whatever ran before in this process
    run = build_run(config, shelf)
    _note(run, trial_dir, "loaded")
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
    mixture = build_mixture(config, run.rewards, base.calibration, run.workers.device)
    if run.estimator.needs_gradient and not mixture.is_differentiable:
        raise UserError(
            f"rewards: {', '.join(config.rewards)}: one with a positive weight has no gradient, which "
            f"{config.estimator.name} needs; give it weight 0 to measure it only"
        )
    if config.resources.compile:
        network.compile()
    run = replace(run, sampler=with_room(run, config))
    average = MovingAverage(parameters, optim.ema)
    training = Training(run, base, mixture, tuple(parameters), optimizer, average, _state(run), trial_dir, reporter)
    progress = Progress(step=0, images_seen=0)
    if resume_from is not None:
        progress = load_checkpoint(resume_from, network, training.parts)
        logger.info("resumed at step %d of %d", progress.step, optim.steps)
    if not run.workers.is_main:
        _loop(training, progress, None)
        return
    metrics_file = MetricsFile(trial_dir / "metrics.jsonl", resume_step=progress.step)
    with closing(TrackedMetrics(metrics_file, config, trial_dir, resume_step=progress.step)) as rows:
        _loop(training, progress, rows)
    _note(run, trial_dir, "trained")


def base_run(
    config: RunConfig, *, trial_dir: Path, base_dir: Path, reporter: Reporter, shelf: Shelf | None = None
) -> None:
    """Measure the base model as ``config`` evaluates it: trial 0 of a sweep, and the reference of all others.

    Raises:
        UserError: Weights, prompts or a setting are not usable on this machine.
        NonFiniteError: A reward is not finite.
    """
    run = build_run(config, shelf)
    _note(run, trial_dir, "loaded")
    base = _reference(run, base_dir)
    if run.workers.is_main:
        _save_samples(run, base.pixels_NHW3, trial_dir / "samples" / "base.png")
    reporter.report({"step": 0.0, "is_final": 1.0, **summarise(base.values, base.values)}, None)


def _note(run: Run, trial_dir: Path, event: str, **fields: int) -> None:
    if run.workers.is_main:
        append_event(trial_dir / EVENTS_FILE, event, **fields)


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


def _state(run: Run) -> EstimatorState | None:
    """Return what the estimator learns besides the adapters, as it is at the start."""
    if not isinstance(run.estimator, Stateful):
        return None
    text_width = run.sampler.embeddings.get([run.sampler.negative_prompt], run.workers.device).shape[-1]
    seed = torch_seed(run.config.seed, Stream.ESTIMATOR_STATE)
    return run.estimator.make_state(Setting(run.latent_shape, text_width, run.workers.device, seed))


def _loop(training: Training, progress: Progress, rows: RowWriter | None) -> None:
    config, base = training.run.config, training.base
    if progress.step == 0:
        training.reporter.report({"step": 0.0, "is_final": 0.0, **summarise(base.values, base.values)}, None)
    elif training.is_over(progress):  # killed after its last checkpoint, before its result was taken
        _report(training, progress, _evaluate(training, progress))
    _note(training.run, training.trial_dir, "first_step", step=progress.step)
    while not training.is_over(progress):
        try:
            row, progress = _train_step(training, progress)
        except NonFiniteError as error:
            raise NonFiniteError(f"step {progress.step + 1}: {error}") from error
        is_due = training.is_over(progress) or progress.step % config.evaluate.every == 0
        summary = _evaluate(training, progress) if is_due else {}
        if rows is not None:  # before the checkpoint: a resumed run drops rows too many, but cannot add one
            rows.write(row | summary)
        if is_due:
            _report(training, progress, summary)


def _train_step(training: Training, progress: Progress) -> tuple[dict[str, float], Progress]:
    run, mixture, step = training.run, training.mixture, progress.step
    config, workers = run.config, run.workers
    stopwatch = Stopwatch(workers.device)
    start, cpu_start = time.perf_counter(), time.process_time()
    tally = Tally(("reward", *mixture.rewards, *(f"{name}_z" for name in mixture.rewards)))
    update = Updater(
        training.parameters,
        training.optimizer,
        workers,
        max_grad_norm=config.optim.max_grad_norm,
        may_vanish=mixture.may_saturate,
    )
    mine, drawn = run.local_images, step * config.optim.batch
    batches = tuple(
        _draw_batch(run, drawn + first, min(run.micro_batch, mine.stop - first))
        for first in range(mine.start, mine.stop, run.micro_batch)
    )
    run.estimator.train(
        Round(
            sampler=run.sampler,
            mixture=mixture,
            batches=batches,
            num_images=config.optim.batch,
            rng=generator(config.seed, Stream.ESTIMATOR, step),
            parameters=training.parameters,
            peers=workers,
            timer=stopwatch,
            update=update,
            tally=tally,
            regularisers=Regularisers(**config.regularize.model_dump()),
            is_serial=config.estimator.checkpoint == "serial",
            state=training.state,
            first_image=mine.start,
        )
    )
    training.average.update()
    totals = torch.cat([tally.totals, torch.tensor([tally.num_queries, tally.num_calls], dtype=torch.float64)])
    *sums, queries, calls = workers.sum(totals.to(workers.device)).tolist()
    step_s = time.perf_counter() - start
    progress = Progress(
        step=step + 1,
        images_seen=progress.images_seen + config.optim.batch,
        queries=progress.queries + int(queries),
        calls=progress.calls + int(calls),
    )
    row = {f"train/{name}": total / config.optim.batch for name, total in zip(tally.names, sums, strict=True)}
    row |= {"grad_norm": update.norms[0], "k": tally.num_active, "workers": workers.count, "step_s": step_s}
    row |= {"cpu_s": time.process_time() - cpu_start}  # of this process: a busy machine does not change it
    row |= {f"{part}_s": seconds for part, seconds in stopwatch.seconds.items()}
    return row | {"peak_gib": peak_gib(workers.device), **asdict(progress)}, progress


def _draw_batch(run: Run, first: int, count: int) -> Batch:
    """Return training images ``first .. first + count - 1`` of the run, numbered over all steps and workers."""
    seed, device = run.config.seed, run.workers.device
    numbers = range(first, first + count)
    indices = prompt_indices(seed, first, count, len(run.train_prompts), run.config.prompts.images_per_prompt)
    x_BCHW = noise(seed, Stream.LATENT, [(number,) for number in numbers], run.latent_shape).to(device)

    def step_noise(k: int) -> torch.Tensor:
        return noise(seed, Stream.STEP_NOISE, [(number, k) for number in numbers], run.latent_shape).to(device)

    def extra_noise(copy: int) -> torch.Tensor:
        return noise(seed, Stream.EXTRA_NOISE, [(number, copy) for number in numbers], run.latent_shape).to(device)

    return Batch(
        prompts=tuple(run.train_prompts[i] for i in indices),
        x_BCHW=x_BCHW,
        noise=None if run.sampler.table.is_deterministic else step_noise,
        extra_noise=extra_noise,
    )


def _evaluate(training: Training, progress: Progress) -> dict[str, float]:
    run, base = training.run, training.base
    start = time.perf_counter()
    with _evaluated(training):
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
        with _evaluated(training):
            adapter = lora_state(run.model.network)
        save_checkpoint(checkpoint, adapter, training.parts, progress)
    metrics = {name: float(value) for name, value in asdict(progress).items()} | dict(summary)
    training.reporter.report({**metrics, "is_final": float(training.is_over(progress))}, checkpoint)
    _note(run, training.trial_dir, "reported", step=progress.step)


def _evaluated(training: Training) -> AbstractContextManager[None]:
    """Put the adapters that are evaluated and exported in place: their average, if there is one."""
    return training.average if training.run.config.optim.ema > 0 else nullcontext()


def _save_values(values: Mapping[str, Values], base_values: Mapping[str, Values], path: Path) -> None:
    """Write every held-out prompt's values and its gains over the base model, for analyses of one's own."""
    gains = {name: (values_P - base_values[name]).tolist() for name, values_P in values.items()}
    rows = {"eval": {name: values_P.tolist() for name, values_P in values.items()}, "gain": gains}
    path.write_text(json.dumps(rows))


def _save_samples(run: Run, pixels_NHW3: Pixels, path: Path) -> None:
    columns = run.config.evaluate.images_per_prompt
    shown = min(GRID_PROMPTS, len(run.eval_images.prompts)) * columns
    save_grid(pixels_NHW3[:shown], path, columns=columns * 4 if shown >= columns * 4 else columns)
