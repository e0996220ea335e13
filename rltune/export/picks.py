"""From a trial of a run to LoRA files that were loaded again and compared. Runs in the calling process."""

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

import rltune
from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import add_lora, load_lora_state
from rltune.errors import RltuneError, RunError, UserError
from rltune.export.diffusers import check_adapter, check_reload, rounding_of, write_card, write_lora
from rltune.records import KEY, SCHEMA
from rltune.runs.confirmations import comparable, read_confirmations
from rltune.runs.fronts import read_front
from rltune.runs.layout import BASE_TRIAL, RunFolder, by_number
from rltune.runs.objectives import Front
from rltune.runs.record import read_record, read_trial_versions, settled, with_own_prompts
from rltune.runs.results import TrialResult, read_results
from rltune.training.checkpoint import load_adapter
from rltune.training.evaluation import draw_images, save_grid, to_uint8
from rltune.training.model_cache import load_base_model
from rltune.training.setup import eval_image_set, make_sampler

NUM_CHECKED_IMAGES = 4
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Number formats that LoRAs are used in; an accelerator's default here is bfloat16."""


@dataclass(frozen=True)
class Exported:
    """A LoRA on disk."""

    trial: str
    folder: Path
    difference: float
    """Greatest difference of an image after reloading, RGB in [0, 1], float32."""
    effect: float
    """Greatest difference of an image from the base model's, the same."""
    rounding: Mapping[str, float]
    """Greatest difference of an image in another number format from float32's, by format."""

    @property
    def proof(self) -> str:
        """What was compared, in words."""
        formats = ", ".join(f"{name} changes them by {value:.1g}" for name, value in self.rounding.items())
        return f"reloaded and compared in float32: images agree to {self.difference:.1g}; {formats}"


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
        ids = _trained_ids(results.values())
        see = f"and none has ended well yet; see: rltune status {quote(str(folder.path))}"
        remedy = f"name one that ended well: {ids}" if ids else see
        raise UserError(f"--pick: no trained trial of {folder.path} is on its front; {remedy}")
    if pick == "knee":
        return front.knee
    kind, _, name = pick.partition(":")
    if kind == "best" and name in front.objectives.names:
        return front.best(name)
    best = ", ".join(f"best:{objective}" for objective in front.objectives.names)
    ids = _trained_ids(results.values())
    raise UserError(f"--pick: {pick!r} is not a choice; write knee, {best}, or a trial: {ids}")


def _trained_ids(results: Iterable[TrialResult]) -> str:
    """Return the trials that have a LoRA; empty if none has."""
    return ", ".join(sorted((r.trial for r in results if r.is_ok and r.trial != BASE_TRIAL), key=by_number))


def best_picks(front: Front) -> list[TrialResult]:
    """Return the knee and the best trained member in each objective, each once."""
    if front.knee is None:
        return []
    picked = [front.knee, *(front.best(name) for name in front.objectives.names)]
    return list({result.trial: result for result in picked}.values())


def export_trials(
    picks: Sequence[TrialResult], folder: RunFolder, experiment: Experiment, *, on_export: Callable[[Exported], None]
) -> None:
    """Export every pick; one that fails does not keep the others from being written.

    Raises:
        RunError: Some failed; the message names each with its reason.
    """
    faults = []
    for result in picks:
        try:
            on_export(export_trial(result, folder, experiment))
        except (RltuneError, RuntimeError, ValueError, OSError) as error:
            faults.append(f"trial {result.trial}: {error}")
    if len(faults) == len(picks) == 1:
        raise RunError(faults[0])
    if faults:
        raise RunError(f"{len(faults)} of {len(picks)} exports failed\n" + "\n".join(f"  {fault}" for fault in faults))


def export_trial(result: TrialResult, folder: RunFolder, experiment: Experiment) -> Exported:
    """Write a trial's LoRA, load it into a fresh pipeline and compare the images of the first held-out prompts.

    Both are compared in float32, whatever the run's precision: there a difference is the file's. Its folder appears
    once it has passed.

    Raises:
        RunError: The checkpoint is gone, its adapter is zero, or the reloaded LoRA is not the trained adapter.
    """
    record = read_record(folder)
    asked = experiment.concrete(result.values)
    config = with_own_prompts(settled(asked, record), folder, record)
    checkpoint = folder.path / result.checkpoint
    if not checkpoint.is_dir():
        raise RunError(f"its checkpoint {checkpoint} is gone; train it again")
    state = load_adapter(checkpoint)
    check_adapter(state)
    lora = config.model.lora
    exact = _in_float32(config)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_base_model(exact, device)
    images = eval_image_set(config, model)
    numbers = range(min(NUM_CHECKED_IMAGES, len(images)))

    def draw(drawn: ModelFamily) -> Tensor:
        # convolutions in TF32, an accelerator's default, would round more than the comparison allows
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return draw_images(make_sampler(exact, drawn), images, numbers, device)

    base_B3HW = draw(model)
    add_lora(model.network, rank=lora.rank, alpha=lora.alpha_value, targets=lora.targets, seed=0)
    load_lora_state(model.network, state)
    expected_B3HW = draw(model)
    unproved = folder.exports_dir / f"{result.trial}.unproved"
    path = write_lora(model, state, rank=lora.rank, alpha=lora.alpha_value, targets=lora.targets, folder=unproved)
    del model  # two large models need not fit beside each other
    gc.collect()
    reload = check_reload(
        path,
        load_base_model(exact, device),
        draw,
        state=state,
        scale=lora.alpha_value / lora.rank,
        base_B3HW=base_B3HW,
        expected_B3HW=expected_B3HW,
    )
    rounding = {}
    for name, dtype in HALVES.items():
        if name == "bfloat16" or device.type != "cpu":  # where float16 takes thirty times as long
            half = load_model(config.model.base, revision=config.model.revision, dtype=dtype, device=device)
            rounding[name] = rounding_of(path, half, draw, expected_B3HW)
    save_grid(to_uint8(expected_B3HW), unproved / "samples.png", columns=len(numbers))
    exported = Exported(result.trial, folder.exports_dir / result.trial, reload.difference, reload.effect, rounding)
    _write_card(unproved, result, folder, asked, images.prompts, exported, revision=config.model.revision)
    _move_files(unproved, exported.folder)
    return exported


def _in_float32(config: RunConfig) -> RunConfig:
    resources = config.resources.model_copy(update={"precision": "fp32", "prefix_precision": "same"})
    return config.model_copy(update={"resources": resources})


def _move_files(source: Path, target: Path) -> None:
    """Move a folder's files over those of another, which keeps what else is in it."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        file.replace(target / file.name)
    source.rmdir()


def _measurements(
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


def _write_card(
    target: Path,
    result: TrialResult,
    folder: RunFolder,
    config: RunConfig,
    prompts: Sequence[str],
    exported: Exported,
    *,
    revision: str | None,
) -> None:
    metrics, base_metrics, measured_on = _measurements(result, folder, config)
    write_card(
        target,
        {
            KEY: SCHEMA,
            "rltune": rltune.__version__,
            "run": folder.name,
            "trial": result.trial,
            "base_model": config.model.base,
            "base_revision": revision,
            "strength": "load at weight 1.0: alpha / rank is folded into the weights",
            "reloaded": {"difference": exported.difference, "effect": exported.effect, **exported.rounding},
            "settings": dict(result.values),
            "metrics": dict(metrics),
            "base_metrics": dict(base_metrics),
            "measured_on": measured_on,
            "trained_with": list(read_trial_versions(folder, result.trial)),
            "prompts": list(prompts[:NUM_CHECKED_IMAGES]),
            "experiment": config.model_dump(mode="json"),
        },
    )
