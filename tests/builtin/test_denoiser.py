from pathlib import Path

import pytest
import torch

from rltune.builtin.denoiser import Denoiser, make_denoiser, velocity_error
from rltune.builtin.networks import make_scheduler
from rltune.builtin.workshop import Workshop

VOCAB = 600


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    return make_denoiser(Workshop(tmp_path_factory.mktemp("build")), VOCAB)


def test_the_error_of_a_silent_network_is_the_size_of_the_velocity(denoiser: Denoiser) -> None:
    """With a zero last layer the prediction is 0, and the velocity is sqrt(a) noise - sqrt(1 - a) x0."""
    torch.nn.init.zeros_(denoiser.unet.conv_out.weight)
    torch.nn.init.zeros_(denoiser.unet.conv_out.bias)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 16, 8, 8, generator=generator)
    t = torch.tensor([0, 400, 999])
    token_ids = torch.randint(VOCAB, (3, 32), generator=generator)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[t].view(-1, 1, 1, 1)
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    with torch.no_grad():
        error = velocity_error(denoiser, make_scheduler(), x0, noise, t, token_ids)
    torch.testing.assert_close(error, velocity.square().mean(dim=(1, 2, 3)), rtol=1e-5, atol=0)


def test_the_schedule_ends_in_noise() -> None:
    # Of the signal a hundredth is left where twenty-step sampling starts; Stable Diffusion's schedule leaves .09.
    assert make_scheduler().alphas_cumprod[951].sqrt() < 0.011


def test_the_seed_decides_the_initial_weights(tmp_path: Path) -> None:
    one, same, other = (make_denoiser(Workshop(tmp_path, seed=seed), VOCAB).unet.conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
