"""JPEG as rewards need it: the bits that a file will take, differentiably, and the real file.

B: images in the batch. H, W: image rows and columns. N: blocks of 8 x 8.
"""

import io
import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from rltune.errors import UserError
from rltune.rewards.pictures import to_pictures

CHROMA = ("4:2:0", "4:4:4")
"""Chroma of half the rows and columns, or whole."""


FILE_BITS = {"4:2:0": (2.0, 0.35), "4:4:4": (2.1, 0.45)}
"""Bits per pixel of a file of quality 95 beyond its header, as slope and offset over the estimate: 0.90 to 1.11 times
the file of 64 built-in scenes and of noise of 64 to 512 px with spectra from white to 1 / f^2, 1.17 of a flat image."""


def check_options(reward: str, quality: Any, chroma: Any) -> None:
    """Check the options that say how an image is encoded.

    Raises:
        UserError: ``quality`` is out of range, or ``chroma`` is unknown.
    """
    if not isinstance(quality, int) or isinstance(quality, bool) or not 1 <= quality <= 100:
        raise UserError(f"reward {reward!r}: quality must be a whole number in [1, 100], got {quality!r}")
    if chroma not in CHROMA:
        raise UserError(f"reward {reward!r}: chroma must be {' or '.join(map(repr, CHROMA))}, got {chroma!r}")


def estimate_bits(images_B3HW: Tensor, *, quality: int, chroma: str) -> Tensor:
    """Return the bits per pixel that each image is estimated to take: ``(B,)`` float32, >= 0, differentiable.

    A coefficient c, in quantisation steps, is counted as ``log2(1 + (2 c)^2) / 2`` bits: nearly none below the half
    step that is rounded away, ``1 + log2 |c|`` far above it. That is a proxy: in step with the bits that a file takes,
    and about half of them (``estimated_kilobytes``), for a file says where a coefficient stands as well. The
    coefficients are not rounded, since rounding has no gradient: with a rounding of polynomial gradient the correlation
    is the same and ascent reaches less.
    """
    height, width = images_B3HW.shape[-2:]
    bits_B = images_B3HW.new_zeros(images_B3HW.shape[0], dtype=torch.float32)
    for coefficients_BN88 in jpeg_coefficients(images_B3HW.float(), quality=quality, chroma=chroma):
        bits_B = bits_B + (0.5 * torch.log2(1 + (2 * coefficients_BN88).square())).sum(dim=(1, 2, 3))
    return bits_B / (height * width)


def estimated_kilobytes(bits_per_pixel: float, *, num_pixels: int, chroma: str) -> float:
    """Return the kilobytes (of 1000) that ``file_sizes`` is expected to have at quality 95, from the estimate there.

    The file's header, and a straight line through what files take beyond it.
    """
    slope, offset = FILE_BITS[chroma]
    return (header_bytes(chroma) + (slope * bits_per_pixel + offset) * num_pixels / 8) / 1000


def estimate_of_kilobytes(kilobytes: float, *, num_pixels: int, chroma: str) -> float:
    """Return the bits per pixel at which ``estimated_kilobytes`` gives ``kilobytes``; below 0 if a file has more."""
    slope, offset = FILE_BITS[chroma]
    return ((1000 * kilobytes - header_bytes(chroma)) * 8 / num_pixels - offset) / slope


def header_bytes(chroma: str) -> int:
    """Return the bytes of a file that no image has any part in: all tables and markers, before the coded data."""
    return encode_jpeg(torch.zeros(3, 16, 16), quality=95, chroma=chroma).index(b"\xff\xda") + 14 + 2


def round_trip_distance(images_B3HW: Tensor, *, quality: int) -> Tensor:
    """Return the mean squared distance of RGB in [0, 1] to its 4:2:0 JPEG round trip: ``(B,)`` float32.

    The round trip is kornia's, in which ``round(x) + (x - round(x))^3`` stands for rounding (Shin and Song, 2017):
    differentiable but where a coefficient lies midway between two levels, and it jumps. Edges are repeated up to blocks
    of 16 and cut off again. What is decoded is softly clipped to [0, 1], which all but zeroes its gradient outside.
    Two deviations from a file: neutral chroma is 127.5, not 128, so that a flat gray has up to 8e-6, and steps of the
    tables are up to one smaller, since they are floored as smoothly as coefficients are rounded.
    """
    from kornia.enhance import jpeg_codec_differentiable  # slow to import, and only this needs it

    if images_B3HW.shape[0] == 0:  # which kornia refuses
        return images_B3HW.new_zeros(0, dtype=torch.float32)
    x_B3HW = images_B3HW.float()
    decoded_B3HW = jpeg_codec_differentiable(x_B3HW, torch.tensor([float(quality)]))
    return (x_B3HW - decoded_B3HW).square().mean(dim=(1, 2, 3))


def file_sizes(images_B3HW: Tensor, *, quality: int, chroma: str) -> Tensor:
    """Return the kilobytes (of 1000) of each image as a JPEG file: ``(B,)`` float32 on its device, no gradient."""
    sizes_kb = [len(encode_jpeg(image_3HW, quality=quality, chroma=chroma)) / 1000 for image_3HW in images_B3HW]
    return torch.tensor(sizes_kb, dtype=torch.float32, device=images_B3HW.device)


def jpeg_coefficients(images_B3HW: Tensor, *, quality: int, chroma: str = "4:2:0") -> tuple[Tensor, Tensor, Tensor]:
    """Return the DCT coefficients of luma and both chromas in quantisation steps, unrounded: each ``(B, N, 8, 8)``.

    The steps of baseline JPEG (ITU-T T.81, JFIF colours): edges repeated up to whole blocks, chroma halved by averages
    of 2 x 2 at 4:2:0, type-II DCT of 8 x 8, division by the table; a block's DC coefficient is its difference from the
    block before. We take that in raster order for luma too, where a 4:2:0 file goes by squares of four. Differentiable.

    Args:
        images_B3HW: RGB in [0, 1], float32.
        quality: As libjpeg counts it, 1 to 100.
        chroma: ``"4:2:0"`` or ``"4:4:4"``.
    """
    is_halved = chroma == "4:2:0"
    height, width = images_B3HW.shape[-2:]
    unit_px = 16 if is_halved else 8
    padding = (0, -width % unit_px, 0, -height % unit_px)
    r_BHW, g_BHW, b_BHW = (255 * pad(images_B3HW, padding, mode="replicate")).unbind(dim=1)
    y_BHW = 0.299 * r_BHW + 0.587 * g_BHW + 0.114 * b_BHW
    chroma_B2HW = torch.stack([(b_BHW - y_BHW) / 1.772, (r_BHW - y_BHW) / 1.402], dim=1)
    cb_BHW, cr_BHW = (avg_pool2d(chroma_B2HW, 2) if is_halved else chroma_B2HW).unbind(dim=1)
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


def encode_jpeg(image_3HW: Tensor, *, quality: int, chroma: str = "4:2:0") -> bytes:
    """Return the image, RGB in [0, 1], as a baseline JPEG file; what is out of range is clipped."""
    buffer = io.BytesIO()
    to_pictures(image_3HW[None])[0].save(buffer, "JPEG", quality=quality, subsampling=chroma)
    return buffer.getvalue()
