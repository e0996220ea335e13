"""Rows of a grid whose noise was optimised, each beside that of the noise as it was drawn, and what both score.

N: images of a row. B: some of them, drawn together. C: latent channels. H, W: rows and columns of images or latents.
"""

import logging
import math
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.diffusion.sampler import Sampler
from rltune.errors import OutOfMemory, UserError, is_out_of_memory
from rltune.rewards.base import Reward
from rltune.rewards.clip import embeddings_kept
from rltune.rewards.mixture import measure, score
from rltune.runs.metrics import Values
from rltune.training.evaluation import Pixels, to_uint8
from rltune.training.grids import BATCH, Starts, drawn, each_model
from rltune.training.noise import LR, gradient_plan, optimise_noise

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Aim:
    """What noise is optimised for, and how; called, it is the objective.

    Raises:
        UserError: A reward has no gradient, or compares images, of which each has noise of its own.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    """Of the raw scores, which are not standardised: there is no run whose base model they could be measured on."""
    judges: Mapping[str, Reward] = field(default_factory=dict)
    """What is measured besides."""
    num_steps: int = 20
    lr: float = LR
    k: int | None = None

    def __post_init__(self) -> None:
        for name, reward in self.rewards.items():
            if not reward.is_differentiable:
                raise UserError(
                    f"reward {name!r}: has no gradient, and noise is optimised along one; take another, or watch it as "
                    "a judge"
                )
        for name, reward in {**self.rewards, **self.judges}.items():
            if reward.sees_group:
                raise UserError(
                    f"reward {name!r}: compares the images of a prompt, and each image's noise is optimised for itself "
                    "alone; take another"
                )

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the weighted sum of the raw scores, ``(B,)`` float32."""
        with embeddings_kept():
            scores = [
                self.weights[name] * score(name, reward, images_B3HW, prompts) for name, reward in self.rewards.items()
            ]
        return torch.stack(scores).sum(dim=0)

    def to(self, device: torch.device) -> None:
        """Move rewards and judges to ``device``."""
        for reward in (*self.rewards.values(), *self.judges.values()):
            reward.to(device)


@dataclass(frozen=True)
class Row:
    """A model's images from one noise."""

    pixels_NHW3: Pixels
    values: Mapping[str, Values]
    """``(N,)`` for each reward and judge, as it is reported."""
    norm_N: Values
    """Of the noise."""


@dataclass(frozen=True)
class Pair:
    """A model's images from the noise as it was drawn, and from what became of it."""

    drawn: Row
    optimised: Row
    seconds: float
    """An image took to optimise."""
    num_sampling: int
    """Sampling steps."""
    num_values: int
    """Numbers in an image's noise."""


def paired_rows(
    config: RunConfig, lora_files: Sequence[Path], prompts: Sequence[str], aim: Aim, *, num_images: int, seed: int
) -> Iterator[Pair]:
    """Yield the base model's images and then each LoRA's, before and after their noise was optimised.

    Each model starts from the same noise. Images and scores are of the chain without gradient, as everywhere.

    Raises:
        UserError: The model is not there, a file is not a LoRA of it, or ``aim.k`` does not fit the sampling steps.
        NonFiniteError: An image, a score or a gradient is not finite, or a gradient is exactly zero.
        OutOfMemory: One image does not fit.
    """
    for sampler, starts in each_model(config, lora_files, prompts, num_images=num_images, seed=seed):
        gradient_plan(sampler, aim.k)  # what is wrong with it is said before anything is drawn
        sampler.model.network.requires_grad_(False)  # a loaded LoRA too
        aim.to(starts.device)
        before = _row(sampler, starts, starts.latents(range(len(starts))), aim)
        start_s = time.perf_counter()
        x_NCHW = _optimised(sampler, starts, aim)
        seconds = (time.perf_counter() - start_s) / len(starts)
        after = _row(sampler, starts, x_NCHW, aim)
        yield Pair(before, after, seconds, sampler.num_steps, math.prod(starts.shape))


@torch.no_grad()
def _row(sampler: Sampler, starts: Starts, x_NCHW: Tensor, aim: Aim) -> Row:
    measured = {**aim.judges, **aim.rewards}
    pixels: list[Pixels] = []
    values: dict[str, list[Tensor]] = {name: [] for name in measured}
    for prompts, images_B3HW in drawn(sampler, starts, x_NCHW):
        pixels.append(to_uint8(images_B3HW))
        with embeddings_kept():
            for name, reward in measured.items():
                values[name].append(measure(name, reward, images_B3HW, prompts))
    norm_N = torch.linalg.vector_norm(x_NCHW.flatten(1), dim=1).cpu().numpy()
    whole = {name: torch.cat(parts).double().cpu().numpy() for name, parts in values.items()}
    return Row(np.concatenate(pixels), whole, norm_N)


def _optimised(sampler: Sampler, starts: Starts, aim: Aim) -> Tensor:
    """Return the optimised noise of all images, as many at a time as the memory holds."""
    parts: list[Tensor] = []
    size, start = 1 if sampler.is_decoded_singly else BATCH, 0
    while start < len(starts):
        numbers = range(start, min(start + size, len(starts)))
        found = _part(sampler, starts, numbers, aim)
        if found is not None:
            parts.append(found)
            start = numbers.stop
        elif len(numbers) == 1:
            raise OutOfMemory("out of memory optimising the noise of one image; lower the image size, or --k")
        else:  # out of the handler, whose traceback holds what filled the memory
            size = len(numbers) // 2
            logger.warning("out of memory optimising the noise of %d images, going on with %d", len(numbers), size)
    return torch.cat(parts)


def _part(sampler: Sampler, starts: Starts, numbers: range, aim: Aim) -> Tensor | None:
    """Return the optimised noise of some images, or None if the memory does not hold them."""
    prompts = starts.prompts[numbers.start : numbers.stop]
    noise = starts.step_noise(numbers, sampler)
    try:
        return optimise_noise(
            sampler,
            prompts,
            starts.latents(numbers),
            aim,
            noise=noise,
            num_steps=aim.num_steps,
            lr=aim.lr,
            k=aim.k,
        ).x_BCHW
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return None
