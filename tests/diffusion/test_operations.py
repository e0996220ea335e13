"""Operations of a call on networks without values, against PyTorch's own count of every block."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rltune.diffusion.forecast import META, fused_attention
from rltune.diffusion.operations import matrix_rate, operations_an_image
from rltune.diffusion.sampler import guided_denoiser
from tests.diffusion.test_forecast import outline_of
from tests.tiny_families import PIPELINES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_diffusion", "flux2_klein"])
def test_blocks_that_are_alike_count_as_often_as_they_are_there(name: str) -> None:
    model = outline_of(PIPELINES[name])
    shape, row = model.latent_shape(32, 32), model.blank_text()
    x_BCHW, t = torch.empty(1, *shape, device=META), torch.empty((), device=META)
    denoise = guided_denoiser(model, [row], row, META, guidance_scale=2.0)
    products: list[int] = []
    with torch.no_grad(), fused_attention(products), FlopCounterMode(display=False) as counter:
        denoise(x_BCHW, t)
    with torch.no_grad(), FlopCounterMode(display=False) as decoder:
        model.decode(x_BCHW)
    call, decoding = operations_an_image(model, shape, guidance_scale=2.0)
    assert call == counter.get_total_flops() + sum(products) > 0
    assert decoding == pytest.approx(decoder.get_total_flops(), rel=0.01)
    half, _ = operations_an_image(model, shape, guidance_scale=1.0)
    assert 2 * half == call


def test_a_machine_multiplies_so_fast() -> None:
    threads = torch.get_num_threads()
    assert 1e8 < matrix_rate(torch.float32) < 1e13
    assert torch.get_num_threads() == threads
