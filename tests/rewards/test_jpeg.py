"""The coefficients against what libjpeg decodes, the distance against closed forms and real files."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rltune.builtin.render import render
from rltune.builtin.scenes import make_scene
from rltune.rewards.jpeg import (
    dct_basis,
    encode_jpeg,
    file_sizes,
    jpeg_coefficients,
    quantisation_tables,
    round_trip,
    round_trip_distance,
)


def test_the_basis_is_orthonormal_and_starts_with_the_mean() -> None:
    basis_88 = dct_basis()
    torch.testing.assert_close(basis_88 @ basis_88.T, torch.eye(8), rtol=0, atol=1e-6)
    torch.testing.assert_close(basis_88[0], torch.full((8,), 8**-0.5))


def test_tables_are_those_of_the_standard() -> None:
    luma_88, chroma_88 = quantisation_tables(50)  # quality 50 is Annex K of ITU-T T.81 itself
    assert luma_88[0].tolist() == [16, 11, 10, 16, 24, 40, 51, 61]
    assert luma_88[:, 0].tolist() == [16, 12, 14, 14, 18, 24, 49, 72]
    assert chroma_88[0].tolist() == [17, 18, 24, 47, 99, 99, 99, 99]


def decode(steps_BN88: Tensor, table_88: Tensor, rows: int, columns: int) -> Tensor:
    """Undo prediction, quantisation and DCT of one plane: ``(B, 8 * rows, 8 * columns)`` in [0, 255]."""
    steps_BN88 = steps_BN88.clone()
    steps_BN88[:, :, 0, 0] = steps_BN88[:, :, 0, 0].cumsum(dim=1)  # before rounding, which would pile up
    blocks = dct_basis().T @ (steps_BN88.round() * table_88) @ dct_basis() + 128
    return blocks.unflatten(1, (rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def decode_file(image_3HW: Tensor, quality: int, chroma: str) -> Tensor:
    """What libjpeg decodes from its own file, before colour conversion: Y, Cb and Cr in [0, 255]."""
    with Image.open(io.BytesIO(encode_jpeg(image_3HW, quality=quality, chroma=chroma))) as image:
        image.draft("YCbCr", image.size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.mark.parametrize(("chroma", "unit"), [("4:2:0", 2), ("4:4:4", 1)])
@pytest.mark.parametrize("size", [(32, 48), (37, 21)])
@pytest.mark.parametrize("quality", [50, 95])
def test_luma_decodes_to_what_libjpeg_decodes(size: tuple[int, int], quality: int, chroma: str, unit: int) -> None:
    # A gray picture of whole levels: its luma is whole too, so that libjpeg's 8 bits lose nothing.
    levels = torch.randint(60, 200, (1, 1, *size), generator=torch.Generator().manual_seed(0))
    images = (levels / 255).expand(1, 3, *size)
    rows, columns = (-(-length // (8 * unit)) * unit for length in size)
    steps = jpeg_coefficients(images, quality=quality, chroma=chroma)[0]
    ours = decode(steps, quantisation_tables(quality)[0], rows, columns)[0, : size[0], : size[1]]
    # libjpeg rounds decoded levels (0.25 on average), and its integer DCT tips coefficients near a half (0.3 more, seen
    # at steps of 1); a transposed table, or luma coded as chroma, is off by 9 levels and more.
    assert (ours - decode_file(images[0], quality, chroma)[0]).abs().mean() < 0.75


def test_halved_chroma_decodes_to_what_libjpeg_decodes() -> None:
    # One colour a square of 16: chroma blocks are flat, so that halving and libjpeg's smooth doubling lose nothing.
    colors = torch.rand(1, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    images = colors.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    theirs = decode_file(images[0], 95, "4:2:0")[1:, 8::16, 8::16]
    for plane, steps in enumerate(jpeg_coefficients(images, quality=95)[1:]):
        ours = decode(steps, quantisation_tables(95)[1], 3, 4)[0, 4::8, 4::8]
        # A DC step of 2 is a quarter of a level; 8-bit pixels and chroma are half a level each.
        assert (ours - theirs[plane]).abs().max() < 1.3


@pytest.mark.parametrize("quality", [50, 95])
def test_whole_chroma_decodes_to_what_libjpeg_decodes(quality: int) -> None:
    images = torch.rand(1, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(images, size=(37, 21), mode="bilinear")
    theirs = decode_file(images[0], quality, "4:4:4")[1:]
    for plane, steps in enumerate(jpeg_coefficients(images, quality=quality, chroma="4:4:4")[1:]):
        ours = decode(steps, quantisation_tables(quality)[1], 5, 3)[0, :37, :21]
        # libjpeg rounds pixels and chroma to whole levels before it transforms, and again after it: 0.25 on average
        # each, and what that tips over half a step; coded with the other table it is off by 4 levels and more.
        assert (ours - theirs[plane]).abs().mean() < 1


def test_the_file_has_the_chroma_that_was_asked_for() -> None:
    for chroma, halving in {"4:2:0": 2, "4:4:4": 1}.items():
        with Image.open(io.BytesIO(encode_jpeg(torch.rand(3, 16, 24), quality=90, chroma=chroma))) as image:
            assert image.size == (24, 16)
            # of the frame header's components: id, samples across, samples down, table
            assert [layer[1:3] for layer in image.layer] == [(halving, halving), (1, 1), (1, 1)]


def test_file_sizes_are_those_of_pillow() -> None:
    images = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=40, subsampling=0)
        sizes.append(buffer.tell() / 1000)
    assert file_sizes(images, quality=40, chroma="4:4:4").tolist() == pytest.approx(sizes)


def smooth_floor(x: float) -> float:
    return math.floor(x) + (x - 0.5 - math.floor(x)) ** 3


@pytest.mark.parametrize("level", [100.3, 130.8, 203.3])
@pytest.mark.parametrize("quality", [50, 75, 95])
def test_the_distance_of_a_flat_gray_is_known(level: float, quality: int) -> None:
    # One luma coefficient of 8 (level - 128), one chroma coefficient of 8 (127.5 - 128), for neutral chroma is half of
    # 255. Annex K's steps of 16 and 17 are scaled as libjpeg scales them, but for the smooth floor.
    def error(offset: float, annex_k: int) -> float:
        table = smooth_floor((annex_k * smooth_floor(200 - 2 * quality) + 50) / 100)
        c = 8 * offset / table
        return (round(c) + (c - round(c)) ** 3) * table / 8 - offset

    y, c = error(level - 128, 16), error(-0.5, 17)
    expected = ((y + 1.402 * c) ** 2 + (y - 0.344 * c - 0.714 * c) ** 2 + (y + 1.772 * c) ** 2) / 3 / 255**2
    distance = round_trip_distance(torch.full((1, 3, 21, 37), level / 255), quality=quality)
    # Its colour matrix has three digits; float32 resolves 2e-5 levels, of errors of 0.01 and more.
    assert distance.item() == pytest.approx(expected, rel=0.01)


KORNIA = {
    # quality: distance, one pixel's RGB, norm of the distance's gradient
    1: (0.08794773822279121, (0.635114525405041, 0.0, 0.8723281441490378), 0.0105437091452478),
    10: (0.07408655049627104, (0.636848702584321, 0.03155867506251479, 0.8488110892976954), 0.009798374657885663),
    49: (0.038607891324735535, (0.8106405015836153, 0.0219925431934299, 0.8632697286861544), 0.007311523624546697),
    50: (0.03786529854470814, (0.824896318671256, 0.0522876841225349, 0.8584822289117331), 0.00727748970344389),
    75: (0.032316940615119125, (0.9021967977460409, 0.14247311081013878, 0.8530481958227657), 0.00688294274082389),
    95: (0.03020355240785901, (0.8520974306463902, 0.11210966941376228, 0.7981361642924124), 0.006591439101607454),
    100: (0.03018131618579621, (0.8572375650225692, 0.11113694484933791, 0.8014233828037538), 0.006584282398985467),
}
"""``kornia.enhance.jpeg_codec_differentiable`` of kornia 0.9.0, in float64, of ``waves()`` below.

Where kornia was installed, all qualities were compared over 64 scenes of 64 px, their corners of 37 x 21, noise and
flat gray: distances agree to 4e-13 in float64. In float32 they agree to 4e-9, but where rounding tips a coefficient
that lies midway between two steps: there to 5e-6, in 4 of 1280 scenes to more than 1e-5 of the distance.
"""


def waves() -> Tensor:
    """Colours that differ in every block, clipped in parts: (1, 3, 21, 37), float64."""
    y_H1, x_1W = torch.arange(21.0, dtype=torch.float64)[:, None], torch.arange(37.0, dtype=torch.float64)[None]
    angles = [0.3 * (c + 1) * x_1W + 0.2 * (3 - c) * y_H1 + 0.01 * x_1W * y_H1 + c for c in range(3)]
    return (0.5 + 0.8 * torch.stack(angles).sin())[None].clamp(0, 1)


@pytest.mark.parametrize("quality", KORNIA)
def test_the_round_trip_is_kornias(quality: int, monkeypatch: pytest.MonkeyPatch) -> None:
    distance, pixel, norm = KORNIA[quality]
    assert round_trip_distance(waves(), quality=quality).item() == pytest.approx(distance, rel=1e-6)  # of float32
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    images = waves().requires_grad_()
    decoded = round_trip(images, quality=quality)
    assert decoded[0, :, 7, 11].tolist() == pytest.approx(pixel, abs=1e-9)
    (gradient,) = torch.autograd.grad((images - decoded).square().mean(), images)
    assert gradient.norm().item() == pytest.approx(norm, rel=1e-8)


@pytest.mark.parametrize("size", [(64, 64), (37, 21)])
def test_the_distance_is_about_that_to_the_real_file(size: tuple[int, int]) -> None:
    images = render([make_scene(0, i) for i in range(16)])[:, :, : size[0], : size[1]]
    files = [Image.open(io.BytesIO(encode_jpeg(image, quality=50))) for image in images]
    decoded = torch.stack([torch.from_numpy(np.array(file)).permute(2, 0, 1) / 255 for file in files])
    theirs = (images - decoded).square().mean(dim=(1, 2, 3))
    ours = round_trip_distance(images, quality=50)
    # The stand-in for rounding errs less than rounding, by a seventh of the squares if coefficients are uniform within
    # a step; libjpeg interpolates chroma in another way.
    assert np.corrcoef(ours, theirs)[0, 1] > 0.95
    assert 0.7 < (ours.sum() / theirs.sum()).item() < 1.1
