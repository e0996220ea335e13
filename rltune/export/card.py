"""``rltune.json``: where an exported LoRA comes from, what it scored, and in which formats it lies beside the card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rltune
from rltune.config.experiment import RunConfig
from rltune.records import to_record
from rltune.runs.confirmations import comparable, read_confirmations
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.record import read_trial_versions
from rltune.runs.results import TrialResult, read_results
from rltune.training.canvases import kept_form

CARD_FILE = "rltune.json"


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write a card into a folder of LoRA files."""
    (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")


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
    revision: str | None,
    prompts: Sequence[str],
    formats: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the card of a trial's LoRA.

    Args:
        result: The trial.
        folder: Of the run.
        config: The trial's experiment as it was asked for.
        revision: Of the base model, as it was settled when the run began.
        prompts: Of the sample images.
        formats: Format -> its files and what came of loading them again.
    """
    metrics, base_metrics, measured_on = measurements(result, folder, config)
    return to_record(
        {
            "rltune": rltune.__version__,
            "run": folder.name,
            "trial": result.trial,
            "base_model": config.model.base,
            "base_revision": revision,
            "strength": "load at weight 1.0: alpha / rank is folded into the weights",
            "formats": dict(formats),
            "settings": dict(result.values),
            "metrics": dict(metrics),
            "base_metrics": dict(base_metrics),
            "measured_on": measured_on,
            "trained_with": list(read_trial_versions(folder, result.trial)),
            "prompts": [str(prompt) for prompt in prompts],
            **({"pictures": kept_form(prompts)} if config.task == "inpaint" else {}),
            "experiment": config.model_dump(mode="json"),
        }
    )


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
