"""How different the images of a prompt are from each other: in their pixels, or in what DINOv2 sees.

An image's score depends on the other images of its prompt in the batch: prompts are the same where their strings are.
B: images in the batch. D: numbers that describe an image. P: pairs of images. H, W: image rows and columns.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rltune.rewards.base import REWARDS, Card
from rltune.rewards.frozen import checkpoint_blocks, freeze, is_large
from rltune.rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalise, resize_to
from rltune.rewards.pretrained import find_folder, load_network
from rltune.rewards.weights import WeightsFile

DINO = "facebook/dinov2-base"
DINO_FILES = tuple(
    WeightsFile(file=file, licence="Apache-2.0", size_mb=size_mb, repo=DINO)
    for file, size_mb in (("model.safetensors", 346), ("config.json", 0.001))
)
DINO_RESIZE_PX = 256
DINO_SIZE_PX = 224
PIXEL_EPS = 1e-4
"""A fortieth of one of 255 levels: the distance of two equal images, where the square root would have no slope."""


@REWARDS.register(
    "diversity_pixels", Card("0 to 1; 0 where images are alike or alone", value_range=(0.0, 1.0), sees_group=True)
)
def diversity_pixels(images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """How far the images of a prompt are apart, in their pixels.

    The distance is the root mean squared difference of RGB in [0, 1], as the judge ``diversity`` has it, of the square
    plus 1e-8: the gradient of two equal images is 0 instead of undefined, and their distance 1e-4 instead of 0.
    """
    return mean_distance(images_B3HW.flatten(1), prompts, pixel_distance)


class DinoDiversity:
    """How far the images of a prompt are apart, in what DINOv2 (arXiv:2304.07193) sees: 1 minus the cosine.

    Args:
        network: ``transformers.Dinov2Model``.
    """

    def __init__(self, network: Any) -> None:
        self._network: Any = freeze(network)  # Any: transformers is untyped to us
        if is_large(network):
            checkpoint_blocks(network.encoder.layer)

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, differentiable: mean distance to the other images of the prompt."""
        return mean_distance(self.features(images_B3HW, prompts), prompts, cosine_distance)

    def features(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the class token after the last normalisation, ``(B, D)`` float32, differentiable."""
        if images_B3HW.shape[0] == 0:
            return images_B3HW.new_zeros(0, self._network.config.hidden_size, dtype=torch.float32)
        features_BD: Tensor = self._network(pixel_values=dino_preprocess(images_B3HW)).pooler_output
        return features_BD

    def to(self, device: torch.device) -> None:
        """Move the network to ``device``."""
        self._network.to(device)


@REWARDS.register(
    "diversity_dino",
    Card("0 to 2; 0 where images are alike or alone", weights=DINO_FILES, value_range=(0.0, 2.0), sees_group=True),
)
def build_diversity_dino(*, model: str = DINO) -> DinoDiversity:
    """How far the images of a prompt are apart, in what DINOv2 sees.

    Args:
        model: DINOv2: id on the Hugging Face hub, or a folder in the layout of transformers.

    Raises:
        UserError: ``model`` is no DINOv2.
        RunError: The model is not on this machine and cannot be fetched.
    """
    folder = find_folder("diversity_dino", model, DINO_FILES)
    from transformers import Dinov2Model

    return DinoDiversity(load_network("diversity_dino", Dinov2Model, folder))


def dino_preprocess(images_B3HW: Tensor) -> Tensor:
    """Return RGB in [0, 1] as DINOv2 reads it, ``(B, 3, 224, 224)``, differentiably.

    As the published ``preprocessor_config.json``: shorter side to 256 px, bicubic, the middle cut out, ImageNet's mean
    and deviation. Over built-in scenes enlarged to 512 x 512, 512 x 768 and 1024 x 1024 px, 8 bits, the difference
    from transformers' processor, which rounds and clips, is 0.16 of 255 levels on average and 1.06 at most; enlarging
    scenes of 64 px, 0.19, and up to 8 beside saturated edges (more than 1 at 0.2 % of the values).
    """
    x_B3HW = resize_to(images_B3HW, (DINO_SIZE_PX, DINO_SIZE_PX), resize_px=DINO_RESIZE_PX)
    return normalise(x_B3HW, IMAGENET_MEAN, IMAGENET_STD)


def mean_distance(x_BD: Tensor, prompts: Sequence[str], distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the mean distance of each row to the others of its prompt, ``(B,)``; 0 where it is alone.

    Args:
        x_BD: What describes an image.
        prompts: One a row.
        distance: From two times ``(P, D)`` to ``(P,)``, the same either way.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[prompt].append(row)
    pairs = [pair for rows in groups.values() for pair in combinations(rows, 2)]
    first_P, second_P = torch.tensor(pairs, dtype=torch.long, device=x_BD.device).reshape(-1, 2).unbind(dim=1)
    distance_P = distance(x_BD[first_P], x_BD[second_P])
    total_B = x_BD.new_zeros(len(prompts)).index_add(0, first_P, distance_P).index_add(0, second_P, distance_P)
    num_others = [max(len(groups[prompt]) - 1, 1) for prompt in prompts]
    return total_B / torch.tensor(num_others, device=x_BD.device)


def pixel_distance(x_PD: Tensor, y_PD: Tensor) -> Tensor:
    """Root mean squared difference, ``(P,)``, with ``PIXEL_EPS`` inside the root so that it has a slope at 0."""
    return ((x_PD - y_PD).square().mean(dim=1) + PIXEL_EPS**2).sqrt()


def cosine_distance(x_PD: Tensor, y_PD: Tensor) -> Tensor:
    """1 - cos, ``(P,)``, as half the square of the distance on the unit sphere, which rounds to no negative number."""
    return (normalize(x_PD, dim=1) - normalize(y_PD, dim=1)).square().sum(dim=1) / 2
