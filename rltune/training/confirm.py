"""Measure trained LoRAs again on prompts and noise that no search has seen.

Who is chosen as best among many is chosen for luck too: on what it was chosen by, its score is too good (the winner's
curse). So members of a front are measured anew before they are reported.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rltune.config.experiment import RunConfig
from rltune.diffusion.sampler import Sampler
from rltune.runs.metrics import Values, summarise
from rltune.training.adapters.basis import Basis
from rltune.training.assessment import of_checkpoint
from rltune.training.checkpoint import load_adapter
from rltune.training.evaluation import ImageSet, Samples, per_prompt, sample_and_score
from rltune.training.heldout import fresh_prompts
from rltune.training.model_cache import ModelCache
from rltune.training.setup import Run, base_key, build_run
from rltune.training.soups import of_point, trained_member
from rltune.training.streams import Stream

logger = logging.getLogger(__name__)

Take = Callable[[str, dict[str, float], dict[str, list[float]], dict[str, float]], None]
"""Receives a candidate's name, its metrics, each reward's and judge's value for every prompt, and of a point of a basis
``eval/NAME`` on the prompts and noise of the search."""


@dataclass(frozen=True)
class Part:
    """A trained LoRA in a mixture."""

    config: RunConfig
    checkpoint: Path
    """Folder of the trained adapters."""
    weight: float


@dataclass(frozen=True)
class Candidate:
    """What is measured: a mixture of LoRAs by the weights of their updates, a LoRA at a strength, or the base model."""

    trial: str
    config: RunConfig
    parts: Sequence[Part] = ()
    """A trial is one part at weight 1, the base model none."""
    mix: tuple[float, ...] = ()
    """Weights of the LoRAs of a basis, which is the only part; left out, those of its rewards."""


def confirm(candidates: Iterable[Candidate], take: Take, cache: ModelCache | None = None) -> None:
    """Sample and score every candidate on the fresh images of its experiment; workers share the prompts.

    Metrics are those of an evaluation, ``eval/NAME`` and ``gain/NAME`` with standard errors; gains are over the base
    model on the same fresh prompts and noise.

    Args:
        candidates: Base models and trials; they may differ in everything that a trial may differ in.
        take: Called on every worker, once a candidate.
        cache: What earlier runs of this process have loaded.

    Raises:
        UserError: Weights or prompts are not usable on this machine.
        NonFiniteError: A reward is not finite.
    """
    cache = cache or ModelCache()
    bases: dict[str, tuple[Samples, dict[str, Values]]] = {}
    searched: dict[str, Samples] = {}
    for candidate in candidates:
        config = candidate.config
        judges, objectives = config.evaluate.judges, config.objective_names
        key = base_key(config)
        if key not in bases:
            run = build_run(config, cache)
            images = fresh_images(run)
            samples = _drawn(run, run.sampler, images)
            bases[key] = samples, per_prompt(samples, samples, images, judges, objectives)
        base, base_values = bases[key]
        values = base_values
        if candidate.parts:
            run = build_run(config, cache)
            if candidate.mix and key not in searched:
                searched[key] = _drawn(run, run.sampler, run.eval_images)
            images, sampler = fresh_images(run), _prepared(run.sampler, candidate)
            samples = _drawn(run, sampler, images)
            values = per_prompt(samples, base, images, judges, objectives)
        rows = {name: values_P.tolist() for name, values_P in values.items()}
        foreseen = _foreseen(run, sampler, searched[key]) if candidate.mix else {}
        take(candidate.trial, summarise(values, base_values), rows, foreseen)


def _foreseen(run: Run, sampler: Sampler, base: Samples) -> dict[str, float]:
    """Return what is measured on the images of the search, ``eval/NAME``."""
    samples = _drawn(run, sampler, run.eval_images)
    values = per_prompt(samples, base, run.eval_images, run.config.evaluate.judges, run.config.objective_names)
    return {name: value for name, value in summarise(values, values).items() if name.startswith("eval/")}


def _drawn(run: Run, sampler: Sampler, images: ImageSet) -> Samples:
    return sample_and_score(sampler, images, run.rewards, run.workers, batch_size=run.eval_batch)


def _prepared(sampler: Sampler, candidate: Candidate) -> Sampler:
    """Put what is measured on a model that has no adapters."""
    parts = candidate.parts
    if candidate.mix:
        Basis(parts[0].config, candidate.mix).restore(sampler.model, load_adapter(parts[0].checkpoint))
        return sampler
    if len(parts) == 1:
        return of_checkpoint(parts[0].config, parts[0].checkpoint, parts[0].weight)(sampler)
    loras = [trained_member(sampler.model, part.config, part.checkpoint) for part in parts]
    return of_point(loras, tuple(part.weight for part in parts), "exact")(sampler)


def fresh_images(run: Run) -> ImageSet:
    """Return images that no trial was chosen by: other noise, and as far as there are any, other held-out prompts."""
    return replace(
        run.eval_images,
        prompts=fresh_prompts(run.config).prompts,
        latent_stream=Stream.CONFIRM_LATENT,
        step_stream=Stream.CONFIRM_STEP_NOISE,
    )
