"""A basis of LoRAs, one a reward, trained together: at any weights on the simplex their sum is good for that mix."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rltune.config.experiment import RunConfig
from rltune.diffusion.basis import BasisGate, add_basis, alpha_together, at_weights, only, weighted
from rltune.diffusion.families.base import ModelFamily
from rltune.errors import UserError
from rltune.estimators.base import Drawn
from rltune.training.adapters.base import ADAPTERS, LoraValues
from rltune.training.adapters.lora import LoraTensors, attach_values
from rltune.training.streams import Stream, generator


@ADAPTERS.register("basis")
@dataclass(frozen=True)
class Basis(LoraTensors):
    """LoRAs as ``model.lora`` has them, one for each reward of positive weight, in the rewards' order.

    What is measured, restored and exported as one LoRA is their sum by weights: those of the rewards, or ``mix``.
    """

    config: RunConfig
    mix: tuple[float, ...] | None = None
    """Weights of the sum, where they are not those of the rewards."""

    @cached_property
    def switches(self) -> BasisGate:
        """The strengths that its LoRAs have now."""
        return BasisGate(self.config.model.lora.rank)

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards that its LoRAs are for."""
        return self.config.trained_rewards

    @property
    def weights_M(self) -> tuple[float, ...]:
        """Of the sum."""
        if self.mix is not None:
            return self.mix
        total = sum(self.config.weights[name] for name in self.names)
        return tuple(self.config.weights[name] / total for name in self.names)

    def check(self, model: ModelFamily) -> None:
        """Nothing but its targets decides it, and those are looked at apart."""

    def start(self, model: ModelFamily, *, seed: int) -> None:
        """Attach all of them, fresh, and weigh them image by image from now on."""
        lora = self.config.model.lora
        try:
            add_basis(
                model.network,
                num_loras=len(self.names),
                rank=lora.rank,
                alpha=lora.alpha_value,
                targets=model.lora_layers(lora.targets),
                seed=seed,
                use_rslora=lora.rslora,
            )
        except ValueError as error:
            raise UserError(f"model.lora.targets: {error}") from error
        self.switches.watch(model.network)

    def drawn(self, seed: int, numbers: Sequence[int], device: torch.device) -> Drawn:
        """Return weights on the simplex for each training image, and its LoRAs' strengths: weights times a strength."""
        rows = [self._draw(generator(seed, Stream.BASIS, number)) for number in numbers]
        weights_BM = torch.tensor(np.array([weights for weights, _ in rows]), dtype=torch.float32, device=device)
        strength_B1 = torch.tensor([[strength] for _, strength in rows], dtype=torch.float32, device=device)
        return Drawn(dict(zip(self.names, weights_BM.unbind(dim=1), strict=True)), weights_BM * strength_B1)

    def measured(self, network: nn.Module) -> AbstractContextManager[None]:
        """Draw with the weighted sum inside the block."""
        return at_weights(network, self.weights_M)

    def restore(self, model: ModelFamily, state: dict[str, Tensor]) -> None:
        """Attach the weighted sum, an ordinary LoRA."""
        attach_values(model, self.exported(model, state))

    def exported(self, model: ModelFamily, state: Mapping[str, Tensor]) -> LoraValues:
        """Return the weighted sum: its rank is that of all together."""
        lora, num = self.config.model.lora, len(self.names)
        alpha = alpha_together(lora.alpha_value, num, use_rslora=lora.rslora)
        targets = model.lora_layers(lora.targets)
        return LoraValues(weighted(state, self.weights_M), num * lora.rank, alpha, targets, lora.rslora)

    def parts(self, model: ModelFamily, state: Mapping[str, Tensor]) -> Mapping[str, LoraValues]:
        """Return its LoRAs, each by the reward that it is for."""
        lora, targets = self.config.model.lora, model.lora_layers(self.config.model.lora.targets)
        return {
            name: LoraValues(only(state, i, len(self.names)), lora.rank, lora.alpha_value, targets, lora.rslora)
            for i, name in enumerate(self.names)
        }

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], float]:
        section, num = self.config.model.basis, len(self.names)
        place, corner = rng.random(), rng.integers(num)
        weights_M = rng.dirichlet([section.concentration] * num)
        strength = rng.uniform(section.least_strength, 1.0)
        if place < section.corners:
            weights_M = np.eye(num)[corner]
        elif place < section.corners + section.centre:
            weights_M = np.full(num, 1 / num)
        return weights_M, strength
