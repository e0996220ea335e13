"""Measure trained LoRAs again on prompts and noise that no search has seen.

Who is chosen as best among many is chosen for luck too: on what it was chosen by, its score is too good (the winner's
curse). So members of a front are measured anew before they are reported.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rltune.config.experiment import RunConfig
from rltune.diffusion.lora import load_lora_state
from rltune.runs.metrics import Values, summarise
from rltune.training.adapters import attach_lora
from rltune.training.checkpoint import load_adapter
from rltune.training.evaluation import ImageSet, Samples, per_prompt, sample_and_score
from rltune.training.heldout import fresh_prompts
from rltune.training.model_cache import ModelCache
from rltune.training.setup import Run, base_key, build_run
from rltune.training.streams import Stream

logger = logging.getLogger(__name__)

Take = Callable[[str, dict[str, float], dict[str, list[float]]], None]
"""Receives a candidate's name, its metrics, and each reward's and judge's value for every prompt."""


@dataclass(frozen=True)
class Candidate:
    """What is measured."""

    trial: str
    config: RunConfig
    checkpoint: Path | None
    """Folder of the trained adapters; None is the base model."""


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
    for candidate in candidates:
        config = candidate.config
        judges, objectives = config.evaluate.judges, config.objective_names
        key = base_key(config)
        if key not in bases:
            run = build_run(config, cache)
            images = fresh_images(run)
            samples = sample_and_score(run.sampler, images, run.rewards, run.workers, batch_size=run.eval_batch)
            bases[key] = samples, per_prompt(samples, samples, images, judges, objectives)
        base, base_values = bases[key]
        values = base_values
        if candidate.checkpoint is not None:
            run = build_run(config, cache)
            images = fresh_images(run)
            attach_lora(run.model, config.model.lora)
            load_lora_state(run.model.network, load_adapter(candidate.checkpoint))
            samples = sample_and_score(run.sampler, images, run.rewards, run.workers, batch_size=run.eval_batch)
            values = per_prompt(samples, base, images, judges, objectives)
        rows = {name: values_P.tolist() for name, values_P in values.items()}
        take(candidate.trial, summarise(values, base_values), rows)


def fresh_images(run: Run) -> ImageSet:
    """Return images that no trial was chosen by: other noise, and as far as there are any, other held-out prompts."""
    return replace(
        run.eval_images,
        prompts=fresh_prompts(run.config).prompts,
        latent_stream=Stream.CONFIRM_LATENT,
        step_stream=Stream.CONFIRM_STEP_NOISE,
    )
