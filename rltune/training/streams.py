"""Randomness as a function of (seed, purpose, index): resumed runs, and runs on other workers, see the same draws.

B: images. C, H, W: latent channels, rows, columns.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Stream(IntEnum):
    """What a draw is for. The numbers are part of what makes a run reproducible: never renumber."""

    PROMPT_ORDER = 0
    LATENT = 1
    STEP_NOISE = 2
    ESTIMATOR = 3
    ADAPTER = 4
    EVAL_LATENT = 5
    EVAL_STEP_NOISE = 6
    CALIBRATION_LATENT = 7
    CALIBRATION_STEP_NOISE = 8
    EXTRA_NOISE = 9
    ESTIMATOR_STATE = 10
    PROCESS = 11
    CONFIRM_LATENT = 12
    CONFIRM_STEP_NOISE = 13
    BASIS = 14


def generator(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
    """Return a numpy generator that depends on its arguments alone."""
    return np.random.default_rng([seed, int(stream), *keys])


def torch_seed(seed: int, stream: Stream, *keys: int) -> int:
    """Return a 63-bit seed that depends on its arguments alone."""
    return int(generator(seed, stream, *keys).integers(2**63))


def noise(seed: int, stream: Stream, keys: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> Tensor:
    """Return standard normal noise ``(len(keys), *shape)``, float32 on the CPU; row i depends on ``keys[i]`` alone."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(torch_seed(seed, stream, *key))) for key in keys]
    return torch.stack(rows)


def drawn_prompts(seed: int, num_images: int, num_prompts: int, images_per_prompt: int = 1) -> list[int]:
    """Return which prompts the first ``num_images`` training images of a run show, each once, in ascending order."""
    num_turns = -(-num_images // images_per_prompt)
    if num_turns >= num_prompts:
        return list(range(num_prompts))
    return sorted(_order(seed, 0, num_prompts)[:num_turns].tolist())


def prompt_indices(seed: int, first: int, count: int, num_prompts: int, images_per_prompt: int = 1) -> list[int]:
    """Return which prompts the training images ``first .. first + count - 1`` of a run show.

    Images are numbered through the whole run; ``images_per_prompt`` of them in turn share a prompt. Every prompt has
    its turn before any has another, in an order drawn anew for each pass.
    """
    indices = []
    for image in range(first, first + count):
        epoch, position = divmod(image // images_per_prompt, num_prompts)
        indices.append(int(_order(seed, epoch, num_prompts)[position]))
    return indices


def _order(seed: int, epoch: int, num_prompts: int) -> npt.NDArray[np.int64]:
    return generator(seed, Stream.PROMPT_ORDER, epoch).permutation(num_prompts)
