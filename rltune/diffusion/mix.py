"""Several adapters that share the steps of one chain: their predictions are blended, or one of them is drawn.

B: images. M: adapters. C, H, W: latent channels, rows, columns.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from rltune.diffusion.lora import adapters_off

BASE = ""
"""In the place of an adapter's name: none, the base model."""


@dataclass(frozen=True)
class Mix:
    """Which adapters have how large a part in every step."""

    adapters: tuple[str, ...]
    """Names on the network, or ``BASE``."""
    weights: tuple[float, ...]
    is_drawn: bool = False
    """Whether each step of each image is one adapter's, drawn with the weights as probabilities (DB-MPA-LS of Diffusion
    Blend, arXiv:2505.18547); else their predictions are added up with the weights (DB-MPA of the same)."""

    def __post_init__(self) -> None:
        if self.is_drawn and (min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-6):
            raise ValueError(f"weights that are drawn by must be at least 0 and sum to 1, got {self.weights}")

    def weights_BM(self, keys: Sequence[bytes], t: Tensor) -> Tensor:
        """Return each adapter's part in a step, of every image; float32 on the CPU."""
        weights_M = torch.tensor(self.weights)
        if not self.is_drawn:
            return weights_M.expand(len(keys), -1)
        ends_M = weights_M.double().cumsum(0)
        ends_M[-1] = torch.inf
        drawn_B = torch.tensor([_uniform(key + struct.pack("<d", float(t))) for key in keys], dtype=torch.float64)
        return nn.functional.one_hot(torch.searchsorted(ends_M, drawn_B, right=True), len(self.weights)).float()


def image_keys(x_BCHW: Tensor) -> list[bytes]:
    """Return what tells images apart, whatever batch they are in: a digest of the noise that each starts from."""
    return [blake2b(x_CHW.contiguous().cpu().numpy().tobytes(), digest_size=16).digest() for x_CHW in x_BCHW.float()]


def mixed_denoiser(
    denoise: Callable[[Tensor, Tensor], Tensor], network: nn.Module, mix: Mix, keys: Sequence[bytes]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the network as several adapters share it, without gradient: a call for each that has a part in the step.

    Args:
        denoise: The bound network, with guidance.
        network: What the adapters are on; one of them is active afterwards.
        mix: Their parts.
        keys: Of the images of the batch: ``image_keys``.
    """

    def run(x_BCHW: Tensor, t: Tensor) -> Tensor:
        weights_BM = mix.weights_BM(keys, t)
        mixed_BCHW = torch.zeros_like(x_BCHW)
        for i, name in enumerate(mix.adapters):
            if not weights_BM[:, i].any():
                continue
            with _alone(network, name):
                f_BCHW = denoise(x_BCHW, t).to(x_BCHW.dtype)
            mixed_BCHW += weights_BM[:, i].to(x_BCHW).view(-1, 1, 1, 1) * f_BCHW
        return mixed_BCHW

    return run


@contextmanager
def _alone(network: nn.Module, name: str) -> Iterator[None]:
    """Run the network with one adapter inside the block, or with none."""
    if name == BASE:
        with adapters_off(network):
            yield
        return
    whole: Any = network
    whole.set_adapters([name], [1.0])
    yield


def _uniform(key: bytes) -> float:
    """Return a number in [0, 1) that follows from the key alone, and evenly."""
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") / 2**64
