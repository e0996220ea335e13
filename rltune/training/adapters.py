"""The adapters that an experiment asks for, on a loaded model."""

from pathlib import Path

from rltune.config.model_section import LoraConfig
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import add_lora
from rltune.diffusion.lora_start import Factors, check_start, read_lora, start_from
from rltune.errors import UserError


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


def attach_started_lora(model: ModelFamily, lora: LoraConfig, *, seed: int) -> None:
    """Attach adapters as training starts with them: fresh, or ``model.lora.start``.

    Raises:
        UserError: A target is no layer that can have adapters, or the LoRA to start from does not fit.
    """
    factors = read_start(model, lora)
    try:
        attach_lora(model, lora, seed=seed)
    except ValueError as error:
        raise UserError(f"model.lora.targets: {error}") from error
    if factors is not None:
        start_from(model.network, factors)


def read_start(model: ModelFamily, lora: LoraConfig) -> dict[str, Factors] | None:
    """Return the LoRA to start from, None where there is none; the model is without adapters, perhaps without values.

    Raises:
        UserError: There is no such file, or it is not of this model, rank and targets.
    """
    if lora.start is None:
        return None
    path = Path(lora.start)
    try:
        factors = read_lora(model, path)
        check_start(factors, path, layers=model.lora_layers(lora.targets), rank=lora.rank, use_dora=lora.dora)
    except UserError as error:
        raise UserError(f"model.lora.start: {error}") from error
    return factors
