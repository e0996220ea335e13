"""One file that diffusers loads by ``load_lora_weights``."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import adapter_updates, target_modules
from rltune.diffusion.lora_files import WEIGHT_FILE, load_lora_file
from rltune.export.base import EXPORT_FORMATS, Adapter


@EXPORT_FORMATS.register("diffusers")
@dataclass(frozen=True)
class Diffusers:
    """``pytorch_lora_weights.safetensors``, with the adapter's settings in its header for those who read them."""

    reader: ClassVar[str] = "diffusers"

    def write(self, model: ModelFamily, adapter: Adapter, folder: Path) -> tuple[Path, ...]:
        """Write the file as the pipeline's own class does."""
        metadata = {
            "r": adapter.rank,
            "lora_alpha": adapter.rank,
            "target_modules": target_modules(adapter.targets),
            "init_lora_weights": True,
            **({"use_dora": True} if adapter.use_dora else {}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        prefix = model.lora_prefix
        layers = {f"{prefix}_lora_layers": adapter.folded(), f"{prefix}_lora_adapter_metadata": metadata}
        model.pipeline.save_lora_weights(folder, **layers)
        return (folder / WEIGHT_FILE,)

    def load(self, model: ModelFamily, folder: Path) -> Iterable[tuple[str, Tensor]]:
        """Load it by the pipeline; tensors that diffusers would pass over with a warning are refused."""
        load_lora_file(model, folder / WEIGHT_FILE)
        return adapter_updates(model.network)

    def how_to_load(self, model: ModelFamily, folder: Path) -> str:
        """Return a call of the pipeline."""
        return f"pipeline.load_lora_weights({str(folder)!r})"
