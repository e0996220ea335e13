"""Soups of LoRAs as one LoRA file: those of a run's front, and those mixed by hand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import rltune
from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import ADAPTER, lora_state
from rltune.diffusion.soup import Layers, attach
from rltune.errors import RunError
from rltune.export.base import Adapter
from rltune.export.card import measured_again, roles
from rltune.export.effect import Effect
from rltune.export.write import Exported, Order, Source, export_all, lora_forms
from rltune.records import to_record
from rltune.redaction import redact
from rltune.runs.confirmations import comparable, read_confirmations
from rltune.runs.layout import RunFolder
from rltune.runs.mixtures import Mixture
from rltune.runs.record import read_record, settled, with_own_prompts
from rltune.runs.results import TrialResult
from rltune.training.canvases import kept_form
from rltune.training.figures import Figure, figures_of
from rltune.training.soups import merged, trained_member


@dataclass(frozen=True)
class Made:
    """What is told of a soup."""

    name: str
    """Of its folder."""
    place: Path
    """Its folder."""
    run: str
    """Whose soup it is; empty if it was mixed by hand."""
    weights: Mapping[str, float]
    """LoRA -> weight."""
    settings: Mapping[str, Mapping[str, Any]]
    """LoRA -> what it was trained with, where that is known."""
    figures: Sequence[Figure]
    num_prompts: int
    num_fresh: int
    again: Mapping[str, Any]
    """What it was measured on, as the card of a trial has it."""
    method: str = "exact"
    error: float = 0.0
    """By how much of its update it was changed to have a rank."""
    date: str = ""


def export_soup(
    mixture: Mixture,
    trials: Mapping[str, TrialResult],
    folder: RunFolder,
    experiment: Experiment,
    *,
    on_export: Callable[[Exported], None],
    formats: Sequence[str] = (),
) -> None:
    """Export a soup of a run's front in every format.

    Args:
        mixture: The soup.
        trials: Its LoRAs, by trial.
        folder: Of the run.
        experiment: Its experiment.
        on_export: Is told of each format that went well.
        formats: Names of formats; the default one if left out.

    Raises:
        UserError: A format is unknown; nothing was written.
        RunError: A checkpoint is gone, or the file is not the soup.
    """
    order = Order(partial(_of_run, mixture, trials, folder, experiment), lora_forms(formats))
    try:
        export_all({mixture.name: order}, on_export)
    finally:
        folder.publish(folder.exports_dir)


def export_mixed(made: Made, layers: Layers, config: RunConfig, *, on_export: Callable[[Exported], None]) -> None:
    """Export a soup that was mixed by hand, for diffusers.

    Args:
        made: What is told of it.
        layers: The soup.
        config: What it is drawn by, held out on the prompts that it was measured on.
        on_export: Is told when it went well.

    Raises:
        RunError: The soup changes nothing, or the file is not the soup.
    """
    order = Order(lambda: _source(made, config, config, lambda model: layers), lora_forms(()))
    export_all({made.name: order}, on_export)


def _of_run(mixture: Mixture, trials: Mapping[str, TrialResult], folder: RunFolder, experiment: Experiment) -> Source:
    record, found = read_record(folder), comparable(read_confirmations(folder))
    assert found is not None
    asked = {trial: experiment.concrete(trials[trial].values) for trial in mixture.weights}
    configs = {trial: with_own_prompts(settled(config, record), folder, record) for trial, config in asked.items()}
    for trial, checkpoint in mixture.checkpoints.items():
        folder.bring(folder.path / checkpoint)
        if not (folder.path / checkpoint).is_dir():
            raise RunError(f"the checkpoint {folder.path / checkpoint} of trial {trial} is gone; train it again")

    def layers_of(model: ModelFamily) -> Layers:
        loras = [
            trained_member(model, configs[trial], folder.path / mixture.checkpoints[trial], tuple(mixture.mix.values()))
            for trial in mixture.weights
        ]
        return merged(loras, tuple(mixture.weights.values()), "exact")[0]

    first = next(iter(mixture.weights))
    made = Made(
        mixture.name,
        folder.exports_dir / mixture.name,
        folder.name,
        mixture.mix or mixture.weights,
        {name: dict(trials[first if mixture.mix else name].values) for name in mixture.mix or mixture.weights},
        figures_of(mixture.metrics, found.base.metrics, mixture.num_prompts),
        mixture.num_prompts,
        mixture.num_prompts - mixture.num_reused,
        measured_again(trials[first], folder, configs[first]),
        method="basis" if mixture.mix else "exact",
        date=max(trials[trial].ended_at for trial in mixture.weights),
    )
    return _source(made, asked[first], configs[first], layers_of)


def _source(made: Made, asked: RunConfig, config: RunConfig, layers_of: Callable[[ModelFamily], Layers]) -> Source:
    def attached(model: ModelFamily) -> Adapter:
        layers = layers_of(model)
        if not layers:
            raise RunError("the soup is the base model: there is nothing to export")
        attach(model.network, layers, ADAPTER)
        rank = next(iter(layers.values())).rank
        return Adapter(lora_state(model.network), rank, float(rank), list(layers), about=_about(made, asked))

    def card(prompts: Sequence[str], effect: Effect, formats: Mapping[str, Any]) -> dict[str, Any]:
        return to_record(
            {
                "rltune": rltune.__version__,
                "run": made.run,
                "trial": made.name,
                "soup": {
                    "method": made.method,
                    "weights": dict(made.weights),
                    "error": made.error,
                    **({"settings": dict(made.settings)} if made.settings else {}),
                },
                "base_model": asked.model.base,
                "base_revision": config.model.revision,
                "strength": "load at weight 1.0: the weights of its LoRAs are folded into it",
                "formats": dict(formats),
                "settings": {},
                "effect": asdict(effect),
                # each of its LoRAs was trained with weights of its own
                "rewards": [{**row, "weight": None if row["weight"] else 0.0} for row in roles(asked)],
                "figures": [asdict(figure) for figure in made.figures],
                "measured_on": {"prompts": made.num_prompts, "fresh_prompts": made.num_fresh},
                "measured_again": dict(made.again),
                "prompts": [str(prompt) for prompt in prompts],
                **({"pictures": kept_form(prompts)} if asked.task == "inpaint" else {}),
                "experiment": asked.model_dump(mode="json"),
            }
        )

    return Source(made.name, made.place, config, attached, card)


def _about(made: Made, asked: RunConfig) -> dict[str, str]:
    """Return what headers say of it."""
    recipe = " + ".join(f"{weight:.3g} x {name}" for name, weight in made.weights.items())
    about = {
        "title": f"{made.run} {made.name}".strip(),
        "description": f"LoRA for {asked.model.base}, mixed by rltune without training: {recipe}",
        "date": made.date,
    }
    return {name: redact(text) for name, text in about.items() if text}
