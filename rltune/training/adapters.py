"""The adapters that an experiment asks for, on a loaded model."""

from rltune.config.sections import LoraConfig
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import add_lora


def attach_lora(model: ModelFamily, lora: LoraConfig, *, seed: int = 0) -> None:
    """Attach fresh adapters, which change nothing yet.

    Raises:
        ValueError: One of the targets is no layer that can have adapters.
    """
    add_lora(
        model.network,
        rank=lora.rank,
        alpha=lora.alpha_value,
        targets=model.lora_layers(lora.targets),
        seed=seed,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
