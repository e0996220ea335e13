"""``rltune.json``: where an exported LoRA comes from, what it scored, and in which formats it lies beside the card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rltune
from rltune.config.experiment import RunConfig
from rltune.config.sections import RewardConfig
from rltune.config.yamlfile import write_yaml
from rltune.export.effect import Effect
from rltune.records import to_record
from rltune.redaction import redact
from rltune.runs.confirmations import comparable, read_confirmations
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.metrics import JUDGES
from rltune.runs.record import read_trial_versions
from rltune.runs.results import TrialResult, read_results
from rltune.training.canvases import kept_form, prompt_set
from rltune.training.figures import figures_of
from rltune.training.heldout import fresh_prompts, search_prompts
from rltune.training.rewards import licence_of

CARD_FILE = "rltune.json"
EXPERIMENT_FILE = "experiment.yaml"


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write a card into a folder of LoRA files; what is known to be a secret is masked."""
    (folder / CARD_FILE).write_text(redact(json.dumps(card, indent=2)) + "\n")


def write_experiment(folder: Path, card: Mapping[str, Any]) -> None:
    """Write the experiment that ``command`` of a card trains again, under a name of its own."""
    content = {**card["experiment"], "name": f"{card['run']}-{card['trial']}"}
    (folder / EXPERIMENT_FILE).write_text(redact(write_yaml(content)), encoding="utf-8")


def formats_told(folder: Path) -> dict[str, Any]:
    """Return what the card of a folder says of the formats whose files are there, by format.

    Nothing if it cannot be read, or is of a version that knew one format: it is about to be written anew.
    """
    try:
        told = json.loads((folder / CARD_FILE).read_text())["formats"]
        return {name: what for name, what in told.items() if all((folder / file).is_file() for file in what["files"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def card_of(
    result: TrialResult,
    folder: RunFolder,
    config: RunConfig,
    *,
    settled: RunConfig,
    prompts: Sequence[str],
    effect: Effect,
    formats: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the card of a trial's LoRA.

    Args:
        result: The trial.
        folder: Of the run.
        config: The trial's experiment as it was asked for.
        settled: The same with what was decided when the run began, and with its own prompts.
        prompts: Of the sample images.
        effect: What it changes.
        formats: Format -> its files and what came of loading them again.
    """
    metrics, base_metrics, measured_on = measurements(result, folder, config)
    figures = figures_of(metrics, base_metrics, measured_on["prompts"])
    return to_record(
        {
            "rltune": rltune.__version__,
            "run": folder.name,
            "trial": result.trial,
            "base_model": config.model.base,
            "base_revision": settled.model.revision,
            "strength": "load at weight 1.0: alpha / rank is folded into the weights",
            "formats": dict(formats),
            "settings": dict(result.values),
            "effect": asdict(effect),
            "rewards": roles(config),
            "figures": [asdict(figure) for figure in figures],
            "metrics": dict(metrics),
            "base_metrics": dict(base_metrics),
            "measured_on": measured_on,
            "measured_again": measured_again(result, folder, settled),
            "command": f"rltune train {EXPERIMENT_FILE}",
            "trained_with": list(read_trial_versions(folder, result.trial)),
            "prompts": [str(prompt) for prompt in prompts],
            **({"pictures": kept_form(prompts)} if config.task == "inpaint" else {}),
            "experiment": config.model_dump(mode="json"),
        }
    )


def strength_of_basis(trial: str, weights: Mapping[str, float], part: str) -> str:
    """Return how the strengths of LoRAs that were trained together are set.

    Args:
        trial: Whose they are.
        weights: Reward -> weight, as the trial was measured.
        part: The reward that this one is for; empty for their sum.
    """
    own = ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
    if not part:
        return f"load at weight 1.0: {len(weights)} LoRAs that were trained together are summed in it, {own}"
    names, folders = list(weights), ", ".join(f"{trial}-{name}" for name in weights)
    return (
        f"one of {len(weights)} LoRAs that were trained together ({folders}): load all of them, each under an adapter "
        f"name, and set strengths that are at least 0 and sum to 1, pipeline.set_adapters({names}, "
        f"{[round(weight, 3) for weight in weights.values()]}); those move along the front. The figures are of all of "
        f"them at {own}"
    )


def roles(config: RunConfig) -> list[dict[str, Any]]:
    """Return every reward and judge, its weight in training, and the licence of the weights that it reads."""
    judges = {name: RewardConfig(weight=0.0) for name in config.evaluate.judges if name not in JUDGES}
    sections = {**judges, **config.rewards}
    return [
        {
            "name": name,
            "reward": section.reward or name,
            "weight": section.weight,
            "licence": licence_of(name, section),
        }
        for name, section in sections.items()
    ]


def measured_again(result: TrialResult, folder: RunFolder, settled: RunConfig) -> dict[str, Any]:
    """Return what ``rltune evaluate`` needs to measure the figures once more without the run.

    Args:
        result: The trial.
        folder: Of the run.
        settled: The trial's experiment as the run began it, with its own prompts.
    """
    found = comparable(read_confirmations(folder))
    row = None if found is None else found.of(result)
    prompts = search_prompts(settled) if row is None else row.prompts or fresh_prompts(settled).prompts
    by_text = {str(prompt): prompt for prompt in prompt_set(settled, "eval").prompts}
    whole = [by_text.get(str(prompt), prompt) for prompt in prompts]
    is_fresh = row is not None
    return {
        "noise": "fresh" if is_fresh else "search",
        "precision": settled.resources.precision,
        "prompts": kept_form(whole),
    }


def measurements(
    result: TrialResult, folder: RunFolder, config: RunConfig
) -> tuple[Mapping[str, float], Mapping[str, float], dict[str, int]]:
    """Return a trial's metrics, the base model's on the same images, and how many prompts, fresh ones, they are of."""
    found = comparable(read_confirmations(folder))
    row = None if found is None else found.of(result)
    if found is not None and row is not None:
        counts = {"prompts": row.num_prompts, "fresh_prompts": row.num_prompts - row.num_reused}
        return row.metrics, found.base.metrics, counts
    base = next(row for row in read_results(folder.results_file) if row.trial == BASE_TRIAL and row.is_ok)
    return result.metrics, base.metrics, {"prompts": config.evaluate.prompts, "fresh_prompts": 0}
