"""Low-rank adapters, ``model.lora``: what is trained where an experiment does not say."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rltune.config.experiment import RunConfig
from rltune.config.model_section import LoraConfig
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import add_lora, load_lora_state, lora_parameters, lora_state, weight_decay_groups
from rltune.diffusion.lora_start import Factors, check_start, read_lora, start_from
from rltune.diffusion.switches import LORA_SWITCHES, Switches
from rltune.errors import UserError
from rltune.training.adapters.base import ADAPTERS, LoraValues


class LoraTensors:
    """The tensors of LoRAs on a network: what kinds that consist of LoRAs have in common."""

    own_format = ""

    def parameters(self, network: nn.Module) -> list[nn.Parameter]:
        """Return the factors, and DoRA's magnitudes."""
        return lora_parameters(network)

    def groups(self, network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Return the factors with decay, DoRA's magnitudes without."""
        return weight_decay_groups(network, weight_decay)

    def state(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the values, peft's key names; those of a basis side by side."""
        return lora_state(network)

    def load_state(self, network: nn.Module, state: dict[str, Tensor]) -> None:
        """Put in values of peft's key names."""
        load_lora_state(network, state)

    def beside(self, prompts: Sequence[str]) -> Sequence[str]:
        """Return none: prompts are what they are."""
        return ()


@ADAPTERS.register("lora")
@dataclass(frozen=True)
class Lora(LoraTensors):
    """One LoRA, or DoRA, in the layers that ``model.lora.targets`` names."""

    config: RunConfig

    @property
    def switches(self) -> Switches:
        """Those of LoRAs."""
        return LORA_SWITCHES

    @property
    def names(self) -> tuple[str, ...]:
        """None: it is one."""
        return ()

    def check(self, model: ModelFamily) -> None:
        """Check that ``model.lora.start`` is there and fits; targets are looked at apart."""
        read_start(model, self.config.model.lora)

    def start(self, model: ModelFamily, *, seed: int) -> None:
        """Attach it fresh, or as ``model.lora.start``."""
        attach_started_lora(model, self.config.model.lora, seed=seed)

    def drawn(self, seed: int, numbers: Sequence[int], device: torch.device) -> None:
        """Every image is at the experiment's weights."""

    def measured(self, network: nn.Module) -> AbstractContextManager[None]:
        """As it is."""
        return nullcontext()

    def restore(self, model: ModelFamily, state: dict[str, Tensor]) -> None:
        """Attach it with these values."""
        attach_values(model, self.exported(model, state))

    def exported(self, model: ModelFamily, state: Mapping[str, Tensor]) -> LoraValues:
        """Return itself."""
        lora = self.config.model.lora
        targets = model.lora_layers(lora.targets)
        return LoraValues(state, lora.rank, lora.alpha_value, targets, lora.rslora, lora.dora)

    def parts(self, model: ModelFamily, state: Mapping[str, Tensor]) -> Mapping[str, LoraValues]:
        """Return nothing: it is one."""
        return {}


def attach_values(model: ModelFamily, values: LoraValues) -> None:
    """Attach a trained LoRA to a model without adapters."""
    add_lora(
        model.network,
        rank=values.rank,
        alpha=values.alpha,
        targets=values.targets,
        seed=0,
        use_rslora=values.use_rslora,
        use_dora=values.use_dora,
    )
    load_lora_state(model.network, dict(values.state))


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
