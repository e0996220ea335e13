"""The table against DDIM's published formulas, and against diffusers' own stepping."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from rltune.diffusion.table import read_ddim_table
from tests.conftest import SD15_SCHEDULE


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_table_steps_as_diffusers_does(prediction_type: str, eta: float) -> None:
    scheduler = DDIMScheduler(**SD15_SCHEDULE, clip_sample=False, prediction_type=prediction_type)
    table = read_ddim_table(scheduler, num_steps=7, eta=eta)
    # diffusers keeps the schedule in float32; in float64 both must agree to rounding
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(0)
    x, f, n = torch.randn(3, 2, 4, dtype=torch.float64, generator=generator)
    for k, t in enumerate(scheduler.timesteps):
        noise = {"variance_noise": n} if eta > 0 else {}
        step = scheduler.step(f, t, x, eta=eta, **noise)
        stepped = table.a_T[k] * x + table.b_T[k] * f + table.s_T[k] * n
        torch.testing.assert_close(stepped, step.prev_sample, rtol=1e-11, atol=1e-11)
        clean = table.d_T[k] * x + table.e_T[k] * f
        torch.testing.assert_close(clean, step.pred_original_sample, rtol=1e-11, atol=1e-11)
    assert table.timesteps_T.tolist() == scheduler.timesteps.tolist()
    assert table.is_deterministic == (eta == 0)


def test_epsilon_coefficients_are_ddim_equation_12() -> None:
    """x_prev = sqrt(a') (x - sqrt(1 - a) eps) / sqrt(a) + sqrt(1 - a') eps, written out by hand from the betas."""
    table = read_ddim_table(PNDMScheduler(**SD15_SCHEDULE), num_steps=4, eta=0.0)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32).double() ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    assert table.timesteps_T.tolist() == [751, 501, 251, 1]  # leading spacing, offset 1
    now = alpha_bar[[751, 501, 251, 1]]
    then = torch.stack([*alpha_bar[[501, 251, 1]], alpha_bar[0]])
    # float32 betas inside diffusers, 1000 factors
    torch.testing.assert_close(table.a_T, (then / now).sqrt(), rtol=1e-5, atol=0)
    expected_b = (1 - then).sqrt() - (then * (1 - now) / now).sqrt()
    torch.testing.assert_close(table.b_T, expected_b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(table.d_T, 1 / now.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(table.e_T, -((1 - now) / now).sqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("setting", [{"clip_sample": True}, {"clip_sample": False, "thresholding": True}])
def test_a_step_that_is_not_affine_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="clip_sample/thresholding"):
        read_ddim_table(DDIMScheduler(**SD15_SCHEDULE, **setting), num_steps=4, eta=0.0)
