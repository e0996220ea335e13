"""How much a network computes in a call, counted without values; and how fast this machine multiplies."""

import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rltune.diffusion.blocks import Forward, run_blocks_by
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.forecast import META, fused_attention
from rltune.diffusion.memory import drawn_anew, kind_of
from rltune.diffusion.sampler import guided_denoiser

PROBE_SIZE = 1024
"""Rows and columns of the matrices that the machine is timed with."""


def count_operations(run: Callable[[], Tensor], network: nn.Module) -> int:
    """Return the floating-point operations of one call without gradient, in matrix products and convolutions.

    Of blocks that are alike one is run.

    Args:
        run: Calls the network, which is on the device ``meta``.
        network: Its blocks are without checkpoints afterwards.
    """
    products: list[int] = []
    alike: dict[Hashable, tuple[int, Any]] = {}
    repeated = 0

    with torch.no_grad(), fused_attention(products), FlopCounterMode(display=False) as counter:

        def total() -> int:
            return int(counter.get_total_flops()) + sum(products)

        def run_block(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal repeated
            key = kind_of(forward, args, kwargs)
            if key in alike:
                repeated += alike[key][0]
                return drawn_anew(alike[key][1])
            before = total()
            result = forward(*args, **kwargs)
            alike[key] = total() - before, result
            return result

        run_blocks_by(network, run_block)
        try:
            run()
        finally:
            run_blocks_by(network, None)
        return total() + repeated


def operations_an_image(model: ModelFamily, shape: tuple[int, int, int], *, guidance_scale: float) -> tuple[int, int]:
    """Return the operations of one guided network call for one image, and of decoding it.

    Args:
        model: As ``load_outline`` returns it.
        shape: Of latents (C, H, W).
        guidance_scale: Above 1 the network runs on two rows.
    """
    x_BCHW, t, row = torch.empty(1, *shape, device=META), torch.empty((), device=META), model.blank_text()
    denoise = guided_denoiser(model, [row], row, META, guidance_scale=guidance_scale)
    call = count_operations(lambda: denoise(x_BCHW, t), model.network)
    return call, count_operations(lambda: model.decode(x_BCHW), model.decoder)


def matrix_rate(dtype: torch.dtype) -> float:
    """Return floating-point operations a second at which one thread of this CPU multiplies matrices; takes 0.2 s.

    In seconds of its own, so that other processes do not count.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = (torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype) for _ in range(2))
        seconds = []
        for _ in range(4):
            start = time.thread_time()
            a @ b
            seconds.append(time.thread_time() - start)
        return 2 * PROBE_SIZE**3 / min(seconds)
    finally:
        torch.set_num_threads(num_threads)
