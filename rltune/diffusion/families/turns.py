"""Large text encoders and the network take turns on a device that does not hold both."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

LARGE_ENCODERS = 2 * 2**30
"""Bytes of text encoders above which they are not on a device together with the network."""


@contextmanager
def taking_turns(encoders: Sequence[nn.Module], others: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Have encoders on ``device`` inside the block, on the CPU after it; large ones without the others beside them.

    T5-XXL takes 9 GiB, Qwen-Image's encoder 15.
    """
    size = sum(weight.nbytes for encoder in encoders for weight in encoder.parameters())
    aside = others if device.type != "cpu" and size > LARGE_ENCODERS else ()
    for part in aside:
        part.to("cpu")
    for encoder in encoders:
        encoder.to(device)
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.to("cpu")
        for part in aside:
            part.to(device)
