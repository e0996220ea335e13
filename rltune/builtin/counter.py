"""The counter: a soft, differentiable count of named objects, which the rewards ``count`` and ``presence`` read.

Fully convolutional: every cell of a coarse grid says whether an object's centre is there, and of what colour and shape.
A group's soft count is the sum over cells of the product, so a picture without any such object still has a gradient.
It learns from the corpus that the other networks learn from; the judge (``judge.py``) shares nothing with it.
B pictures, G cells a side.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own documentation writes F)

from rltune.builtin.corpus import Corpus, to_network
from rltune.builtin.labels import Labels, make_labels, wear
from rltune.builtin.scenes import OBJECT_COLORS, SHAPES, make_scenes
from rltune.builtin.workshop import Workshop, autocast, cosine_rate, train
from rltune.errors import RunError

STAGE = "counter"
STEPS = 1_600
BATCH = 64
PEAK_LR = 2e-3


class Counter(nn.Module):
    """An hourglass: down to an eighth of the resolution and back up to a quarter, with group normalisation."""

    def __init__(self, widths: tuple[int, int, int] = (24, 48, 96)) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.down = nn.Sequential(_conv(3, fine, 5, 2), _conv(fine, fine, 3, 1), _conv(fine, middle, 3, 2))
        self.fine = _conv(middle, middle, 3, 1)
        self.deep = nn.Sequential(
            _conv(middle, coarse, 3, 2), *[_conv(coarse, coarse, 3, 1) for _ in range(3)], nn.Upsample(scale_factor=2)
        )
        self.join = _conv(middle + coarse, coarse, 3, 1)
        self.out = nn.Conv2d(coarse, 1 + len(OBJECT_COLORS) + len(SHAPES), 1)

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """RGB in [-1, 1] -> logits of a centre ``(B, G, G)``, of colours and of shapes ``(B, classes, G, G)``."""
        features = self.fine(self.down(images_B3HW))
        out = self.out(self.join(torch.cat([features, self.deep(features)], dim=1)))
        center, color, shape = out.split([1, len(OBJECT_COLORS), len(SHAPES)], dim=1)
        return center[:, 0], color, shape


def _conv(width_in: int, width_out: int, size: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width_in, width_out, size, stride, size // 2), nn.GroupNorm(8, width_out), nn.SiLU())


def train_counter(shop: Workshop, corpus: Corpus, heldout: Corpus) -> Counter:
    """The trained counter, in eval mode."""
    with shop.seeded(STAGE):
        counter = Counter().to(shop.device)
    num_steps = shop.scaled(STEPS, at_least=2)
    labels = _labels_of(shop, corpus, is_heldout=False)
    optimizer = torch.optim.AdamW(
        [{"name": "all", "params": list(counter.parameters())}], lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-2
    )

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        picks = torch.randint(len(corpus), (BATCH,), generator=generator)
        images = wear(to_network(corpus.images_N3HW[picks]), generator).to(shop.device)
        with autocast(shop.device):
            center, color, shape = counter(images)
        return counter_loss(center.float(), color.float(), shape.float(), labels[picks].to(shop.device))

    train(
        shop,
        STAGE,
        modules={"counter": counter},
        optimizer=optimizer,
        num_steps=num_steps,
        loss_of=loss_of,
        learning_rate_of=lambda step, _: PEAK_LR * cosine_rate(step, num_steps, warmup=80),
    )
    counter.eval()
    if shop.load_figures(STAGE) is None:
        shop.save_figures(STAGE, _measure(shop, counter, heldout))
    return counter


def counter_loss(center_BGG: Tensor, color_BCGG: Tensor, shape_BSGG: Tensor, labels: Labels) -> Tensor:
    """Cross-entropy of centres in every cell, of colours and shapes in the cells of true centres."""
    truth_BKGG = labels.centers()
    truth_BGG = truth_BKGG.sum(1)
    centers = F.binary_cross_entropy_with_logits(center_BGG, truth_BGG, reduction="sum") / truth_BGG.sum()
    is_used_BK = labels.color_BK >= 0

    def of_objects(logits_BCGG: Tensor, value_BK: Tensor) -> Tensor:
        logits_BKC = torch.einsum("bcij,bkij->bkc", logits_BCGG, truth_BKGG)
        error: Tensor = F.cross_entropy(logits_BKC[is_used_BK], value_BK[is_used_BK])
        return error

    loss: Tensor = centers + of_objects(color_BCGG, labels.color_BK) + of_objects(shape_BSGG, labels.shape_BK)
    return loss


def log_chances(counter: Counter, images_B3HW: Tensor) -> Tensor:
    """Log chance that an object of a colour and shape has its centre in a cell, ``(B, colours, shapes, G * G)``.

    Args:
        counter: The network.
        images_B3HW: RGB in [-1, 1], 64 px a side.
    """
    center_BGG, color_BCGG, shape_BSGG = counter(images_B3HW)
    color_BC1N = color_BCGG.log_softmax(1).flatten(2)[:, :, None]
    shape_B1SN = shape_BSGG.log_softmax(1).flatten(2)[:, None]
    log_chance_BCSN: Tensor = F.logsigmoid(center_BGG).flatten(1)[:, None, None] + color_BC1N + shape_B1SN
    return log_chance_BCSN


def _labels_of(shop: Workshop, corpus: Corpus, *, is_heldout: bool) -> Labels:
    scenes, _ = make_scenes(shop.seed, len(corpus), is_heldout=is_heldout)
    return make_labels(scenes)


@torch.no_grad()
def _measure(shop: Workshop, counter: Counter, heldout: Corpus) -> dict[str, float]:
    """On held-out renders: mean error of a group's soft count, and how often all groups round to the true counts."""
    labels = _labels_of(shop, heldout, is_heldout=True)
    batches = [log_chances(counter, to_network(b.to(shop.device))).exp() for b in heldout.images_N3HW.split(128)]
    counts_NCS = torch.cat([batch.sum(3).cpu() for batch in batches])
    truth_NCS = torch.einsum(
        "nkc,nks->ncs",
        F.one_hot(labels.color_BK + 1, len(OBJECT_COLORS) + 1)[..., 1:].float(),
        F.one_hot(labels.shape_BK + 1, len(SHAPES) + 1)[..., 1:].float(),
    )
    error_NCS = (counts_NCS - truth_NCS).abs()
    return {
        "count_error": error_NCS[truth_NCS > 0].mean().item(),
        "exact": (error_NCS.amax(dim=(1, 2)) < 0.5).float().mean().item(),
    }


def load_counter(path: Path) -> Counter:
    """The shipped counter, float32, in eval mode, without gradient of its own.

    Raises:
        RunError: The file is missing.
    """
    if not path.is_file():
        raise RunError(f"counter: {path} is missing; install rltune again")
    counter = Counter()
    counter.load_state_dict(load_file(path))  # half precision on disk
    return counter.float().eval().requires_grad_(False)
