"""Trials of a run as LoRA files."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment
from rltune.diffusion.conditioning import attach_mix
from rltune.diffusion.families.base import ModelFamily
from rltune.errors import RunError, UserError
from rltune.export.base import Adapter, ExportFormat
from rltune.export.card import card_of, strength_of_basis
from rltune.export.conditioning import ConditioningFile, Mixed
from rltune.export.effect import Effect
from rltune.export.write import Exported, Order, Source, export_all, lora_forms
from rltune.redaction import redact
from rltune.runs.layout import RunFolder
from rltune.runs.record import read_record, settled, with_own_prompts
from rltune.runs.results import TrialResult
from rltune.training.adapters.base import AdapterKind, MixValues, adapter_of
from rltune.training.adapters.conditioning import Conditioning
from rltune.training.adapters.lora import attach_values
from rltune.training.checkpoint import load_adapter

OWN = ConditioningFile()
"""The format of what is no LoRA."""
STRENGTH = "every number is as trained; times s, it is at strength s"


def export_trials(
    picks: Sequence[TrialResult],
    folder: RunFolder,
    experiment: Experiment,
    *,
    on_export: Callable[[Exported], None],
    formats: Sequence[str] = (),
) -> None:
    """Export every pick in every format; one that fails does not keep the others from being written.

    Raises:
        UserError: A format is unknown, or not one of what was trained; nothing was written.
        RunError: Some failed; the message names each with its reason.
    """
    orders: dict[str, Order] = {}
    for result in picks:
        kind, called = adapter_of(experiment.concrete(result.values)), f"trial {result.trial}"
        forms, make = forms_of(kind, formats), partial(_source_of, result, folder, experiment)
        orders |= {called: Order(make, forms)}
        orders |= {f"{called}, {part}": Order(partial(make, part=part), forms) for part in kind.names}
    try:
        export_all(orders, on_export)
    finally:
        folder.publish(folder.exports_dir)


def forms_of(kind: AdapterKind, formats: Sequence[str]) -> dict[str, ExportFormat[Any]]:
    """Return the formats of a kind of adapter by their names; its default one where none is named.

    Raises:
        UserError: One is unknown, or cannot carry it.
    """
    if not kind.own_format:
        return lora_forms(formats)
    if others := [name for name in formats if name != kind.own_format]:
        raise UserError(
            f"--format: {kind.own_format} is no LoRA, and is exported as {kind.own_format} alone, got {others[0]!r}; "
            "leave it out"
        )
    return {OWN.name: OWN}


def _source_of(result: TrialResult, folder: RunFolder, experiment: Experiment, *, part: str = "") -> Source:
    """Return a trial as what is exported, or one of the LoRAs that it consists of.

    Raises:
        RunError: Its checkpoint is gone, or the run's prompts are.
    """
    record = read_record(folder)
    asked = experiment.concrete(result.values)
    config = with_own_prompts(settled(asked, record), folder, record)
    checkpoint = folder.path / result.checkpoint
    folder.bring(checkpoint)
    if not checkpoint.is_dir():
        raise RunError(f"its checkpoint {checkpoint} is gone; train it again")

    def attach(model: ModelFamily) -> Adapter | Mixed:
        kind, state = adapter_of(config), load_adapter(checkpoint)
        values = kind.parts(model, state)[part] if part else kind.exported(model, state)
        if isinstance(values, MixValues):
            attach_mix(model, values.mix())
            return Mixed(values, config, _about(result, folder, asked))
        attach_values(model, values)
        return Adapter.of(values, about=_about(result, folder, asked))

    def card(prompts: Sequence[str], effect: Effect, formats: Mapping[str, Any]) -> dict[str, Any]:
        told = card_of(result, folder, asked, settled=config, prompts=prompts, effect=effect, formats=formats)
        kind = adapter_of(config)
        names = kind.names
        if isinstance(kind, Conditioning):
            is_trained = config.num_rounds > 0
            mix = {"styled": kind.template, "numbers": config.sampler.steps if is_trained else 0}
            return {**told, "conditioning": mix, "strength": STRENGTH if is_trained else "write every prompt so"}
        if not names:
            return told
        own = {name: config.weights[name] / sum(config.weights[each] for each in names) for name in names}
        return {**told, "basis": own, "strength": strength_of_basis(result.trial, own, part)}

    name = f"{result.trial}-{part}" if part else result.trial
    return Source(name, folder.exports_dir / name, config, attach, card)


def _about(result: TrialResult, folder: RunFolder, asked: RunConfig) -> dict[str, str]:
    """Return what headers say of a trial's LoRA."""
    weights = ", ".join(f"{name} {weight:.3g}" for name, weight in asked.weights.items() if weight)
    about = {
        "title": f"{folder.name} {result.trial}",
        "description": f"LoRA for {asked.model.base}, trained by rltune on {weights}",
        "date": result.ended_at,
    }
    return {name: redact(text) for name, text in about.items() if text}
