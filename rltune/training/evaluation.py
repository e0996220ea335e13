"""Score a model on held-out prompts with seeds that every trial shares, and judge what rewards do not see.

N: images, prompt-major. P: prompts. I: images per prompt. H, W: image rows and columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from rltune.canvas import Canvas
from rltune.diffusion.chain import NO_GRADIENT
from rltune.diffusion.lora import adapters_as_loaded
from rltune.diffusion.sampler import Sampler
from rltune.rewards.base import Reward
from rltune.rewards.clip import embeddings_kept
from rltune.rewards.mixture import Reading, check_finite, in_groups, measure
from rltune.runs.metrics import Values, joint_shares
from rltune.training.canvases import shown
from rltune.training.streams import Stream, noise
from rltune.training.workers import Workers

Pixels = npt.NDArray[np.uint8]

EVAL_SEED = 0
"""Held-out noise does not follow the experiment's seed: runs that differ in it are compared on the same noise."""
EVAL_BLOCK = 32
"""Images that workers exchange at a time."""


@dataclass(frozen=True)
class ImageSet:
    """Prompts, images a prompt, and the streams their noise comes from: names a fixed set of samples."""

    prompts: tuple[str, ...]
    images_per_prompt: int
    latent_shape: tuple[int, int, int]
    latent_stream: Stream = Stream.EVAL_LATENT
    step_stream: Stream = Stream.EVAL_STEP_NOISE

    def __len__(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    def prompt_of(self, image: int) -> str:
        """Return the prompt of image number ``image``; images of a prompt follow each other."""
        return self.prompts[image // self.images_per_prompt]


@dataclass(frozen=True)
class Samples:
    """A set's images and what the rewards say of them."""

    pixels_NHW3: Pixels
    values: Mapping[str, Values]
    """``(N,)`` per reward."""


@torch.no_grad()
def sample_and_score(
    sampler: Sampler,
    images: ImageSet,
    rewards: Mapping[str, Reward],
    workers: Workers,
    *,
    batch_size: int,
    read: Reading = measure,
) -> Samples:
    """Draw every image of the set and score it; workers share the prompts and all get the whole result.

    The result does not depend on how many workers there are, up to the rounding of another batch composition.
    ``read`` is ``rewards.mixture.measure`` for what is reported, ``score`` for the raw training signal.

    Raises:
        NonFiniteError: An image or a reward is not finite.
    """
    each = images.images_per_prompt  # images of a prompt stay together: some rewards compare them
    mine = [number for number in range(len(images)) if number // each % workers.count == workers.rank]
    batch_size = max(each, batch_size - batch_size % each)
    rows: list[tuple[int, dict[str, float]]] = []
    pixels: list[Pixels] = []
    for start in range(0, len(mine), batch_size):
        numbers = mine[start : start + batch_size]
        prompts = [images.prompt_of(number) for number in numbers]
        with adapters_as_loaded(sampler.model.network):
            pixels_B3HW = draw_images(sampler, images, numbers, workers.device).float()
        check_finite(pixels_B3HW, prompts)
        with embeddings_kept():
            values = {
                name: in_groups(read, name, reward, pixels_B3HW, prompts, each).tolist()
                for name, reward in rewards.items()
            }
        pixels.append(to_uint8(pixels_B3HW))
        rows += [(n, {name: values_B[i] for name, values_B in values.items()}) for i, n in enumerate(numbers)]
    rows = sorted(workers.gather(rows), key=lambda row: row[0])
    return Samples(
        pixels_NHW3=_whole(pixels, mine, len(images), workers),
        values={name: np.array([row[1][name] for row in rows]) for name in rewards},
    )


def _whole(pixels: Sequence[Pixels], mine: Sequence[int], num_images: int, workers: Workers) -> Pixels:
    """Return the images of all workers, every one as bytes and a few at a time: as objects they would be copied."""
    if workers.count == 1:
        return np.concatenate(pixels)
    shape = workers.gather([part.shape[1:] for part in pixels[:1]])[0]  # a worker may have no image
    whole_NHW3 = np.zeros((num_images, *shape), np.uint8)
    if pixels:
        whole_NHW3[mine] = np.concatenate(pixels)
    for start in range(0, num_images, EVAL_BLOCK):
        block = torch.from_numpy(whole_NHW3[start : start + EVAL_BLOCK]).to(workers.device)
        whole_NHW3[start : start + EVAL_BLOCK] = workers.sum(block).cpu().numpy()  # an image is 0 but on its worker
    return whole_NHW3


@torch.no_grad()
def draw_images(sampler: Sampler, images: ImageSet, numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return the images ``numbers`` of a set, RGB in [0, 1] (B, 3, height, width) on ``device``."""
    x_BCHW = noise(EVAL_SEED, images.latent_stream, [(number,) for number in numbers], images.latent_shape)

    def step_noise(k: int) -> Tensor:
        keys = [(number, k) for number in numbers]
        return noise(EVAL_SEED, images.step_stream, keys, images.latent_shape).to(device)

    prompts = [images.prompt_of(number) for number in numbers]
    chain_noise = None if sampler.table.is_deterministic else step_noise
    return sampler.decode(sampler.latents(prompts, x_BCHW.to(device), plan=NO_GRADIENT, noise=chain_noise))


def to_uint8(pixels_B3HW: Tensor) -> Pixels:
    """Return RGB in [0, 1] as bytes (B, H, W, 3), rounded."""
    array: Pixels = (pixels_B3HW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return array


def diversity(pixels_NHW3: Pixels, images_per_prompt: int) -> Values:
    """Return the mean pairwise distance of the images of each prompt, ``(P,)``, in [0, 1]; larger is more diverse.

    The distance is the root mean squared difference of RGB in [0, 1]: weight-free, so that no reward shares its taste.
    One image a prompt has no pairs and gives 0.
    """
    first, second = np.triu_indices(images_per_prompt, k=1)
    groups = [pixels_NHW3[i : i + images_per_prompt] for i in range(0, len(pixels_NHW3), images_per_prompt)]
    if len(first) == 0:
        return np.zeros(len(groups))
    rows = map(_as_rows, groups)  # a prompt at a time: in float64 they are eight times the size
    apart = [np.sqrt(np.square(x_IX[first] - x_IX[second]).mean(axis=1)) for x_IX in rows]
    return np.asarray(np.asfortranarray(apart).mean(axis=1))  # pairs added up in turn, as ever: the last bits are kept


def drift(pixels_NHW3: Pixels, base_NHW3: Pixels, images_per_prompt: int) -> Values:
    """Return how far each prompt's images are from the base model's for the same noise, ``(P,)``, in [0, 1].

    The distance is ``diversity``'s, so the two compare; 0 is the base model.
    """
    parts = [slice(i, i + images_per_prompt) for i in range(0, len(pixels_NHW3), images_per_prompt)]
    differences = (_as_rows(pixels_NHW3[part]) - _as_rows(base_NHW3[part]) for part in parts)
    return np.array([np.sqrt(np.square(difference_IX).mean(axis=1)).mean() for difference_IX in differences])


def _as_rows(pixels_IHW3: Pixels) -> Values:
    return pixels_IHW3.reshape(len(pixels_IHW3), -1).astype(np.float64) / 255


def per_prompt(
    samples: Samples, base: Samples, images: ImageSet, judges: Sequence[str], objectives: Sequence[str]
) -> dict[str, Values]:
    """Return the mean over each prompt's images, ``(P,)``, of every reward and judge.

    Args:
        samples: Images and their scores.
        base: The base model's for the same noise; in runs of before, without scores.
        images: Which images they are.
        judges: Those that are measured where they are asked for.
        objectives: What ``domination`` and ``collapse`` are over.
    """
    each = images.images_per_prompt
    values = {name: rows.reshape(-1, each).mean(axis=1) for name, rows in samples.values.items()}
    if "diversity" in judges:
        values["diversity"] = diversity(samples.pixels_NHW3, each)
    if "drift" in judges:
        values["drift"] = drift(samples.pixels_NHW3, base.pixels_NHW3, each)
    return values | joint_shares(samples.values, base.values, objectives, each)


def beside_given(pixels_NHW3: Pixels, prompts: Sequence[str], images_per_prompt: int) -> tuple[Pixels, int]:
    """Return images prompt by prompt, each prompt's behind what was given of it, and how many that is a prompt.

    Where prompts come without pictures, nothing is put in between.
    """
    height, width = pixels_NHW3.shape[1:3]
    if not isinstance(prompts[0], Canvas):
        return pixels_NHW3, images_per_prompt
    rows = []
    for i, prompt in enumerate(prompts):
        assert isinstance(prompt, Canvas)
        rows += [shown(prompt, height, width), *pixels_NHW3[i * images_per_prompt : (i + 1) * images_per_prompt]]
    return np.stack(rows), images_per_prompt + 1


def save_grid(pixels_NHW3: Pixels, path: Path, *, columns: int) -> None:
    """Write images as one PNG, row by row."""
    num, height, width, _ = pixels_NHW3.shape
    rows = -(-num // columns)
    grid = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, image in enumerate(pixels_NHW3):
        row, column = divmod(i, columns)
        grid[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(path)
