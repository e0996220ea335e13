"""Several LoRAs trained together: one adapter in blocks, and in it weights of every image's own.

B: images. M: LoRAs. R: rank of each; LoRA i has rows i R .. i R + R - 1 of A, and these columns of B.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from rltune.diffusion.lora import ADAPTER, add_lora, lora_layers
from rltune.diffusion.switches import LORA_SWITCHES, Denoiser, Merged


@dataclass
class BasisGate:
    """The weights that the LoRAs of a network have now, of every image. Chains set them; see ``Switches``."""

    rank: int
    """R."""
    strengths_BM: Tensor | None = field(default=None, init=False)
    """None: every LoRA at strength 1, as what is in B has it."""

    def off(self, network: nn.Module) -> AbstractContextManager[None]:
        """Skip all of them."""
        return LORA_SWITCHES.off(network)

    def merged(self, network: nn.Module) -> Merged | None:
        """Merge them at the strengths that B has."""
        return LORA_SWITCHES.merged(network)

    def bound(self, denoise: Denoiser, strengths_BM: Tensor | None) -> Denoiser:
        """Return the network with these strengths; they stay set afterwards, for blocks that backward runs again."""

        def run(x_BCHW: Tensor, t: Tensor) -> Tensor:
            self.strengths_BM = strengths_BM
            return denoise(x_BCHW, t)

        return run

    def watch(self, network: nn.Module) -> None:
        """Weigh what every A gives from now on: B diag(s) A x, with s of the image that x belongs to."""
        for layer in lora_layers(network):
            layer.lora_A[ADAPTER].register_forward_hook(self._weigh)

    def _weigh(self, module: nn.Module, inputs: tuple[Tensor, ...], hidden: Tensor) -> Tensor | None:
        if self.strengths_BM is None:
            return None
        copies, odd = divmod(
            len(hidden), len(self.strengths_BM)
        )  # guidance runs every image twice, all of them in turn
        if odd:
            raise ValueError(
                f"a layer sees {len(hidden)} rows of {len(self.strengths_BM)} images: not one, or two, each"
            )
        gate = self.strengths_BM.repeat_interleave(self.rank, dim=1).repeat(copies, 1).to(hidden)
        between = [1] * (hidden.ndim - 2)
        is_conv = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)  # whose channels come before rows and columns
        return hidden * (gate.view(*gate.shape, *between) if is_conv else gate.view(len(gate), *between, -1))


def add_basis(
    network: nn.Module,
    *,
    num_loras: int,
    rank: int,
    alpha: float,
    targets: str | Sequence[str],
    seed: int,
    use_rslora: bool = False,
) -> None:
    """Attach M fresh LoRAs as one: each as ``add_lora`` attaches one of rank R, with other values.

    Arguments and errors are those of ``add_lora``; rank and alpha are of each.
    """
    add_lora(
        network,
        rank=num_loras * rank,
        alpha=alpha_together(alpha, num_loras, use_rslora=use_rslora),
        targets=targets,
        seed=seed,
        use_rslora=use_rslora,
    )
    for layer in lora_layers(network):
        layer.lora_A[ADAPTER].weight.data *= num_loras  # peft's deviation is 1 / (M R)


def alpha_together(alpha: float, num_loras: int, *, use_rslora: bool) -> float:
    """Return the alpha of an adapter of rank M R that scales as one of rank R and this alpha does."""
    return alpha * (sqrt(num_loras) if use_rslora else num_loras)


def weighted(state: Mapping[str, Tensor], weights_M: Sequence[float]) -> dict[str, Tensor]:
    """Return the values of a basis with LoRA i at weight i, in B."""
    return {
        name: _columns(tensor, weights_M) if ".lora_B." in name else tensor.clone() for name, tensor in state.items()
    }


def only(state: Mapping[str, Tensor], index: int, num_loras: int) -> dict[str, Tensor]:
    """Return the values of one LoRA of a basis."""
    return {
        name: tensor.chunk(num_loras, dim=1 if ".lora_B." in name else 0)[index].clone()
        for name, tensor in state.items()
    }


@contextmanager
def at_weights(network: nn.Module, weights_M: Sequence[float]) -> Iterator[None]:
    """Run a basis inside the block with LoRA i at weight i, the same for all images."""
    factors: list[Any] = [layer.lora_B[ADAPTER].weight for layer in lora_layers(network)]
    own = [factor.data for factor in factors]
    for factor in factors:
        factor.data = _columns(factor.data, weights_M)
    try:
        yield
    finally:
        for factor, values in zip(factors, own, strict=True):
            factor.data = values


def _columns(b: Tensor, weights_M: Sequence[float]) -> Tensor:
    weights = torch.tensor(weights_M, dtype=b.dtype, device=b.device).repeat_interleave(b.shape[1] // len(weights_M))
    return b * weights.view(1, -1, *[1] * (b.ndim - 2))
