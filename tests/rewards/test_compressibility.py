"""The estimate of JPEG bits against what libjpeg decodes, and against real file sizes."""

import io

import kornia.enhance
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rltune.builtin.render import render
from rltune.builtin.scenes import make_scene
from rltune.errors import UserError
from rltune.rewards.base import REWARDS
from rltune.rewards.compressibility import dct_basis, encode_jpeg, jpeg_coefficients, quantisation_tables


@pytest.fixture(scope="module")
def scenes() -> Tensor:
    return render([make_scene(0, i) for i in range(96)])


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.numpy(), b.numpy())[0, 1])


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


def decode_file(image_3HW: Tensor, quality: int) -> Tensor:
    """What libjpeg decodes from its own file, before colour conversion: Y, Cb and Cr in [0, 255]."""
    with Image.open(io.BytesIO(encode_jpeg(image_3HW, quality=quality))) as image:
        image.draft("YCbCr", image.size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.mark.parametrize("size", [(32, 48), (37, 21)])
@pytest.mark.parametrize("quality", [50, 95])
def test_luma_decodes_to_what_libjpeg_decodes(size: tuple[int, int], quality: int) -> None:
    # A gray picture of whole levels: its luma is whole too, so that libjpeg's 8 bits lose nothing.
    levels = torch.randint(60, 200, (1, 1, *size), generator=torch.Generator().manual_seed(0))
    images = (levels / 255).expand(1, 3, *size)
    rows, columns = -(-size[0] // 16) * 2, -(-size[1] // 16) * 2
    steps = jpeg_coefficients(images, quality=quality)[0]
    ours = decode(steps, quantisation_tables(quality)[0], rows, columns)[0, : size[0], : size[1]]
    # libjpeg rounds decoded levels (0.25 on average), and its integer DCT tips coefficients near a half (0.3 more, seen
    # at steps of 1); a transposed table, or luma coded as chroma, is off by 9 levels and more.
    assert (ours - decode_file(images[0], quality)[0]).abs().mean() < 0.75


def test_chroma_decodes_to_what_libjpeg_decodes() -> None:
    # One colour a square of 16: chroma blocks are flat, so that halving and libjpeg's smooth doubling lose nothing.
    colors = torch.rand(1, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    images = colors.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    theirs = decode_file(images[0], 95)[1:, 8::16, 8::16]
    for plane, steps in enumerate(jpeg_coefficients(images, quality=95)[1:]):
        ours = decode(steps, quantisation_tables(95)[1], 3, 4)[0, 4::8, 4::8]
        # A DC step of 2 is a quarter of a level; 8-bit pixels and chroma are half a level each.
        assert (ours - theirs[plane]).abs().max() < 1.3


def test_the_estimate_follows_the_bytes_and_the_distance_of_draft_does_not(scenes: Tensor) -> None:
    reward = REWARDS.build("compressibility", {})
    prompts = [""] * len(scenes)
    bytes_B = reward.metric(scenes, prompts)
    decoded = kornia.enhance.jpeg_codec_differentiable(scenes, torch.tensor([95.0]))
    distance_B = -(scenes - decoded).square().mean(dim=(1, 2, 3))
    estimated, distant = correlation(reward(scenes, prompts), bytes_B), correlation(distance_B, bytes_B)
    assert estimated > 0.97
    assert distant < estimated - 0.2


def test_ascent_on_the_estimate_saves_bytes(scenes: Tensor) -> None:
    reward = REWARDS.build("compressibility", {})
    images = scenes[:8].clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (-reward(images, [""] * 8).sum()).backward()
        optimizer.step()
    saved = reward.metric(images.detach(), [""] * 8) - reward.metric(scenes[:8], [""] * 8)
    assert (saved > 0).all()
    assert saved.mean() > 0.1  # kB, of 2.4


def test_the_metric_is_the_file_size(scenes: Tensor) -> None:
    buffer = io.BytesIO()
    pixels = (scenes[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=2)
    metric = REWARDS.build("compressibility", {"quality": 50}).metric(scenes[:1], [""])
    assert metric.item() == pytest.approx(-buffer.tell() / 1000)
    with Image.open(io.BytesIO(encode_jpeg(scenes[0], quality=95))) as image:
        assert image.size == (scenes.shape[3], scenes.shape[2])


def test_flat_images_cost_next_to_nothing_at_any_level() -> None:
    flat = torch.stack([torch.full((3, 64, 64), level) for level in (0.0, 0.3, 1.0)])
    # One DC coefficient of at most 1024 / 2 steps: 10 bits in 4096 pixels, thrice for the planes.
    assert (REWARDS.build("compressibility", {})(flat, [""] * 3) > -30 / 4096).all()


@pytest.mark.parametrize("quality", [0, 101, 50.0, "high", True])
def test_a_quality_out_of_range_is_refused(quality: object) -> None:
    with pytest.raises(UserError, match=r"quality must be a whole number in \[1, 100\]"):
        REWARDS.build("compressibility", {"quality": quality})
