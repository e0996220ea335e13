"""A folder that peft loads: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peft import LoraConfig, PeftModel, load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import ADAPTER, adapter_updates, lora_state, target_modules
from rltune.diffusion.lora_files import PEFT_PREFIX, PEFT_SETTINGS_FILE, PEFT_WEIGHT_FILE
from rltune.errors import UserError
from rltune.export.base import EXPORT_FORMATS, Adapter

NUM_NAMED = 3


@EXPORT_FORMATS.register("peft")
@dataclass(frozen=True)
class Peft:
    """What ``PeftModel.save_pretrained`` writes; the adapter stays float32 in a base model of half precision."""

    reader: ClassVar[str] = "peft"

    def write(self, model: ModelFamily, adapter: Adapter, folder: Path) -> tuple[Path, ...]:
        """Write both files; the scale is in the weights, and alpha is the rank."""
        folder.mkdir(parents=True, exist_ok=True)
        targets = target_modules(adapter.targets)
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.rank,
            target_modules=targets,
            use_dora=adapter.use_dora,
            inference_mode=True,
        )
        # peft holds the targets as a set, whose order changes from one process to the next
        settings = {**config.to_dict(), "target_modules": targets}
        weights_file, settings_file = folder / PEFT_WEIGHT_FILE, folder / PEFT_SETTINGS_FILE
        weights = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in adapter.folded().items()}
        save_file(weights, weights_file, metadata={"format": "pt"})
        settings_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        return weights_file, settings_file

    def load(self, model: ModelFamily, folder: Path) -> Iterable[tuple[str, Tensor]]:
        """Load it by ``PeftModel``; what peft passes over without a word, or with a warning, is refused."""
        file = folder / PEFT_WEIGHT_FILE
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of missing tensors, which are found below
                PeftModel.from_pretrained(model.network, folder, adapter_name=ADAPTER)
            held = {name.removeprefix(PEFT_PREFIX) for name in load_peft_weights(str(folder), device="cpu")}
        except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
            raise UserError(f"{file}: peft cannot load it into this base model ({error})") from error
        places = set(lora_state(model.network))
        if stray := sorted(held - places):
            raise UserError(f"{file}: this base model has no place for {', '.join(stray[:NUM_NAMED])}")
        if bare := sorted(places - held):
            raise UserError(f"{file}: a part is missing, it has no values for {', '.join(bare[:NUM_NAMED])}")
        return adapter_updates(model.network)

    def how_to_load(self, model: ModelFamily, folder: Path) -> str:
        """Return a call of ``PeftModel``, which puts the adapters into the pipeline's own network."""
        call = f"PeftModel.from_pretrained(pipeline.{model.lora_prefix}, {str(folder)!r})"
        return f"from peft import PeftModel\n{call}"
