"""An image decoded in overlapping tiles, each in a checkpoint of its own, so that a backward pass holds one at a time.

B: images. C, H, W: latent channels, rows, columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

TILE_PX = 512
"""About the side of a tile: what a decoder is used to, and its activations fit beside any model."""
OVERLAP_PX = 64


@dataclass(frozen=True)
class Tiling:
    """How large tiles are, in latent rows or columns."""

    tile: int
    overlap: int

    @classmethod
    def of(cls, px_per_latent: int) -> "Tiling":
        """Return the tiling of a decoder that makes so many pixels a side of each latent."""
        return cls(max(2, TILE_PX // px_per_latent), max(1, OVERLAP_PX // px_per_latent))

    def spans(self, side: int) -> list[tuple[int, int]]:
        """Return start and end of the tiles of a side: as few as may be, of nearly equal length, overlapping.

        They are longer than ``tile`` by the overlap at most, so that a side of two tiles is cut in two.
        """
        count = -(-side // self.tile)
        length = -(-(side + (count - 1) * self.overlap) // count)
        starts = [round(i * (side - length) / max(1, count - 1)) for i in range(count)]
        return [(start, start + length) for start in starts]


def decode_in_tiles(decode: Callable[[Tensor], Tensor], x_BCHW: Tensor, tiling: Tiling, *, is_kept: bool) -> Tensor:
    """Decode (B, C, H, W) -> (B, 3, height, width) tile by tile, blended linearly where they overlap.

    Differentiable; it differs a little from ``decode`` of the whole, whose normalisation and attention see all of it.

    Args:
        decode: Decoder of any latent size; its image has the same whole number of pixels a latent everywhere.
        x_BCHW: Clean latents.
        tiling: How large tiles are.
        is_kept: Keep the tiles' activations for the backward pass instead of computing each again.
    """
    H, W = x_BCHW.shape[2:]
    total = weight = torch.zeros(())
    for top, bottom in tiling.spans(H):
        for left, right in tiling.spans(W):
            z_BCHW = x_BCHW[:, :, top:bottom, left:right]
            if is_kept:
                image = decode(z_BCHW)
            else:
                image = checkpoint(decode, z_BCHW, use_reentrant=False, preserve_rng_state=False)
            factor = image.shape[-1] // (right - left)
            rows = _window(top, bottom, H, tiling.overlap, factor).to(image)
            columns = _window(left, right, W, tiling.overlap, factor).to(image)
            window = rows[:, None] * columns
            place = [part * factor for part in (left, W - right, top, H - bottom)]
            total = total.to(image) + pad(image * window, place)
            weight = weight.to(image) + pad(window, place)
    return total / weight


def _window(start: int, end: int, side: int, overlap: int, factor: int) -> Tensor:
    """Return how much each pixel of a tile counts along a side: falling to 0 linearly where another tile begins."""
    size, edge = (end - start) * factor, overlap * factor
    ramp = torch.arange(1, edge + 1) / (edge + 1)
    window = torch.ones(size)
    if start > 0:
        window[:edge] = ramp
    if end < side:
        window[-edge:] = ramp.flip(0)
    return window
