import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from rltune.builtin.denoiser import Denoiser, cyclic_rate, make_denoiser, velocity_error
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


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        # Cycles of 1000 and 3000 steps, whose last quarters are 250 and 750.
        (0, 1 / 200),
        (99, 1 / 2),
        (199, 1.0),
        (500, 1.0),
        (750, 1.0),
        (875, 0.02 + 0.98 / 2),
        (999, 0.02 + 0.98 * (1 - math.cos(math.pi / 250)) / 2),
        (1000, 1 / 200),
        (1099, 1 / 2),
        (1199, 1.0),
        (3250, 1.0),
        (3625, 0.02 + 0.98 / 2),
        (3999, 0.02 + 0.98 * (1 - math.cos(math.pi / 750)) / 2),
    ],
)
def test_the_rate_rises_stays_and_falls_in_each_cycle(step: int, rate: float) -> None:
    assert cyclic_rate(step, (1000, 3000)) == pytest.approx(rate, rel=1e-12)  # float64


def test_one_cycle_is_the_whole() -> None:
    rates = [cyclic_rate(step, (400,)) for step in range(400)]
    assert rates[:200] == pytest.approx([(step + 1) / 200 for step in range(200)], rel=1e-12)  # float64
    assert rates[199:301] == [1.0] * 102
    assert all(one > other for one, other in pairwise(rates[300:]))
    assert rates[-1] == pytest.approx(0.02, abs=0.98 * (math.pi / 100) ** 2 / 4 + 1e-12)  # 1 - cos(x) < x^2 / 2
