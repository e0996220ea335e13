"""Image grids that compare a base model with LoRA files on the same prompts and noise.

R: rows, the base model first. N: images of a row, prompt-major. B: some of them, drawn together. C: latent channels.
H, W: rows and columns of images, or of their latents.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from rltune.canvas import Canvas
from rltune.config.experiment import RunConfig
from rltune.diffusion.adapter_files import load_adapter_file, unload_adapter_file
from rltune.diffusion.chain import NO_GRADIENT, StepNoise
from rltune.diffusion.sampler import Sampler
from rltune.errors import UserError
from rltune.training.canvases import shown
from rltune.training.captions import lettering
from rltune.training.evaluation import Pixels, to_uint8
from rltune.training.model_cache import load_base_model
from rltune.training.prompts import cut_in_words
from rltune.training.sampling import image_shape, make_sampler
from rltune.training.streams import Stream, noise

logger = logging.getLogger(__name__)

MARGIN_PX = 4
LABEL_PX = 20
MAX_LABEL_PX = 240
MAX_LINES = 4
"""Of a prompt, above its pictures."""
MIN_IMAGE_PX = 128
"""Small images are shown larger, pixels kept square."""
BATCH = 16


@dataclass(frozen=True)
class Starts:
    """What the N images of a row start from: prompts and noise that are the same for every model."""

    prompts: tuple[str, ...]
    """One an image."""
    shape: tuple[int, int, int]
    """Of an image's latents."""
    seed: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.prompts)

    def latents(self, numbers: Sequence[int]) -> Tensor:
        """Return the noise x_T of some of the images (B, C, H, W)."""
        return noise(self.seed, Stream.EVAL_LATENT, [(number,) for number in numbers], self.shape).to(self.device)

    def step_noise(self, numbers: Sequence[int], sampler: Sampler) -> StepNoise | None:
        """Return the fresh noise of their steps, where a sampler takes any."""
        return None if sampler.table.is_deterministic else _step_noise(self.seed, numbers, self.shape, self.device)


def draw_rows(
    config: RunConfig, lora_files: Sequence[Path], prompts: Sequence[str], *, num_images: int, seed: int
) -> list[Pixels]:
    """Draw the base model, then each LoRA at weight 1, on the same noise -> bytes (N, H, W, 3) a row.

    Where prompts come with pictures, a row before these shows what is given, and what is to be drawn in grey squares.

    Raises:
        UserError: The model is not there, or a file is not a LoRA of it.
    """
    rows = [
        np.concatenate([to_uint8(images_B3HW) for _, images_B3HW in drawn(sampler, starts)])
        for sampler, starts in each_model(config, lora_files, prompts, num_images=num_images, seed=seed)
    ]
    return [*given_row(prompts, rows[0].shape[1:3], num_images), *rows]


def each_model(
    config: RunConfig, lora_files: Sequence[Path], prompts: Sequence[str], *, num_images: int, seed: int
) -> Iterator[tuple[Sampler, Starts]]:
    """Yield the base model, then each LoRA on it at weight 1, with what its images start from.

    There is one model, whose LoRA is another at every turn. Errors are those of ``draw_rows``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_base_model(config, device)
    sampler = make_sampler(config, model)
    shape = image_shape(config, model)
    if words := cut_in_words(model.cut_off(prompts), prompts):
        logger.warning("%s", words)
    starts = Starts(tuple(prompt for prompt in prompts for _ in range(num_images)), shape, seed, device)
    yield sampler, starts
    for file in lora_files:
        unload_adapter_file(model)  # the one before: peft warns of a second one beside it
        parts = load_adapter_file(model, file)
        if sampler.num_base_steps > 0 and parts != {model.lora_prefix}:
            raise UserError(
                f"{file}: reaches the text encoder, whose prompts all steps share; sample it with --base-steps 0"
            )
        yield make_sampler(config, model), starts  # prompts are embedded anew, by this LoRA's text encoder


@torch.no_grad()
def drawn(sampler: Sampler, starts: Starts, x_NCHW: Tensor | None = None) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield the images of a row a few at a time: a prompt each, and RGB in [0, 1] (B, 3, H, W).

    Args:
        sampler: The model as it is.
        starts: Prompts, and the noise that images start from.
        x_NCHW: Noise to start from instead.
    """
    for start in range(0, len(starts), BATCH):
        numbers = range(start, min(start + BATCH, len(starts)))
        x_BCHW = starts.latents(numbers) if x_NCHW is None else x_NCHW[start : start + BATCH]
        prompts = starts.prompts[start : start + BATCH]
        step_noise = starts.step_noise(numbers, sampler)
        yield prompts, sampler.decode(sampler.latents(prompts, x_BCHW, plan=NO_GRADIENT, noise=step_noise))


def given_row(prompts: Sequence[str], size: tuple[int, ...], num_images: int) -> list[Pixels]:
    """Return the row of what is given, where prompts come with pictures."""
    canvases = [prompt for prompt in prompts if isinstance(prompt, Canvas)]
    if not canvases:
        return []
    return [np.stack([shown(canvas, size[0], size[1]) for canvas in canvases for _ in range(num_images)])]


def _step_noise(seed: int, numbers: Sequence[int], shape: tuple[int, int, int], device: torch.device) -> StepNoise:
    return lambda k: noise(seed, Stream.EVAL_STEP_NOISE, [(number, k) for number in numbers], shape).to(device)


def labelled_grid(
    rows: Sequence[Pixels], labels: Sequence[str], prompts: Sequence[str], *, num_images: int
) -> Image.Image:
    """Return one picture: a block of rows per prompt under its text, in it a row per model with its label.

    As wide as the pictures: a prompt that is longer is wrapped, and shortened after ``MAX_LINES``.
    """
    zoom = max(1, MIN_IMAGE_PX // rows[0].shape[1])
    height, width = rows[0].shape[1] * zoom, rows[0].shape[2] * zoom
    letters = lettering([*labels, *prompts])
    # of a long one the end, which tells it from others, is kept
    short = [letters.spell(letters.cut(label[::-1], MAX_LABEL_PX)[::-1]) for label in labels]
    label_width = int(max(letters.width(label) for label in short)) + 2 * MARGIN_PX
    page_width = label_width + num_images * (width + MARGIN_PX)
    texts = [letters.wrap(prompt, page_width - 2 * MARGIN_PX, MAX_LINES) for prompt in prompts]
    block = len(rows) * (height + MARGIN_PX) + MARGIN_PX
    page = Image.new("RGB", (page_width, sum(len(lines) * LABEL_PX + block for lines in texts)), "white")
    draw = ImageDraw.Draw(page)
    top = 0
    for i, lines in enumerate(texts):
        for line in lines:
            draw.text((MARGIN_PX, top + 2), line, fill="black", font=letters.font)
            top += LABEL_PX
        for j, (pixels_NHW3, label) in enumerate(zip(rows, short, strict=True)):
            y = top + j * (height + MARGIN_PX)
            draw.text((MARGIN_PX, y + height // 2 - 8), label, fill="black", font=letters.font)
            for n, pixels_HW3 in enumerate(pixels_NHW3[i * num_images : (i + 1) * num_images]):
                picture = Image.fromarray(pixels_HW3).resize((width, height), Image.Resampling.NEAREST)
                page.paste(picture, (label_width + n * (width + MARGIN_PX), y))
        top += block
    return page
