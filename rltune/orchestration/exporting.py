"""From a trial of a run to LoRA files that were loaded again and compared. Runs in the calling process."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import rltune
from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import add_lora, load_lora_state
from rltune.errors import RunError, UserError
from rltune.export.diffusers import check_reload, write_card, write_lora
from rltune.orchestration.fronts import read_front
from rltune.orchestration.objectives import Front
from rltune.orchestration.record import read_record, read_trial_versions, settled, with_own_prompts
from rltune.orchestration.results import TrialResult, read_results
from rltune.orchestration.rundir import BASE_TRIAL, RunFolder, by_number
from rltune.records import KEY, SCHEMA
from rltune.training.checkpoint import load_adapter
from rltune.training.evaluation import draw_images, save_grid, to_uint8
from rltune.training.loading import load_base_model
from rltune.training.setup import eval_image_set, make_sampler

NUM_CHECKED_IMAGES = 4


@dataclass(frozen=True)
class Exported:
    """A LoRA on disk."""

    trial: str
    folder: Path
    difference: float
    """Greatest difference of an image after reloading, RGB in [0, 1]."""


def pick_trial(pick: str, folder: RunFolder, experiment: Experiment) -> TrialResult:
    """Return the trial named by ``knee``, ``best:OBJECTIVE`` or its id.

    Raises:
        UserError: There is no such trial, or nothing was trained in it.
    """
    results = {result.trial: result for result in read_results(folder.results_file)}
    if pick in results:
        chosen = results[pick]
        if not chosen.is_ok or chosen.trial == BASE_TRIAL:
            why = f"it failed: {chosen.reason}" if chosen.reason else "it is the base model"
            raise UserError(f"--pick: trial {pick!r} has no LoRA, {why}; pick another")
        return chosen
    front = read_front(folder, experiment)
    if front is None or front.knee is None:
        raise UserError(
            f"--pick: no trained trial of {folder.path} is on its front; let the sweep end, or name a trial"
        )
    if pick == "knee":
        return front.knee
    kind, _, name = pick.partition(":")
    if kind == "best" and name in front.objectives.names:
        return front.best(name)
    best = ", ".join(f"best:{objective}" for objective in front.objectives.names)
    ids = ", ".join(sorted((r.trial for r in results.values() if r.is_ok and r.trial != BASE_TRIAL), key=by_number))
    raise UserError(f"--pick: {pick!r} is not a choice; write knee, {best}, or a trial: {ids}")


def best_picks(front: Front) -> list[TrialResult]:
    """Return the knee and the best trained member in each objective, each once."""
    if front.knee is None:
        return []
    picked = [front.knee, *(front.best(name) for name in front.objectives.names)]
    return list({result.trial: result for result in picked}.values())


def export_trial(result: TrialResult, folder: RunFolder, experiment: Experiment) -> Exported:
    """Write a trial's LoRA, load it into a fresh pipeline and compare the images of the first held-out prompts.

    Raises:
        RunError: The checkpoint is gone, or the reloaded LoRA gives other images.
    """
    record = read_record(folder)
    asked = experiment.concrete(result.values)
    config = with_own_prompts(settled(asked, record), folder, record)
    checkpoint = folder.path / result.checkpoint
    if not checkpoint.is_dir():
        raise RunError(f"trial {result.trial}: its checkpoint {checkpoint} is gone; train it again")
    state = load_adapter(checkpoint)
    lora = config.model.lora

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_base_model(config, device)
    images = eval_image_set(config, model)
    numbers = range(min(NUM_CHECKED_IMAGES, len(images)))

    def draw(drawn: ModelFamily) -> Tensor:
        return draw_images(make_sampler(config, drawn), images, numbers, device)

    add_lora(model.network, rank=lora.rank, alpha=lora.alpha_value, targets=lora.targets, seed=0)
    load_lora_state(model.network, state)
    expected_B3HW = draw(model)
    target = folder.exports_dir / result.trial
    path = write_lora(model, state, rank=lora.rank, alpha=lora.alpha_value, targets=lora.targets, folder=target)
    del model  # two large models need not fit beside each other
    gc.collect()
    difference = check_reload(path, load_base_model(config, device), draw, expected_B3HW)
    save_grid(to_uint8(expected_B3HW), target / "samples.png", columns=len(numbers))
    _write_card(target, result, folder, settled(asked, record), images.prompts)
    return Exported(result.trial, target, difference)


def _write_card(
    target: Path, result: TrialResult, folder: RunFolder, config: RunConfig, prompts: Sequence[str]
) -> None:
    base = next(row for row in read_results(folder.results_file) if row.trial == BASE_TRIAL and row.is_ok)
    write_card(
        target,
        {
            KEY: SCHEMA,
            "rltune": rltune.__version__,
            "run": folder.name,
            "trial": result.trial,
            "base_model": config.model.base,
            "base_revision": config.model.revision,
            "strength": "load at weight 1.0: alpha / rank is folded into the weights",
            "settings": dict(result.values),
            "metrics": dict(result.metrics),
            "base_metrics": dict(base.metrics),
            "trained_with": list(read_trial_versions(folder, result.trial)),
            "prompts": list(prompts[:NUM_CHECKED_IMAGES]),
            "experiment": config.model_dump(mode="json"),
        },
    )
