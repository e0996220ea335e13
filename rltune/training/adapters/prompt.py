"""Words that a template adds to every prompt: nothing is trained, and a search over them says what words alone gain.

Inspired by the search over attributes of a prompt of RLDF (arXiv:2311.15648), whose formulas are not public.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rltune.config.experiment import RunConfig
from rltune.diffusion.conditioning import PromptMix, attach_mix
from rltune.diffusion.families.base import ModelFamily
from rltune.training.adapters.base import ADAPTERS
from rltune.training.adapters.conditioning import Conditioning
from rltune.training.sampling import make_sampler


@ADAPTERS.register("prompt")
@dataclass(frozen=True)
class Words(Conditioning):
    """``model.prompt``: the network is told of the styled prompt alone, as numbers that are all 1 would have it."""

    config: RunConfig

    @property
    def template(self) -> str:
        """With the words in their places."""
        section = self.config.model.prompt
        return filled(section.template, section.words)

    def check(self, model: ModelFamily) -> None:
        """Do nothing: every model has prompts."""

    def start(self, model: ModelFamily, *, seed: int) -> None:
        """Attach them."""
        timesteps_T = make_sampler(self.config, model).table.timesteps_T
        mix = PromptMix(self.template, timesteps_T, torch.ones(len(timesteps_T)))
        attach_mix(model, mix.requires_grad_(False))

    def parameters(self, network: nn.Module) -> list[nn.Parameter]:
        """Return none."""
        return []

    def groups(self, network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Return a group of none."""
        return [{"params": []}]


def filled(template: str, words: Mapping[str, str]) -> str:
    """Return a template with words in the places of their names; where one is empty, its comma goes too."""
    for name, word in words.items():
        template = template.replace(f"{{{name}}}", word.strip())
    if all(word.strip() for word in words.values()):
        return template
    return ", ".join(part for part in map(str.strip, template.split(",")) if part)
