"""Tiles of a decoder: a partition of the image, an exact gradient, and one tile's activations at a time."""

from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rltune.diffusion import tiles
from rltune.diffusion.families.base import FAMILIES
from rltune.diffusion.memory import stored_bytes
from rltune.diffusion.tiles import Tiling, decode_in_tiles
from tests.diffusion.test_blocks import latents, sampler_of
from tests.tiny_families import PIPELINES, lively, shared_out

SMALL = Tiling(tile=8, overlap=2)


@pytest.mark.parametrize("side", [*range(2, 40), 128, 144, 192])
@pytest.mark.parametrize("tiling", [SMALL, Tiling.of(8), Tiling.of(32)], ids=str)
def test_tiles_cover_a_side_and_overlap_as_much_as_they_should(tiling: Tiling, side: int) -> None:
    spans = tiling.spans(side)
    assert (spans[0][0], spans[-1][1]) == (0, side)
    assert len(spans) == -(-side // tiling.tile)
    lengths = {end - start for start, end in spans}
    assert len(lengths) == 1
    assert max(lengths) <= tiling.tile + tiling.overlap
    overlaps = [before[1] - after[0] for before, after in pairwise(spans)]
    assert all(overlap >= tiling.overlap for overlap in overlaps)
    assert all(overlap <= tiling.overlap + 1 + max(lengths) // 4 for overlap in overlaps)


def test_a_side_of_1024_px_is_cut_in_two() -> None:
    assert Tiling.of(8) == Tiling(tile=64, overlap=8)
    assert Tiling.of(8).spans(128) == [(0, 68), (60, 128)]
    assert Tiling.of(32) == Tiling(tile=16, overlap=2)


@pytest.mark.parametrize("shape", [(8, 8), (9, 8), (21, 30)])
def test_a_decoder_that_looks_at_one_latent_alone_gives_the_whole_image(shape: tuple[int, int]) -> None:
    def decode(x_BCHW: Tensor) -> Tensor:
        return interpolate(x_BCHW, scale_factor=4, mode="nearest").sin()

    x_BCHW = torch.randn(2, 3, *shape, dtype=torch.float64)
    torch.testing.assert_close(decode_in_tiles(decode, x_BCHW, SMALL, is_kept=False), decode(x_BCHW))


def test_the_seam_is_a_straight_line_from_one_tile_to_the_next() -> None:
    """Tiles of 0 and of 1, of which 4 pixels overlap."""
    numbers = iter([0.0, 1.0])
    x_BCHW = torch.zeros(1, 3, 2, 16)
    image = decode_in_tiles(lambda z: torch.full_like(z, next(numbers)), x_BCHW, Tiling(8, 4), is_kept=True)
    expected = torch.cat([torch.zeros(6), torch.arange(1, 5) / 5, torch.ones(6)])
    torch.testing.assert_close(image[0, 0, 0], expected)


@pytest.mark.long
@pytest.mark.parametrize("name", shared_out(PIPELINES, PIPELINES.keys() - {"stable_diffusion", "qwen_image"}))
def test_the_gradient_is_that_of_the_same_image_and_less_is_stored(name: str) -> None:
    torch.manual_seed(0)
    pipeline = lively(PIPELINES[name]())
    model = FAMILIES.get(type(pipeline).__name__)(pipeline)
    model.decoder.double()
    shape = model.latent_shape(96, 96)
    tiling = Tiling(tile=shape[1] // 3, overlap=shape[1] // 12)
    sampler = sampler_of(model, shape, tiling=tiling)
    x_BCHW = latents(model, shape)[:1].double().requires_grad_()

    def tiled(is_kept: bool) -> Tensor:
        return decode_in_tiles(model.decode, x_BCHW, tiling, is_kept=is_kept)

    whole, image = model.decode(x_BCHW), sampler.decode(x_BCHW)
    weight = torch.linspace(-1, 1, whole.numel(), dtype=x_BCHW.dtype).view_as(whole)
    (found,) = torch.autograd.grad((image * weight).sum(), x_BCHW)
    (kept,) = torch.autograd.grad((tiled(is_kept=True) * weight).sum(), x_BCHW)
    assert torch.equal(found, kept)
    assert stored_bytes(lambda: tiled(is_kept=False), model.decoder) < 0.1 * stored_bytes(
        lambda: model.decode(x_BCHW), model.decoder
    )
    assert 0 < (image - whole).abs().max() < 1  # the tiles' own statistics
    with torch.no_grad():
        assert torch.equal(sampler.decode(x_BCHW.detach()), model.decode(x_BCHW))
        two_BCHW = torch.cat([x_BCHW, x_BCHW.flip(-1)])
        singly = replace(sampler, is_decoded_singly=True).decode(two_BCHW)
        assert torch.equal(singly, torch.cat([model.decode(two_BCHW[:1]), model.decode(two_BCHW[1:])]))
    with mock.patch.object(tiles, "checkpoint", None):
        assert torch.equal(sampler.decode(x_BCHW.detach()), whole)  # as evaluation decodes
