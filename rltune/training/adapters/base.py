"""What is optimised: an adapter of one of several kinds.

A new kind is one file in this room: a class that registers itself, takes an experiment, and thereby joins
``model.adapter.kind`` and the conformance suite, ``tests/training/adapters/test_conformance.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rltune.config.experiment import RunConfig
from rltune.diffusion.conditioning import PromptMix
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.switches import Switches
from rltune.errors import UnknownNameError, UserError
from rltune.estimators.base import Drawn
from rltune.registry import Registry


@dataclass(frozen=True)
class LoraValues:
    """A trained LoRA, as ``add_lora`` and an export format describe it."""

    state: Mapping[str, Tensor]
    """peft's key names."""
    rank: int
    alpha: float
    targets: Sequence[str]
    """Endings of the names of its layers."""
    use_rslora: bool = False
    use_dora: bool = False


@dataclass(frozen=True)
class MixValues:
    """Trained numbers that mix prompts."""

    state: Mapping[str, Tensor]
    """``lambda_T`` in float32, and ``timesteps_T`` in float64."""
    template: str
    """Of the styled prompt."""

    def mix(self) -> PromptMix:
        """Return them as they are attached to draw with."""
        mix = PromptMix(self.template, self.state["timesteps_T"], self.state["lambda_T"])
        return mix.requires_grad_(False)


class AdapterKind(Protocol):
    """Something that training changes while the base model's weights stay. A frozen dataclass with the experiment.

    The state is a dictionary of tensors under names of the kind's own: what a checkpoint holds, bit for bit.
    """

    @property
    def switches(self) -> Switches:
        """How a chain turns it off, and merges it."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards that its LoRAs are for, where it consists of several."""
        ...

    @property
    def own_format(self) -> str:
        """The name of the format that it is exported in, where no LoRA file can carry it; else empty."""
        ...

    def check(self, model: ModelFamily) -> None:
        """Check that it can go to a model without adapters, perhaps without values.

        Raises:
            UserError: It cannot, or what it starts from is not there.
        """
        ...

    def beside(self, prompts: Sequence[str]) -> Sequence[str]:
        """Return the other prompts that are embedded where images of these are drawn."""
        ...

    def start(self, model: ModelFamily, *, seed: int) -> None:
        """Attach it as training starts with it; it changes nothing yet, unless the experiment names a start.

        Args:
            model: Without adapters.
            seed: All that its first values depend on.

        Raises:
            UserError: It cannot go to this model.
        """
        ...

    def parameters(self, network: nn.Module) -> list[nn.Parameter]:
        """Return what the optimiser changes, always in the same order; float32."""
        ...

    def groups(self, network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Return the same as an optimiser's groups; decay draws towards the base model."""
        ...

    def state(self, network: nn.Module) -> dict[str, Tensor]:
        """Return a copy of its present values, on the CPU."""
        ...

    def load_state(self, network: nn.Module, state: dict[str, Tensor]) -> None:
        """Put such values in the place of those of an attached one.

        Raises:
            ValueError: They are another adapter's.
        """
        ...

    def drawn(self, seed: int, numbers: Sequence[int], device: torch.device) -> Drawn | None:
        """Return what training images of these numbers are trained at; None where all are at the experiment's weights.

        Each image's follows from the seed and its number alone, whatever worker it is on.
        """
        ...

    def measured(self, network: nn.Module) -> AbstractContextManager[None]:
        """Draw inside the block as ``restore`` would have it."""
        ...

    def restore(self, model: ModelFamily, state: dict[str, Tensor]) -> None:
        """Attach what was trained, as it is drawn with and measured, to a model without adapters."""
        ...

    def exported(self, model: ModelFamily, state: Mapping[str, Tensor]) -> LoraValues | MixValues:
        """Return what has, at strength 1, the effect of ``restore``: a LoRA, where there is one that has."""
        ...

    def parts(self, model: ModelFamily, state: Mapping[str, Tensor]) -> Mapping[str, LoraValues]:
        """Return the LoRAs that it consists of, by their names; nothing where it is one."""
        ...


ADAPTERS: Registry[AdapterKind] = Registry("adapter", "rltune.training.adapters")
"""Each is built from an experiment."""


def adapter_of(config: RunConfig) -> AdapterKind:
    """Return what an experiment optimises; nothing is attached yet.

    Raises:
        UserError: There is no such kind.
    """
    try:
        make: Callable[[RunConfig], AdapterKind] = ADAPTERS.get(config.model.adapter.kind)
    except UnknownNameError as error:
        raise UserError(f"model.adapter.kind: {error}") from error
    return make(config)
