"""The blocks of a denoiser, as diffusers knows them: a checkpoint around each, and code compiled once for those alike.

What diffusers keeps private of its networks is used here and nowhere else.
"""

import functools
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rltune.diffusion.nested import mapped
from rltune.diffusion.nested import tensors as nested_tensors

Forward = Callable[..., Any]
BlockRunner = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]
"""Runs a block's own ``forward`` with its arguments."""

TOO_COARSE = ("CrossAttnUpBlock2D", "UpBlock2D")
"""Levels of a UNet that are named as blocks and hold blocks: SDXL's largest has thirty transformer blocks."""


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that the network's class names as not to be split, in the network's order."""
    names = set(getattr(network, "_no_split_modules", None) or ()) - set(TOO_COARSE)
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if type(child).__name__ in names:
                found.append(child)
            else:
                visit(child)

    visit(network)
    return found


def run_blocks_by(network: nn.Module, runner: BlockRunner | None) -> None:
    """Let ``runner`` run every block of a network from now on; None puts back the network's own way."""
    for block in blocks_of(network):
        vars(block).pop("forward", None)
        if runner is not None:
            block.forward = _run_by(runner, block.forward)


def _run_by(runner: BlockRunner, forward: Forward) -> Forward:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return runner(forward, args, kwargs)

    return run


def checkpoint_blocks(network: nn.Module, *, enabled: bool, is_told: bool = False) -> None:
    """Let every block store its inputs alone for the backward pass, and compute it again there; or no longer so.

    ``is_told`` is for networks whose layers read context variables that hold for a call alone (``attention.py``): a
    block has those of its call again where backward runs it, which compiled code could not trace.

    The gradient is the same, bit for bit. A block costs one more run of itself. diffusers has a switch of its own,
    which loses Chroma's attention mask, and is as coarse as a level of the network in UNets.
    """
    runner = in_checkpoint_as_told if is_told else in_checkpoint
    run_blocks_by(network, runner if enabled else None)


def in_checkpoint_as_told(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block in a checkpoint, where it is run again with the context variables of now."""
    held = copy_context()

    def run(*args: Any, **kwargs: Any) -> Any:
        return held.copy().run(forward, *args, **kwargs)

    return in_checkpoint(run, args, kwargs)


def in_checkpoint(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block in a checkpoint where gradients are on, else as it is."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    def run(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        return forward(*mapped(args, lambda _: next(rest)), **mapped(kwargs, lambda _: next(rest)))

    # tensors as arguments of their own, not by name or in lists: only such does a checkpoint hand to autograd to store
    return checkpoint(run, *nested_tensors((args, kwargs)), use_reentrant=False, preserve_rng_state=False)


def compile_blocks(network: nn.Module) -> bool:
    """Compile the blocks that the network's class names as repeated, else the whole; return whether blocks were.

    Blocks that are alike share their code, so that a network takes as long to compile as a few of its blocks.
    """
    names = set(getattr(network, "_repeated_blocks", None) or ())
    repeated = [module for module in network.modules() if type(module).__name__ in names]
    for part in repeated or [network]:
        part.compile()
    return bool(repeated)
