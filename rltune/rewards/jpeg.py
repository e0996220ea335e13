"""JPEG as rewards need it: the bits that a file will take, differentiably, and the real file.

B: images in the batch. H, W: image rows and columns. h, w: rows and columns of blocks of 8 x 8, N of them.
"""

import io
import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

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
    """Return the mean squared distance of RGB in [0, 1] to its 4:2:0 JPEG round trip: ``(B,)`` float32."""
    x_B3HW = images_B3HW.float()
    return (x_B3HW - round_trip(x_B3HW, quality=quality)).square().mean(dim=(1, 2, 3))


def round_trip(images_B3HW: Tensor, *, quality: int) -> Tensor:
    """Return RGB in [0, 1] as a 4:2:0 JPEG file of it would show it, nearly: ``(B, 3, H, W)``, differentiable.

    The steps of ``jpeg_coefficients`` and back, with ``round(c) + (c - round(c))^3`` for rounding (Shin and Song, 2017:
    "JPEG-resistant adversarial images"), whose gradient is 0 at a whole step and which jumps midway between two. The
    numbers are those of kornia 0.9, which DRaFT's distance was measured with here, and so are its deviations from a
    file: neutral chroma is 127.5, not 128, so that a flat gray has a distance of up to 8e-6; the steps of the tables
    are floored as smoothly as coefficients are rounded, so up to one smaller; chroma is blurred before it is halved and
    interpolated when it is doubled; the factors of chroma have three digits. What leaves [0, 1] is clamped, which
    zeroes its gradient.

    Args:
        images_B3HW: RGB in [0, 1], float32; edges are repeated up to blocks of 16 and cut off again.
        quality: As libjpeg counts it, 1 to 100.
    """
    height, width = images_B3HW.shape[-2:]
    r_BHW, g_BHW, b_BHW = pad(images_B3HW, (0, -width % 16, 0, -height % 16), mode="replicate").unbind(dim=1)
    y_BHW = 0.299 * r_BHW + 0.587 * g_BHW + 0.114 * b_BHW
    chroma_B2HW = torch.stack([0.564 * (b_BHW - y_BHW), 0.713 * (r_BHW - y_BHW)], dim=1) + 0.5
    planes = (255 * y_BHW, *(255 * _halved(chroma_B2HW)).unbind(dim=1))
    luma_88, chroma_88 = (_smooth_table(annex_k_88.to(images_B3HW), quality) for annex_k_88 in quantisation_tables(50))
    basis_88 = dct_basis().to(images_B3HW)
    y_BHW, *chroma = (
        _decoded(plane_BHW, basis_88, table_88)
        for plane_BHW, table_88 in zip(planes, (luma_88, chroma_88, chroma_88), strict=True)
    )
    whole_B2HW = interpolate(torch.stack(chroma, dim=1), scale_factor=2, mode="bilinear", align_corners=False)
    y_BHW, (cb_BHW, cr_BHW) = y_BHW / 255, (whole_B2HW / 255 - 0.5).unbind(dim=1)
    rgb = (
        y_BHW + cr_BHW / 0.713,
        y_BHW - (0.114 / 0.564 * cb_BHW + 0.299 / 0.713 * cr_BHW) / 0.587,
        y_BHW + cb_BHW / 0.564,
    )
    return torch.stack(rgb, dim=1)[..., :height, :width].clamp(0, 1)


def _decoded(plane_BHW: Tensor, basis_88: Tensor, table_88: Tensor) -> Tensor:
    """Return a plane in [0, 255] as it comes back from its coefficients, smoothly rounded to whole steps."""
    steps_Bhw88 = basis_88 @ _blocks(plane_BHW - 128) @ basis_88.T / table_88
    nearest_Bhw88 = steps_Bhw88.round()
    rounded_Bhw88 = nearest_Bhw88 + (steps_Bhw88 - nearest_Bhw88) ** 3
    blocks_Bhw88 = basis_88.T @ (rounded_Bhw88 * table_88) @ basis_88
    decoded_BHW: Tensor = blocks_Bhw88.transpose(2, 3).flatten(3, 4).flatten(1, 2) + 128
    return decoded_BHW


def _halved(chroma_BCHW: Tensor) -> Tensor:
    """Return half the rows and columns: averages of 2 x 2 after a 3 x 3 Gaussian of half a pixel, edges mirrored."""
    side = math.exp(-2) / (1 + 2 * math.exp(-2))
    x_BCHW = pad(chroma_BCHW, (1, 1, 1, 1), mode="reflect")
    x_BCHW = side * (x_BCHW[..., :-2] + x_BCHW[..., 2:]) + (1 - 2 * side) * x_BCHW[..., 1:-1]
    x_BCHW = side * (x_BCHW[..., :-2, :] + x_BCHW[..., 2:, :]) + (1 - 2 * side) * x_BCHW[..., 1:-1, :]
    return avg_pool2d(x_BCHW, 2)


def _smooth_table(annex_k_88: Tensor, quality: int) -> Tensor:
    """Return Annex K's table scaled to a quality as libjpeg does, with smooth floors and bounds: ``(8, 8)``."""
    scale = _smooth_floor(annex_k_88.new_tensor(5000 / quality if quality < 50 else 200 - 2 * quality))
    steps_88 = (annex_k_88 * scale + 50) / 100
    above_88, below_88 = (steps_88 - 255).clamp(min=0), (1 - steps_88).clamp(min=0)
    bounded_88 = steps_88 - above_88 + below_88 + 0.02 * (torch.exp(-below_88) - torch.exp(-above_88))
    return _smooth_floor(bounded_88)


def _smooth_floor(x: Tensor) -> Tensor:
    return x.floor() + (x - 0.5 - x.floor()) ** 3


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
    steps_BN88 = basis_88 @ _blocks(plane_BHW).flatten(1, 2) @ basis_88.T / table_88
    before_BN = pad(steps_BN88[:, :-1, 0, 0], (1, 0))
    is_dc_88 = pad(steps_BN88.new_ones(1, 1), (0, 7, 0, 7))
    coded_BN88: Tensor = steps_BN88 - before_BN[:, :, None, None] * is_dc_88
    return coded_BN88


def _blocks(plane_BHW: Tensor) -> Tensor:
    """Return a plane cut into blocks: ``(B, H / 8, W / 8, 8, 8)``."""
    blocks_Bhw88: Tensor = plane_BHW.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).transpose(2, 3)
    return blocks_Bhw88


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
