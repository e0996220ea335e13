"""Frozen networks that are only looked through: float32, evaluation mode, activations recomputed in large ones."""

from collections.abc import Iterable
from functools import partial
from typing import TypeVar

from torch import nn
from torch.utils.checkpoint import checkpoint

Network = TypeVar("Network", bound=nn.Module)
LARGE = 100_000_000
"""Parameters from which on activations are recomputed in the backward pass."""


def freeze(network: Network) -> Network:
    """Return the network in float32 and evaluation mode, with parameters that take no gradient."""
    network.float().eval().requires_grad_(False)
    return network


def is_large(network: nn.Module) -> bool:
    """Return whether the network has enough parameters for its activations to be worth recomputing."""
    return sum(parameter.numel() for parameter in network.parameters()) >= LARGE


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Make each block keep its input alone and compute the rest again in the backward pass.

    The libraries' own switches do so in training mode only, or not at all; here nothing random happens in a block, so
    that the gradient is the same.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
