"""Frozen networks that are only looked through: float32, evaluation mode, activations recomputed in large ones."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Network = TypeVar("Network", bound=nn.Module)
_held: WeakValueDictionary[tuple[object, ...], nn.Parameter] = WeakValueDictionary()
"""Parameters of the frozen networks in this process, by where they are and a sample of their values."""
LARGE = 100_000_000
"""Parameters from which on activations are recomputed in the backward pass."""


def freeze(network: Network) -> Network:
    """Return the network in float32 and evaluation mode, with parameters that take no gradient."""
    network.float().eval().requires_grad_(False)
    return network


def map_weights(network: Network, path: Path) -> Network:
    """Return the network with every parameter that equals its namesake in a safetensors file lying in that file.

    Processes that read the same file then hold its pages once between them, in the page cache. A parameter that was
    converted when it was loaded stays as it is. The mapping is private to the process, so that nobody who wrote into a
    parameter would change the file.
    """
    stored = load_file(path)
    for name, parameter in network.named_parameters():
        value = stored.get(name)
        if value is not None and value.dtype == parameter.dtype and torch.equal(value, parameter):
            parameter.data = value
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


def share_equal(network: Network) -> Network:
    """Return the network with every parameter replaced by an equal one that another frozen network holds already.

    Fine-tuned models often leave part of the network as it was: HPSv2's training locks all but the last 20 groups of
    CLIP-H's image tower and the last 11 of its text tower (github.com/tgxs002/HPSv2, ``hpsv2/configs/HPSv2.sh``), so
    that versions trained like this have the rest in common. Parameters are compared value by value, so nothing is
    shared that differs.
    """
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # has no values to compare
                continue
            key = (parameter.device, parameter.dtype, parameter.shape, _sample(parameter))
            held = _held.get(key)
            if held is None or held.device != parameter.device:  # a holder may have moved since
                _held[key] = parameter
            elif held is not parameter and torch.equal(held, parameter):
                setattr(module, name, held)
    return network


def _sample(parameter: Tensor) -> tuple[float, ...]:
    """Sixteen values, evenly spread: enough to tell trained weights apart."""
    flat = parameter.detach().flatten()
    return tuple(flat[:: max(1, flat.numel() // 16)][:16].tolist())


def held_bytes(networks: Iterable[nn.Module]) -> int:
    """Return the memory of the parameters and buffers of several networks, what they share counted once."""
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    storages = {(str(tensor.device), tensor.untyped_storage().data_ptr()): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
