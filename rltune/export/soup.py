"""A soup of LoRAs as one file that diffusers loads, proved like a trained one."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rltune
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import ADAPTER, lora_state, remove_lora
from rltune.diffusion.soup import Layers, attach
from rltune.export.base import EXPORT_FORMATS, Adapter
from rltune.export.card import write_card
from rltune.export.proof import Trained, check_reload
from rltune.records import to_record
from rltune.training.evaluation import draw_images, save_grid, to_uint8
from rltune.training.model_cache import load_base_model
from rltune.training.sampling import make_sampler
from rltune.training.setup import Run

NUM_CHECKED_IMAGES = 4
FORMAT = "diffusers"


def export_soup(
    run: Run, layers: Layers, folder: Path, made_of: Mapping[str, Any], measured_again: Mapping[str, Any]
) -> str:
    """Write a soup for diffusers, load it into a fresh pipeline and compare it with the soup itself, in float32.

    Args:
        run: Its experiment, and the images that are compared.
        layers: The soup.
        folder: Receives the file, its card and samples.
        made_of: What the card says of the soup.
        measured_again: What it was measured on, as the card of a trial has it.

    Returns:
        What was compared, in words.

    Raises:
        RunError: The soup changes nothing, or the file is not the soup.
    """
    resources = run.config.resources.model_copy(update={"precision": "fp32", "decoder_precision": "same"})
    exact = run.config.model_copy(update={"resources": resources})
    device, numbers = run.workers.device, range(min(NUM_CHECKED_IMAGES, len(run.eval_images)))

    def draw(model: ModelFamily) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return draw_images(make_sampler(exact, model), run.eval_images, numbers, device)

    form = EXPORT_FORMATS.build(FORMAT, {})
    model = load_base_model(exact, device)
    base_B3HW = draw(model)
    attach(model.network, layers, ADAPTER)
    rank = next(iter(layers.values())).rank
    adapter = Adapter(lora_state(model.network), rank, float(rank), list(layers))
    trained = Trained(adapter, draw, base_B3HW, draw(model))
    draft = folder.with_name(f"{folder.name}.unproved")
    shutil.rmtree(draft, ignore_errors=True)
    files = form.write(model, adapter, draft)
    remove_lora(model.network)
    reload = check_reload(form, draft, model, trained)
    card = {
        "rltune": rltune.__version__,
        "soup": dict(made_of),
        "measured_again": dict(measured_again),
        "base_model": run.config.model.base,
        "base_revision": run.config.model.revision,
        "strength": "load at weight 1.0",
        "formats": {FORMAT: {"files": [str(file.relative_to(draft)) for file in files]}},
        "prompts": [str(run.eval_images.prompt_of(number)) for number in numbers],
        "experiment": run.config.model_dump(mode="json"),
    }
    write_card(draft, json.loads(json.dumps(to_record(card))))
    save_grid(to_uint8(trained.images_B3HW), draft / "samples.png", columns=len(numbers))
    for file in files:
        file.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return f"reloaded and compared in float32: images agree to {reload.difference:.1g}"
