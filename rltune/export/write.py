"""LoRAs as files: written, loaded again, compared, and only then put in their place."""

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.diffusion.families.base import ModelFamily
from rltune.errors import RltuneError, RunError
from rltune.export.base import DEFAULT_FORMATS, EXPORT_FORMATS, Adapter, ExportFormat
from rltune.export.card import formats_told, write_card, write_experiment
from rltune.export.conditioning import Mixed
from rltune.export.effect import Effect, effect_of
from rltune.export.proof import Trained, check_reload, rounding_of
from rltune.export.readme import write_readme
from rltune.training.evaluation import draw_images, save_grid, to_uint8
from rltune.training.model_cache import load_base_model
from rltune.training.sampling import image_px, make_sampler
from rltune.training.setup import eval_image_set

NUM_CHECKED_IMAGES = 4
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Number formats that LoRAs are used in; an accelerator's default here is bfloat16."""
FAULTS = (RltuneError, RuntimeError, ValueError, OSError)
"""What keeps one LoRA from being exported, and not the others."""


@dataclass(frozen=True)
class Exported:
    """A LoRA on disk, in one format."""

    trial: str
    folder: Path
    difference: float
    """Greatest difference of an image after reloading, RGB in [0, 1], float32."""
    effect: float
    """Greatest difference of an image from the base model's, the same."""
    rounding: Mapping[str, float]
    """Greatest difference of an image in another number format from float32's, by number format."""
    format: str
    how_to_load: str
    """Lines of Python that load it into ``pipeline``."""
    size: Effect | None = None
    """What it changes at strength 1."""

    @property
    def proof(self) -> str:
        """What was compared, in words."""
        formats = ", ".join(f"{name} changes them by {value:.1g}" for name, value in self.rounding.items())
        told = f"reloaded and compared in float32: images agree to {self.difference:.1g}; {formats}"
        return told if self.size is None else f"{told}; at strength 1 {self.size}"


@dataclass(frozen=True)
class Source:
    """A LoRA that is to be exported, and what is told of it."""

    name: str
    """Of its folder, and what it is picked by."""
    place: Path
    """Its folder."""
    config: RunConfig
    """What it is drawn by, with what was settled when its run began, and with its own prompts."""
    attach: Callable[[ModelFamily], Adapter | Mixed]
    """Puts it on a model without adapters, in float32, and returns it."""
    card: Callable[[Sequence[str], Effect, Mapping[str, Any]], dict[str, Any]]
    """Its card, from the prompts of the samples, what it changes, and its formats."""


@dataclass(frozen=True)
class Order:
    """What is to be exported, and how."""

    make: Callable[[], Source]
    forms: Mapping[str, ExportFormat[Any]]
    """The formats, by name."""


def export_all(orders: Mapping[str, Order], on_export: Callable[[Exported], None]) -> None:
    """Export every LoRA in every format; one that fails does not keep the others from being written.

    Args:
        orders: What each is called in messages, and what it is.
        on_export: Is told of each that went well.

    Raises:
        RunError: Some failed; the message names each with its reason.
    """
    num_failed, faults = 0, []
    for called, order in orders.items():
        forms = order.forms
        failed = _export(order.make, forms, on_export)
        num_failed += len(failed)
        if len(failed) == len(forms) and len(reasons := set(failed.values())) == 1:
            faults.append(f"{called}: {reasons.pop()}")
        else:
            faults += [f"{called} for {name}: {reason}" for name, reason in failed.items()]
    num = sum(len(order.forms) for order in orders.values())
    if num_failed == num == 1:
        raise RunError(faults[0])
    if faults:
        raise RunError(f"{num_failed} of {num} exports failed\n" + "\n".join(f"  {fault}" for fault in faults))


def lora_forms(formats: Sequence[str]) -> dict[str, ExportFormat[Any]]:
    """Return formats of LoRAs by their names; the default one where none is named.

    Raises:
        UserError: One is unknown.
    """
    return {name: EXPORT_FORMATS.build(name, {}) for name in formats or DEFAULT_FORMATS}


def _export(
    make: Callable[[], Source], forms: Mapping[str, ExportFormat[Any]], on_export: Callable[[Exported], None]
) -> dict[str, str]:
    """Export a LoRA in some formats, tell of each that went well, and return why the others failed, by format."""
    failed: dict[str, str] = {}
    try:
        draft, model = _draw(make())
    except FAULTS as error:
        return dict.fromkeys(forms, str(error))
    written = {}
    shutil.rmtree(draft.unproved, ignore_errors=True)  # of an attempt that failed
    for name, form in forms.items():
        with _noting(failed, name):
            written[name] = form.write(model, draft.trained.adapter, draft.unproved / name)
    del model  # two large models need not fit beside each other
    for name, files in written.items():
        gc.collect()
        with _noting(failed, name):
            on_export(_prove(draft, name, forms[name], files))
    return failed


@contextmanager
def _noting(failed: dict[str, str], name: str) -> Iterator[None]:
    """End the block at a fault, and note why."""
    try:
        yield
    except FAULTS as error:
        failed[name] = str(error)


@dataclass(frozen=True)
class _Draft:
    """A LoRA that is to be written, and what it has to be equal to."""

    source: Source
    device: torch.device
    trained: Trained
    effect: Effect
    prompts: tuple[str, ...]
    """Of the images."""

    @property
    def unproved(self) -> Path:
        """Where files are until they have passed."""
        return self.source.place.with_name(f"{self.source.name}.unproved")


def _draw(source: Source) -> tuple[_Draft, ModelFamily]:
    """Draw the first held-out prompts without and with a LoRA, and return the model that has it, too.

    In float32, whatever the run's precision: there a difference that a reload makes is the file's.

    Raises:
        RunError: It is gone, or zero, or not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    exact = _in_float32(source.config)
    model = load_base_model(exact, device)
    images = eval_image_set(source.config, model)
    numbers = range(min(NUM_CHECKED_IMAGES, len(images)))

    def draw(drawn: ModelFamily) -> Tensor:
        # convolutions in TF32, an accelerator's default, would round more than the comparison allows
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return draw_images(make_sampler(exact, drawn), images, numbers, device)

    base_B3HW = draw(model)
    adapter = source.attach(model)
    height_px, width_px = image_px(exact, model)
    adapter = replace(adapter, about={**adapter.about, "resolution": f"{width_px}x{height_px}"})
    trained = Trained(adapter, draw, base_B3HW, images_B3HW=draw(model))
    effect = effect_of(model.network, base_B3HW, trained.images_B3HW)
    return _Draft(source, device, trained, effect, tuple(images.prompts[:NUM_CHECKED_IMAGES])), model


def _prove(draft: _Draft, name: str, form: ExportFormat[Any], files: Sequence[Path]) -> Exported:
    """Load what was written into a fresh pipeline, compare, and put it in its place with a card and samples.

    Raises:
        RunError: The reloaded LoRA is not the trained adapter.
    """
    config, source = draft.source.config, draft.unproved / name
    target = draft.source.place
    fresh = load_base_model(_in_float32(config), draft.device)
    how_to_load = form.how_to_load(fresh, target)
    reload = check_reload(form, source, fresh, draft.trained)
    family = type(fresh.pipeline).__name__
    del fresh
    rounding = {}
    for number_format, dtype in HALVES.items():
        if number_format == "bfloat16" or draft.device.type != "cpu":  # where float16 takes thirty times as long
            half = load_base_model(config, draft.device, dtype=dtype)
            rounding[number_format] = rounding_of(form, source, half, draft.trained)
    exported = Exported(
        draft.source.name,
        target,
        reload.difference,
        reload.effect,
        rounding,
        format=name,
        how_to_load=how_to_load,
        size=draft.effect,
    )
    _save_samples(draft.trained, source)
    _write_card(draft, exported, [str(file.relative_to(source)) for file in files], family=family)
    for file in files:
        file.chmod(0o644)  # safetensors writes 0600, which another user cannot read
    _move_files(source, target)
    return exported


def _save_samples(trained: Trained, folder: Path) -> None:
    """Write the images of the proof: with the LoRA and without in a row each, and singly those with it."""
    with_NHW3, without_NHW3 = to_uint8(trained.images_B3HW), to_uint8(trained.base_B3HW)
    save_grid(with_NHW3, folder / "samples.png", columns=len(with_NHW3))
    save_grid(without_NHW3, folder / "base.png", columns=len(without_NHW3))
    for number, image_HW3 in enumerate(with_NHW3, 1):
        save_grid(image_HW3[None], folder / "samples" / f"{number}.png", columns=1)


def _write_card(draft: _Draft, exported: Exported, files: Sequence[str], *, family: str) -> None:
    """Write card, README and experiment into the folder of a format; the card tells of those in its place, too."""
    figures = {"difference": exported.difference, "effect": exported.effect, **exported.rounding}
    formats = {**formats_told(exported.folder), exported.format: {"files": list(files), "reloaded": figures}}
    card, folder = draft.source.card(draft.prompts, draft.effect, formats), draft.unproved / exported.format
    write_card(folder, card)
    if "soup" not in card:
        write_experiment(folder, card)
    write_readme(folder, card, family=family)


def _in_float32(config: RunConfig) -> RunConfig:
    resources = config.resources.model_copy(
        update={"precision": "fp32", "decoder_precision": "same", "prefix_precision": "same"}
    )
    model = config.model.model_copy(update={"quantise": "none"})  # the model that the files are for
    return config.model_copy(update={"resources": resources, "model": model})


def _move_files(source: Path, target: Path) -> None:
    """Move what a folder holds into another, which keeps what else is in it."""
    target.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        if (there := target / item.name).is_dir():
            shutil.rmtree(there)  # a folder is of one format, and as a whole
        item.replace(target / item.name)
    source.rmdir()
    if not any(source.parent.iterdir()):
        source.parent.rmdir()
