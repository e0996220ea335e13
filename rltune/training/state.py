"""A run with what training adds to it; how it is evaluated, and what is reported of it."""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from rltune.errors import StorageError, writing
from rltune.estimators.base import EstimatorState
from rltune.rewards.mixture import Mixture
from rltune.runs.metrics import Values, summarise
from rltune.training.checkpoint import Evaluated, Part, Progress, report_of, save_checkpoint
from rltune.training.evaluation import Pixels, beside_given, per_prompt, sample_and_score, save_grid
from rltune.training.out_of_memory import memory_named
from rltune.training.reference import BaseReference
from rltune.training.reporter import Reporter
from rltune.training.selection import Selection
from rltune.training.setup import Run
from rltune.training.step import MovingAverage

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
    selection: Selection
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
        """Whether the steps or the reward queries are used up, or nothing is trained."""
        optim = self.run.config.optim
        if not self.parameters:
            return True
        return progress.step >= optim.steps or (optim.queries is not None and progress.queries >= optim.queries)

    def is_due(self, progress: Progress) -> bool:
        """Whether the run is evaluated here."""
        return self.is_over(progress) or progress.step % self.run.config.evaluate.every == 0


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


def evaluate(training: Training, progress: Progress) -> dict[str, float]:
    """Return the metrics on held-out prompts as they are now; images and values go into the trial's folder."""
    run, base = training.run, training.base
    start = time.perf_counter()
    with memory_named(run, is_evaluation=True), _evaluated(training), run.adapter.measured(run.model.network):
        samples = sample_and_score(run.sampler, run.eval_images, run.rewards, run.workers, batch_size=run.eval_batch)
    judges, objectives = run.config.evaluate.judges, run.config.objective_names
    values = per_prompt(samples, base.samples, run.eval_images, judges, objectives)
    if run.workers.is_main:
        path = training.trial_dir / "samples" / f"step-{progress.step:06d}.png"
        with writing(path):
            save_samples(run, samples.pixels_NHW3, path)
            _save_values(values, base.scores.values, samples.values, path.with_suffix(".json"))
    summary = summarise(values, base.scores.values)
    training.selection.take(Evaluated(progress.step, summary), lambda: _adapter(training))
    return {**summary, "eval_s": time.perf_counter() - start}


def _adapter(training: Training) -> dict[str, torch.Tensor]:
    with _evaluated(training):
        return training.run.adapter.state(training.run.model.network)


def report(training: Training, progress: Progress, *, is_preempted: bool = False) -> None:
    """Report where the run is, with the evaluation that counts so far, and from the main worker a checkpoint."""
    selection = training.selection
    metrics = report_of(progress, selection.counted, selection.last)
    metrics |= {"is_final": float(training.is_over(progress) and not is_preempted)}
    metrics |= {"is_preempted": float(is_preempted)}
    if not training.run.workers.is_main:
        with writing(training.trial_dir):
            training.reporter.report(metrics, None)
        return
    checkpoint = _temporary_folder()
    try:
        save_checkpoint(
            checkpoint,
            _adapter(training),
            training.parts,
            progress,
            last=selection.last,
            selected=selection.selected,
        )
        with writing(training.trial_dir):
            training.reporter.report(metrics, checkpoint)
    except BaseException:  # also what a reporter raises to end the run here
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise


def _temporary_folder() -> Path:
    try:
        root = tempfile.gettempdir()
    except FileNotFoundError as error:  # it has tried to write to each
        raise StorageError(
            f"no temporary folder can be written ({error.strerror}); the same command resumes"
        ) from error
    with writing(root):
        return Path(tempfile.mkdtemp(prefix="rltune-", dir=root))


def _evaluated(training: Training) -> AbstractContextManager[None]:
    """Put the adapters that are evaluated and exported in place: their average, if there is one."""
    return training.average if training.run.config.optim.ema > 0 else nullcontext()


def _save_values(
    values: Mapping[str, Values], base_values: Mapping[str, Values], image_values: Mapping[str, Values], path: Path
) -> None:
    """Write every held-out prompt's values, its gains over the base model and its images' scores, for one's own use."""
    gains = {name: (values_P - base_values[name]).tolist() for name, values_P in values.items()}
    rows = {"eval": {name: values_P.tolist() for name, values_P in values.items()}, "gain": gains}
    images = {name: values_N.tolist() for name, values_N in image_values.items()}
    path.write_text(json.dumps({**rows, "images": images}))


def save_samples(run: Run, pixels_NHW3: Pixels, path: Path) -> None:
    """Write a grid of the first held-out prompts' images, behind what was given of them."""
    each, prompts = run.config.evaluate.images_per_prompt, run.eval_images.prompts[:GRID_PROMPTS]
    pixels_NHW3, columns = beside_given(pixels_NHW3[: len(prompts) * each], prompts, each)
    save_grid(pixels_NHW3, path, columns=columns * 4 if len(prompts) >= 4 else columns)
