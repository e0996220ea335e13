"""The training run: unpacks an experiment, builds what it names, and loops. Knows nothing of Ray."""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from rltune.config.experiment import RunConfig
from rltune.errors import NonFiniteError, OutOfMemory, RunError, UserError, writing
from rltune.estimators.base import Batch, EstimatorState, Regularisers, Round, Setting, Stateful, Tally
from rltune.runs.events import EVENTS_FILE, append_event, note_event
from rltune.runs.rows import MetricsFile, RowWriter
from rltune.training.checkpoint import Progress, load_checkpoint
from rltune.training.model_cache import ModelCache
from rltune.training.out_of_memory import memory_named
from rltune.training.prompts import cut_in_words
from rltune.training.reference import BaseReference, Claim, load_base, measure_base, save_base
from rltune.training.reporter import Reporter
from rltune.training.rewards import build_mixture, odd_targets
from rltune.training.room import compile_kept, with_room
from rltune.training.selection import Selection
from rltune.training.setup import Run, base_key, build_run
from rltune.training.state import Training, evaluate, report, save_samples
from rltune.training.step import MovingAverage, Updater
from rltune.training.streams import Stream, generator, noise, prompt_indices, torch_seed
from rltune.training.tracking import TrackedMetrics
from rltune.training.workers import Stopwatch, peak_gib

logger = logging.getLogger(__name__)

WAIT_S = 0.2
"""Between looks whether the base model has been measured."""
PATIENCE_S = 60.0  # NFS may keep for so long that a folder is not there


def train_run(
    config: RunConfig,
    *,
    trial_dir: Path,
    base_dir: Path,
    reporter: Reporter,
    resume_from: Path | None = None,
    max_eval_batch: int | None = None,
    cache: ModelCache | None = None,
    is_base_coming: Callable[[], bool] = lambda: False,
    key: str | None = None,
) -> bool:
    """Train one LoRA as ``config`` says, from its last checkpoint if there is one, and return whether it is trained.

    Reports ``eval/*`` and ``step`` at step 0 (the base model's), every ``evaluate.every`` steps and at the end, the
    last with ``is_final`` 1. Where ``evaluate.select`` names something, ``eval/*`` are those of ``selected_step``, the
    best so far, and ``own/eval/*`` those of the step itself where it is another. It is not trained
    where the reporter asked it to stop: the last report then has ``is_preempted`` 1, and the run goes on from that
    checkpoint as if nothing had been.

    Args:
        config: A concrete experiment.
        trial_dir: Receives ``metrics.jsonl`` and ``samples/``: a grid and every prompt's values per evaluation.
        base_dir: Where measurements of the base model are shared between trials.
        reporter: Takes results and checkpoints.
        resume_from: A checkpoint of this very experiment.
        max_eval_batch: Images sampled at a time without gradient at most, where memory is known to be short.
        cache: What earlier runs of this process have loaded; it changes no number.
        is_base_coming: Whether another run is measuring the base model now, so that this one waits for it.
        key: Name of those measurements in ``base_dir``, where the run has recorded one; else ``base_key``'s.

    Raises:
        UserError: Weights, prompts or a setting are not usable on this machine.
        NonFiniteError: A reward or gradient is not finite, or the gradient is exactly zero.
        OutOfMemory: A batch does not fit.
        StorageError: A file cannot be written, for the machine's fault.
        RunError: The checkpoint cannot be read, or a reward failed.
    """
    torch.manual_seed(torch_seed(config.seed, Stream.PROCESS))  # whatever ran before in this process
    run = replace(build_run(config, cache), max_eval_batch=max_eval_batch)
    drawn = run.drawn_prompts
    run.sampler.embeddings.add([*drawn, *run.adapter.beside(drawn)])  # in one stay of the text encoder on the device
    _note(run, trial_dir, "loaded")
    base = _reference(run, base_dir / (key or base_key(run.config)), is_base_coming)
    training = _prepare(run, base, trial_dir, reporter)
    progress = _resume(training, resume_from)
    if not run.workers.is_main:
        return _loop(training, progress, None)
    for text in odd_targets(training.mixture) if progress.step == 0 else ():
        note_event(trial_dir, text)
    metrics_file = MetricsFile(trial_dir / "metrics.jsonl", resume_step=progress.step)
    with closing(TrackedMetrics(metrics_file, run.config, trial_dir, resume_step=progress.step)) as rows:
        is_trained = _loop(training, progress, rows)
    _note(run, trial_dir, "trained")
    return is_trained


def _prepare(run: Run, base: BaseReference, trial_dir: Path, reporter: Reporter) -> Training:
    """Return everything that training moves, as it is before the first step: adapters, optimiser, mixture."""
    config, network = run.config, run.model.network
    run.adapter.start(run.model, seed=torch_seed(config.seed, Stream.ADAPTER))
    parameters, optim = run.adapter.parameters(network), config.optim
    groups = run.adapter.groups(network, optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    num_pixels = (config.sampler.height or run.model.size_px[0]) * (config.sampler.width or run.model.size_px[1])
    mixture = build_mixture(config, run.rewards, base.calibration, run.workers.device, num_pixels=num_pixels)
    if run.estimator.needs_gradient and not mixture.is_differentiable:
        raise UserError(
            f"rewards: {', '.join(config.rewards)}: one with a positive weight has no gradient, which "
            f"{config.estimator.name} needs; give it weight 0 to measure it only"
        )
    with memory_named(run, is_evaluation=False):
        run = replace(run, sampler=with_room(run, config))
    if config.resources.compile:
        compile_kept(network)
    average = MovingAverage(parameters, optim.ema)
    selection = Selection(config, base.scores.summary)
    state = _state(run)
    return Training(run, base, mixture, tuple(parameters), optimizer, average, state, selection, trial_dir, reporter)


def _resume(training: Training, resume_from: Path | None) -> Progress:
    progress = Progress(step=0, images_seen=0)
    if resume_from is not None:
        load = partial(training.run.adapter.load_state, training.run.model.network)
        resumed = load_checkpoint(resume_from, load, training.parts)
        training.selection.resume(resumed.last, resumed.selected)
        progress = resumed.progress
        logger.info("resumed at step %d of %d", progress.step, training.run.config.optim.steps)
    steps = training.run.workers.gather([progress.step])
    if len(set(steps)) > 1:
        raise RunError(
            f"the workers would go on from different checkpoints, at steps {', '.join(map(str, steps))}; --storage "
            "must be shared by all nodes"
        )
    return progress


def base_run(
    config: RunConfig,
    *,
    trial_dir: Path,
    base_dir: Path,
    reporter: Reporter,
    max_eval_batch: int | None = None,
    cache: ModelCache | None = None,
    key: str | None = None,
) -> None:
    """Measure the base model as ``config`` evaluates it: trial 0 of a sweep, and the reference of all others.

    Arguments are those of ``train_run``.

    Raises:
        UserError: Weights, prompts or a setting are not usable on this machine.
        NonFiniteError: A reward is not finite.
        OutOfMemory: A batch does not fit.
        StorageError: A file cannot be written, for the machine's fault.
        RunError: A reward failed.
    """
    run = replace(build_run(config, cache), max_eval_batch=max_eval_batch)
    _note(run, trial_dir, "loaded")
    _note_cut_prompts(run, trial_dir)
    base = _reference(run, base_dir / (key or base_key(run.config)))
    if run.workers.is_main:
        with writing(trial_dir):
            save_samples(run, base.pixels_NHW3, trial_dir / "samples" / "base.png")
    reporter.report({"step": 0.0, "is_final": 1.0, **base.scores.summary}, None)


def _note(run: Run, trial_dir: Path, event: str, **fields: int) -> None:
    if run.workers.is_main:
        append_event(trial_dir / EVENTS_FILE, event, **fields)


def _note_cut_prompts(run: Run, trial_dir: Path) -> None:
    """Tell of prompts that are longer than the text encoder reads: nothing else would."""
    prompts = [*run.train_prompts, *run.eval_images.prompts]
    prompts += run.adapter.beside(prompts)
    if run.workers.is_main and (words := cut_in_words(run.model.cut_off(prompts), prompts)):
        note_event(trial_dir, words)


def _reference(run: Run, folder: Path, is_base_coming: Callable[[], bool] = lambda: False) -> BaseReference:
    """Return the base model's measurements: there already, another trial's that measures the same now, or our own."""
    with closing(Claim(folder)) as claim:
        # the main worker decides for all, so that no worker waits in a collective that the others skipped
        while (plan := run.workers.gather([_plan(folder, claim, is_base_coming, run.workers.is_main)])[0]) == "wait":
            time.sleep(WAIT_S)
        if plan == "load":
            return _shared(folder)
        with memory_named(run, is_evaluation=True):
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
            with writing(folder):
                save_base(folder, base)
        return base


def _plan(folder: Path, claim: Claim, is_base_coming: Callable[[], bool], is_main: bool) -> str:
    """Return what to do for the base model's measurements: ``load``, ``wait`` or ``measure``."""
    if not is_main:
        return ""
    if load_base(folder) is not None:
        return "load"
    with writing(folder):
        if is_base_coming() or not claim.take():
            return "wait"
    return "load" if load_base(folder) is not None else "measure"  # who had the claim before may have saved them


def _shared(folder: Path) -> BaseReference:
    """Return what the main worker sees; over a network another node may see a new folder only after a while."""
    deadline = time.monotonic() + PATIENCE_S
    while (base := load_base(folder)) is None:
        if time.monotonic() > deadline:
            raise RunError(
                f"{folder}: the first worker sees the base model's measurements here, this one does not; "
                "--storage must be shared by all nodes"
            )
        time.sleep(WAIT_S)
    return base


def _state(run: Run) -> EstimatorState | None:
    """Return what the estimator learns besides the adapters, as it is at the start."""
    if not isinstance(run.estimator, Stateful):
        return None
    text = run.sampler.embeddings.get([run.sampler.negative_prompt], run.workers.device)
    text_width = run.model.pooled_text(text).shape[-1]
    seed = torch_seed(run.config.seed, Stream.ESTIMATOR_STATE)
    return run.estimator.make_state(Setting(run.latent_shape, text_width, run.workers.device, seed))


def _loop(training: Training, progress: Progress, rows: RowWriter | None) -> bool:
    base, last = training.base, training.selection.last
    if progress.step == 0:
        training.reporter.report({"step": 0.0, "is_final": 0.0, **base.scores.summary}, None)
        if training.is_over(progress):  # of words alone
            evaluate(training, progress)
            report(training, progress)
    elif training.is_due(progress) and (last is None or last.step != progress.step):
        summary = evaluate(training, progress)  # stopped before it could
        if rows is not None:
            rows.amend(progress.step, summary)
        report(training, progress)
    elif training.is_over(progress):  # killed after its last checkpoint, before its result was taken
        report(training, progress)
    _note(training.run, training.trial_dir, "first_step", step=progress.step)
    while not training.is_over(progress):
        try:
            with memory_named(training.run, is_evaluation=False):
                row, progress, is_stopping = _train_step(training, progress)
        except (NonFiniteError, OutOfMemory) as error:
            error.args = (f"step {progress.step + 1}: {error}",)
            raise
        is_due = training.is_due(progress) and not is_stopping
        summary = evaluate(training, progress) if is_due else {}
        if rows is not None:  # before the checkpoint: a resumed run drops rows too many, but cannot add one
            rows.write(row | summary)
        if is_due or is_stopping:
            report(training, progress, is_preempted=is_stopping)
            _note(training.run, training.trial_dir, "reported", step=progress.step)
        if is_stopping:
            return False
    return True


def _train_step(training: Training, progress: Progress) -> tuple[dict[str, float], Progress, bool]:
    """Train for a round, and return its numbers, how far the run is now, and whether a worker is asked to stop."""
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
    counts = [tally.num_queries, tally.num_calls, training.reporter.is_stopping()]  # all workers must agree on it
    totals = torch.cat([tally.totals, torch.tensor(counts, dtype=torch.float64)])
    *sums, queries, calls, num_stopping = workers.sum(totals.to(workers.device)).tolist()
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
    return row | {"peak_gib": peak_gib(workers.device), **asdict(progress)}, progress, num_stopping > 0


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
        drawn=run.adapter.drawn(seed, numbers, device),
    )
