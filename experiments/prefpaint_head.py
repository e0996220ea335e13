"""Fits a reward of PrefPaint's layout on the built-in CLIP, for inpainting: how well is a hole filled?

PrefPaint (arXiv:2410.21966) had people rate completions from 0 to 7. Here the picture that was cut into is known, and a
rating is 7 times how near the filled part comes to it. Rated are completions by the base model, the true picture, and
the hole filled from another picture, blurred, or flat. Writes the head, and the last features of the pictures that
it was fitted on, which its trust is measured from.

    python experiments/prefpaint_head.py            # -> runs/prefpaint/head.safetensors, features.safetensors
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rltune.canvas import Canvas
from rltune.config.experiment import RunConfig
from rltune.diffusion.loading import load_model
from rltune.rewards.clip_loading import load_clip
from rltune.rewards.prefpaint import BLOCK, PrefPaint, load_prefpaint
from rltune.training.canvases import load_canvases
from rltune.training.evaluation import ImageSet, draw_images
from rltune.training.sampling import image_shape, make_sampler

SIZE = 64
DEVICE = torch.device("cpu")
FEED_FORWARD, MIDDLE, LAST = 128, 128, 32
FAR = 0.35
"""Root mean square difference of RGB in [0, 1] within the hole from which on a completion is rated 0."""


def completions(canvases: list[Canvas], seed: int) -> Tensor:
    """The base model's, as inpaint.yaml draws them."""
    settings = {"task": "inpaint", "rewards": {"brightness": {}}, "sampler": {"steps": 12, "guidance": 3.0}}
    config, model = RunConfig.model_validate(settings), load_model("builtin")
    images = ImageSet(tuple(canvases), 1, image_shape(config, model))
    sampler = make_sampler(config, model)
    torch.manual_seed(seed)
    parts = [range(i, min(i + 32, len(canvases))) for i in range(0, len(canvases), 32)]
    return torch.cat([draw_images(sampler, images, part, DEVICE) for part in parts])


def spoilt(images: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Holes filled otherwise than they should be."""
    blurred = nn.functional.avg_pool2d(images, 9, stride=1, padding=4, count_include_pad=False)
    flat = images.flatten(2).median(2).values[:, :, None, None].expand_as(images)
    fills = {"another": images.roll(1, 0), "blurred": blurred, "flat": flat}
    return {name: torch.where(masks, fill, images) for name, fill in fills.items()}


def rating(images: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """7 for the true picture, 0 for one that is FAR from it or farther, within the hole."""
    share = masks.float().flatten(1).mean(1)
    distance = ((images - truth).square() * masks).flatten(1).mean(1).div(share).sqrt()
    return 7 * (1 - distance / FAR).clamp(min=0)


class Block(nn.Module):
    """The part of the published network that is fitted, from torch's own layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(width, 4, FEED_FORWARD, dropout=0.1, batch_first=True)
        self.layers = nn.Sequential(nn.Linear(width, MIDDLE), nn.Dropout(0.2), nn.Linear(MIDDLE, LAST))
        self.last = nn.Linear(LAST, 1, bias=False)

    def forward(self, pair: Tensor) -> Tensor:
        """Return scores of pairs of embeddings."""
        return self.last(self.layers(self.block(pair[:, None])[:, 0]))[:, 0]

    def published(self) -> dict[str, Tensor]:
        """The state dict under the published names."""
        state = {f"{BLOCK}{name}": value for name, value in self.block.state_dict().items()}
        state |= {f"mlp.layers.{name}": value for name, value in self.layers.state_dict().items()}
        return state | {"mlp.last_layer.weight": self.last.weight}


def embed(images: Tensor) -> Tensor:
    """What the built-in CLIP sees, as PrefPaint's head reads it."""
    tower = load_clip("builtin")
    return torch.cat([tower.model.encode_image(tower.preprocess(part)) for part in images.split(64)])


def fit(pairs: Tensor, ratings: Tensor, *, epochs: int) -> Block:
    """Fit scores to ratings by least squares."""
    torch.manual_seed(0)
    network = Block(pairs.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(pairs)).split(128):
            loss = (network(pairs[rows]) - ratings[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def examples(name: str, num: int) -> tuple[Tensor, Tensor, list[str]]:
    """Pairs of embeddings, their ratings, and which fill each is."""
    canvases = list(load_canvases(name, where="prompts", masks="mixed").prompts[:num])
    pictures = [canvas.read(SIZE, SIZE) for canvas in canvases]
    truth = torch.from_numpy(np.stack([image for image, _ in pictures])).permute(0, 3, 1, 2).float() / 255
    masks = torch.from_numpy(np.stack([mask for _, mask in pictures]))[:, None]
    fills = {"drawn": completions(canvases, 0), "true": truth, **spoilt(truth, masks)}
    given = embed(truth * ~masks)
    pairs = torch.cat([torch.cat([embed(images), given], dim=1) for images in fills.values()])
    ratings = torch.cat([rating(images, truth, masks) for images in fills.values()])
    return pairs, ratings, [kind for kind in fills for _ in canvases]


def main() -> None:
    """Fit, write, and say how scores of held-out pictures agree with their ratings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/prefpaint"))
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=60)
    asked = parser.parse_args()
    pairs, ratings, _ = examples("builtin", asked.pictures)
    network = fit(pairs, ratings, epochs=asked.epochs)
    asked.folder.mkdir(parents=True, exist_ok=True)
    head = asked.folder / "head.safetensors"
    save_file({name: value.detach().contiguous() for name, value in network.published().items()}, head)
    reward: PrefPaint = load_prefpaint(head, "builtin")
    with torch.no_grad():
        features = reward._head(pairs)
        save_file({"features": features}, asked.folder / "features.safetensors")
        held_pairs, held_ratings, kinds = examples("builtin-heldout", 128)
        held = reward._head.last(reward._head(held_pairs))[:, 0]
    for kind in dict.fromkeys(kinds):
        rows = torch.tensor([other == kind for other in kinds])
        both = torch.stack([held[rows], held_ratings[rows]])
        related = f"{float(torch.corrcoef(both)[0, 1]):.2f}" if float(both[1].std()) > 0 else "-"
        print(f"{kind:8} rated {float(both[1].mean()):.2f}, scored {float(both[0].mean()):.2f}, correlation {related}")
    print(f"all: correlation {float(torch.corrcoef(torch.stack([held, held_ratings]))[0, 1]):.2f} -> {head}")


if __name__ == "__main__":
    main()
