"""The judge: reads counts, colours, shapes and ground off a picture. No reward and no training ever sees it.

It shares nothing with what it judges: its own architecture, initialisation and pictures. It is supervised densely (a
colour and a shape for every cell of a coarse grid) and reads each colour's objects through an attention on that colour.
B pictures, D features, G cells a side, C object colours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own documentation writes F)

from rltune.builtin.corpus import to_network
from rltune.builtin.grammar import Content
from rltune.builtin.labels import Labels, make_labels, wear
from rltune.builtin.render import render
from rltune.builtin.scenes import GROUND_COLORS, MAX_OBJECTS, OBJECT_COLORS, SHAPES, make_scenes
from rltune.builtin.workshop import Workshop, cosine_rate, train
from rltune.errors import RunError

STAGE = "judge"
SEED_OFFSET = 1_000_003
"""The judge's pictures are those of another seed than the corpus'."""
NUM_PICTURES = 32_768
STEPS = 1_600
BATCH = 64
PEAK_LR = 2e-3
DISC = 0.85
"""A cell within this share of an object's radius belongs to it, a ring's hole included."""

COLORS, GROUNDS = tuple(OBJECT_COLORS), tuple(GROUND_COLORS)


@dataclass(frozen=True)
class Reading:
    """What the judge sees in one picture: colour -> (count, shape), and the ground."""

    groups: dict[str, tuple[int, str]]
    ground: str


@dataclass(frozen=True)
class Verdict:
    """Which parts of a prompt's content a picture shows."""

    ground: bool
    """True as well where the prompt leaves it open."""
    colors: bool
    """Exactly the colours asked for."""
    count: bool
    """As many objects in all as asked for."""
    shape: bool
    """No shape but those asked for, and all of them."""
    groups: bool
    """Every group has its colour, count and shape, and there is nothing else."""

    @property
    def exact(self) -> bool:
        """Everything right."""
        return self.ground and self.groups


def compare(reading: Reading, content: Content) -> Verdict:
    """Hold a reading against what was asked."""
    asked = {group.color: (group.count, group.shape) for group in content.groups}
    seen = reading.groups
    return Verdict(
        ground=content.ground in (None, reading.ground),
        colors=seen.keys() == asked.keys(),
        count=sum(count for count, _ in seen.values()) == sum(count for count, _ in asked.values()),
        shape={shape for _, shape in seen.values()} == {shape for _, shape in asked.values()},
        groups=seen == asked,
    )


class Judge(nn.Module):
    """Residual dilated convolutions at a quarter of the resolution; then one shared reader, once for each colour."""

    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 32, 5, stride=2), _Block(32, 1), _conv(32, width, 3, stride=2))
        self.trunk = nn.Sequential(*[_Block(width, dilation) for dilation in (1, 2, 4, 1)])
        self.color_map = nn.Conv2d(width, 1 + len(COLORS), 1)
        self.shape_map = nn.Conv2d(width, 1 + len(SHAPES), 1)
        self.center_map = nn.Conv2d(width, 1, 1)
        self.ground = nn.Linear(width, len(GROUNDS))
        self.reader = nn.Sequential(nn.Linear(width + 3, 96), nn.ReLU())
        self.count = nn.Linear(96, 1 + MAX_OBJECTS)
        self.shape = nn.Linear(96, len(SHAPES))

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        """Logits from RGB in [-1, 1]: the three maps, ground, and per colour ``count`` and ``shape``."""
        features = self.trunk(self.stem(images_B3HW))
        color_map, center_map = self.color_map(features), self.center_map(features)
        features_BDN = features.flatten(2)
        weight_BCN = color_map.softmax(1).flatten(2)
        mass_BC = weight_BCN.sum(2)
        pooled_BCD = torch.einsum("bcn,bdn->bcd", weight_BCN, features_BDN) / (mass_BC[..., None] + 1e-3)
        center_BN = center_map.sigmoid().flatten(1)
        centers_BC = torch.einsum("bcn,bn->bc", weight_BCN, center_BN)[:, 1:]
        sizes = torch.stack(
            [mass_BC[:, 1:] / 32, centers_BC, center_BN.sum(1, keepdim=True).expand_as(centers_BC)], dim=2
        )
        read = self.reader(torch.cat([pooled_BCD[:, 1:], sizes], dim=2))
        return {
            "color_map": color_map,
            "shape_map": self.shape_map(features),
            "center_map": center_map[:, 0],
            "ground": self.ground(pooled_BCD[:, 0]),
            "count": self.count(read),
            "shape": self.shape(read),
        }

    @torch.no_grad()
    def read(self, images_B3HW: Tensor) -> list[Reading]:
        """What is in pictures, RGB in [-1, 1]."""
        logits = self(images_B3HW)
        count_BC, shape_BC, ground_B = (logits[name].argmax(-1).tolist() for name in ("count", "shape", "ground"))
        return [
            Reading({COLORS[c]: (n, SHAPES[shapes[c]]) for c, n in enumerate(counts) if n > 0}, GROUNDS[ground])
            for counts, shapes, ground in zip(count_BC, shape_BC, ground_B, strict=True)
        ]


def _conv(width_in: int, width_out: int, size: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, size, stride, dilation * (size // 2), dilation, bias=False),
        nn.BatchNorm2d(width_out),
        nn.ReLU(),
    )


class _Block(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(width, width, 3, dilation=dilation), _conv(width, width, 3))

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = features + self.body(features)
        return result


def train_judge(shop: Workshop) -> Judge:
    """The trained judge, in eval mode."""
    with shop.seeded(STAGE):
        judge = Judge().to(shop.device)
    num_steps = shop.scaled(STEPS, at_least=2)
    images_N3HW, labels = _load_pictures(shop)
    optimizer = torch.optim.AdamW(
        [{"name": "all", "params": list(judge.parameters())}], lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-2
    )

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        picks = torch.randint(len(labels), (BATCH,), generator=generator)
        images = wear(to_network(images_N3HW[picks]), generator).to(shop.device)
        with torch.autocast(shop.device.type, dtype=torch.bfloat16):
            logits = judge(images)
        return judge_loss({name: value.float() for name, value in logits.items()}, labels[picks].to(shop.device))

    train(
        shop,
        STAGE,
        modules={"judge": judge},
        optimizer=optimizer,
        num_steps=num_steps,
        loss_of=loss_of,
        learning_rate_of=lambda step, _: PEAK_LR * cosine_rate(step, num_steps, warmup=80),
    )
    judge.eval()
    if shop.load_figures(STAGE) is None:
        shop.save_figures(STAGE, _measure(shop, judge))
    return judge


def judge_loss(logits: dict[str, Tensor], labels: Labels) -> Tensor:
    """Cross-entropies of all that is read, the maps' included; a shape counts only where its colour is there."""
    disc_BKGG = labels.discs(DISC)
    color_BGG = _paint(disc_BKGG, labels.color_BK)
    shape_BGG = _paint(disc_BKGG, labels.shape_BK)
    center_BGG = labels.centers().sum(1)
    count_BC, shape_BC = labels.counts(), labels.shape_of_color()
    maps = F.cross_entropy(logits["color_map"], color_BGG) + F.cross_entropy(logits["shape_map"], shape_BGG)
    centers = F.binary_cross_entropy_with_logits(logits["center_map"], center_BGG, pos_weight=center_BGG.new_tensor(8))
    # Absent colours outnumber present ones six to one and are easily told.
    count_error_BC = F.cross_entropy(logits["count"].flatten(0, 1), count_BC.flatten(), reduction="none")
    weight_BC = torch.where(count_BC > 0, 1.0, 0.3).flatten()
    count = (count_error_BC * weight_BC).sum() / weight_BC.sum()
    shape = F.cross_entropy(logits["shape"].flatten(0, 1), shape_BC.flatten(), ignore_index=-1)
    return maps + centers + F.cross_entropy(logits["ground"], labels.ground_B) + 2 * count + shape


def _paint(disc_BKGG: Tensor, value_BK: Tensor) -> Tensor:
    """Each cell's class: 0 where nothing is, one more than the value of the object that covers it elsewhere."""
    return (disc_BKGG * (value_BK[..., None, None] + 1)).amax(1)


def _load_pictures(shop: Workshop) -> tuple[Tensor, Labels]:
    total = shop.scaled(NUM_PICTURES, at_least=64)
    scenes, _ = make_scenes(shop.seed + SEED_OFFSET, total, is_heldout=False)
    images: Tensor | None = shop.load("judge-pictures")
    if images is None:
        batches = []
        for first in range(0, total, 256):
            batches.append((render(scenes[first : first + 256]) * 255).round().to(torch.uint8))
            shop.on_progress("judge-pictures", min(first + 256, total), total, {})
        images = torch.cat(batches)
        shop.save("judge-pictures", images)
    return images, make_labels(scenes)


def _measure(shop: Workshop, judge: Judge) -> dict[str, float]:
    """Shares of held-out scenes of yet another seed that are read right."""
    scenes, _ = make_scenes(shop.seed + 2 * SEED_OFFSET, shop.scaled(1_024, at_least=8), is_heldout=True)
    contents = [Content(scene.groups, scene.ground) for scene in scenes]
    images = (render(scenes) * 255).round().to(torch.uint8)
    verdicts = judge_images(judge, images, contents, shop.device)
    names = ("ground", "colors", "count", "shape", "groups", "exact")
    return {name: sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts) for name in names}


def judge_images(
    judge: Judge, images_uint8: Tensor, contents: Sequence[Content], device: torch.device
) -> list[Verdict]:
    """One verdict a picture, ``(N, 3, 64, 64)`` uint8 RGB."""
    readings = [reading for batch in images_uint8.split(128) for reading in judge.read(to_network(batch.to(device)))]
    return [compare(reading, content) for reading, content in zip(readings, contents, strict=True)]


def load_judge(path: Path) -> Judge:
    """The shipped judge, float32, in eval mode.

    Raises:
        RunError: The file is missing.
    """
    if not path.is_file():
        raise RunError(f"judge: {path} is missing; install rltune again")
    judge = Judge()
    judge.load_state_dict(load_file(path))  # half precision on disk
    return judge.float().eval().requires_grad_(False)
