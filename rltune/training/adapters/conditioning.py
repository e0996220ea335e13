"""Numbers that mix a prompt's embedding with a styled one's, one a sampling step (Wu et al., arXiv:2212.08698)."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rltune.config.experiment import RunConfig
from rltune.diffusion.conditioning import PromptMix, attach_mix, attached_mix, styled, unfit
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.switches import LORA_SWITCHES, Switches
from rltune.training.adapters.base import ADAPTERS, LoraValues, MixValues
from rltune.training.sampling import make_sampler

NAMES = ("lambda_T", "timesteps_T")
"""Of a state's tensors."""


@ADAPTERS.register("conditioning")
@dataclass(frozen=True)
class Conditioning:
    """One number for each of ``sampler.steps``, which mixes in the prompt as ``model.conditioning.styled`` has it.

    Those of ``sampler.base_steps`` stay 0. The method's own range, [0, 1], is not enforced.
    """

    config: RunConfig

    @property
    def template(self) -> str:
        """Of the styled prompts."""
        return self.config.model.conditioning.styled

    @property
    def switches(self) -> Switches:
        """Those of whatever is attached."""
        return LORA_SWITCHES

    @property
    def names(self) -> tuple[str, ...]:
        """None: it is one."""
        return ()

    @property
    def own_format(self) -> str:
        """Its own."""
        return "conditioning"

    def check(self, model: ModelFamily) -> None:
        """Check that the model's prompts can be mixed."""
        if not model.has_fixed_text:
            raise unfit(model)

    def beside(self, prompts: Sequence[str]) -> list[str]:
        """Return the styled prompts."""
        return [styled(self.template, prompt) for prompt in prompts]

    def start(self, model: ModelFamily, *, seed: int) -> None:
        """Attach zeros."""
        table = make_sampler(self.config, model).table
        attach_mix(model, PromptMix(self.template, table.timesteps_T))

    def parameters(self, network: nn.Module) -> list[nn.Parameter]:
        """Return the numbers, as one parameter."""
        return [_mix(network).lambda_T]

    def groups(self, network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Return the same, with decay: 0 is the base model."""
        return [{"params": self.parameters(network), "weight_decay": weight_decay}]

    def state(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the numbers and their timesteps."""
        mix = _mix(network)
        return {name: getattr(mix, name).detach().cpu().clone() for name in NAMES}

    def load_state(self, network: nn.Module, state: dict[str, Tensor]) -> None:
        """Put in numbers of the same timesteps."""
        mix = _mix(network)
        if set(state) != set(NAMES):
            raise ValueError(f"adapter keys differ from those of conditioning: {sorted(set(state) ^ set(NAMES))[:3]}")
        if not torch.equal(state["timesteps_T"], mix.timesteps_T.cpu()):
            raise ValueError(f"these are numbers of other timesteps: {state['timesteps_T'].tolist()[:3]} ..")
        with torch.no_grad():
            mix.lambda_T.copy_(state["lambda_T"])

    def drawn(self, seed: int, numbers: Sequence[int], device: torch.device) -> None:
        """Every image is at the experiment's weights."""

    def measured(self, network: nn.Module) -> AbstractContextManager[None]:
        """As it is."""
        return nullcontext()

    def restore(self, model: ModelFamily, state: dict[str, Tensor]) -> None:
        """Attach the numbers; at other timesteps they are interpolated."""
        attach_mix(model, self.exported(model, state).mix())

    def exported(self, model: ModelFamily, state: Mapping[str, Tensor]) -> MixValues:
        """Return itself."""
        return MixValues(state, self.template)

    def parts(self, model: ModelFamily, state: Mapping[str, Tensor]) -> Mapping[str, LoraValues]:
        """Return nothing: it is one."""
        return {}


def _mix(network: nn.Module) -> PromptMix:
    mix = attached_mix(network)
    assert mix is not None, "nothing is attached"
    return mix
