"""What a chain asks of whatever is trained on its network: to be off for a while, and to be merged where it can be."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rltune.diffusion.conditioning import attached_mix, mix_off, remove_mix
from rltune.diffusion.lora import ADAPTER, MergedLora, adapters_off, remove_lora

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""As in ``chain.py``."""


class Merged(Protocol):
    """What is trained, folded into the network for calls without gradient."""

    def swapped_in(self) -> AbstractContextManager[None]:
        """Let the network run so inside the block."""
        ...


class Switches(Protocol):
    """How a chain turns what is trained off, merges it, and gives every image its own strengths of it.

    B: images. M: of what an adapter has several.
    """

    def off(self, network: nn.Module) -> AbstractContextManager[None]:
        """Run the network as the base model inside the block, also where nothing is attached to it."""
        ...

    def merged(self, network: nn.Module) -> Merged | None:
        """Return what runs faster without gradient, the same function to rounding; None where nothing does.

        It knows one strength for all images.
        """
        ...

    def bound(self, denoise: Denoiser, strengths_BM: Tensor | None) -> Denoiser:
        """Return the network with strengths of every image's own; with None those that it is attached with."""
        ...


class LoraSwitches:
    """Of LoRAs, of any name and number, and of numbers that mix prompts."""

    @contextmanager
    def off(self, network: nn.Module) -> Iterator[None]:
        """Skip them."""
        with adapters_off(network), mix_off(network):
            yield

    def merged(self, network: nn.Module) -> Merged | None:
        """Merge them into the weights; not into those of a lower precision than float32, that rounds them away."""
        dtype = next(network.parameters()).dtype
        return MergedLora(network) if dtype in (torch.float32, torch.float64) else None

    def bound(self, denoise: Denoiser, strengths_BM: Tensor | None) -> Denoiser:
        """Return it as it is: a LoRA has one strength."""
        assert strengths_BM is None
        return denoise


LORA_SWITCHES = LoraSwitches()


def detach(network: nn.Module) -> None:
    """Take off whatever is trained; the network is left as it was before. Nothing is fine too."""
    remove_lora(network)
    remove_mix(network)


def set_strength(network: nn.Module, strength: float) -> None:
    """Run what is attached at a strength: 1 is as it was trained, 0 the base model."""
    mix = attached_mix(network)
    if mix is not None:
        mix.strength = strength
        return
    whole: Any = network
    whole.set_adapters([ADAPTER], [strength])
