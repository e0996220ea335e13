"""The table against DDIM's published formulas, and against diffusers' own stepping."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from rltune.diffusion.table import read_ddim_table
from tests.tiny import SD15_SCHEDULE
from tests.toys import double_scheduler, make_table


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


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


@pytest.mark.long
def test_from_no_signal_at_eta_1_all_noise_is_fresh() -> None:
    """x' = sqrt(a') x0 + sqrt(1 - a') n, x0 = -v; diffusers' own step takes the root of -1e-17 at 37 of these 100."""
    num_nan = 0
    for num_steps in range(1, 101):
        table = make_table(num_steps, 1.0, **ZERO_SNR)
        columns = torch.stack([table.a_T, table.b_T, table.s_T, table.d_T, table.e_T])
        assert bool(columns.isfinite().all()), num_steps
        scheduler = double_scheduler(num_steps, **ZERO_SNR)
        end = int(scheduler.timesteps[0]) - 1000 // num_steps
        alpha_bar = float(scheduler.alphas_cumprod[end] if end >= 0 else scheduler.final_alpha_cumprod)
        # where it is no NaN the root of 1e-17 is left of the old noise
        expected = [0.0, -(alpha_bar**0.5), (1 - alpha_bar) ** 0.5, 0.0, -1.0]
        torch.testing.assert_close(columns[:, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=2e-8)
        zero = torch.zeros(1, dtype=torch.float64)
        step = scheduler.step(zero, scheduler.timesteps[0], zero, eta=1.0, variance_noise=zero)
        num_nan += bool(step.prev_sample.isnan())
    assert num_nan > 10  # or nothing was shown


@pytest.mark.parametrize(
    ("num_steps", "settings", "message"),
    [
        (1000, {}, r"1000 steps begin at timestep 1000 of a schedule that ends at 999 \(steps_offset 1\); take fewer"),
        (
            10,
            {**ZERO_SNR, "prediction_type": "epsilon"},
            r"^step 1 of 10 \(timestep 999, eta 0.5\) has coefficients that are not finite: no signal is left there, "
            "where prediction_type 'epsilon' says nothing of the image; set rescale_betas_zero_snr: false",
        ),
        (
            4,
            {"trained_betas": [1e-3] * 500 + [1.5] + [1e-3] * 499},
            r"not finite: .*scheduler_config.json describes no noise schedule",
        ),
    ],
)
def test_a_table_that_cannot_be_is_refused(num_steps: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_table(num_steps, 0.5, **settings)


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (0, 2), (2, 6), (3, 4)])
def test_a_part_is_those_steps_and_the_levels_at_their_ends(start: int, stop: int) -> None:
    table = make_table(6, 0.5)
    part = table.part(start, stop)
    assert part.num_steps == stop - start
    for name in ("timesteps_T", "a_T", "b_T", "s_T", "d_T", "e_T"):
        assert torch.equal(getattr(part, name), getattr(table, name)[start:stop])
    for name in ("signal_U", "noise_U"):
        assert len(getattr(table, name)) == 7
        assert torch.equal(getattr(part, name), getattr(table, name)[start : stop + 1])


def test_only_the_noise_decides_whether_a_chain_is_deterministic() -> None:
    assert make_table(4).is_deterministic
    assert not make_table(4, 0.1).is_deterministic
    table = make_table(4, 1.0, set_alpha_to_one=True)
    assert table.part(3, 4).is_deterministic  # the last step adds none
    assert not table.part(2, 4).is_deterministic


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("scored", [None, 0, 2, 4])
def test_path_weight_is_what_autograd_finds(scored: int | None, eta: float) -> None:
    """With the outputs of the network as free variables, of diffusers' own steps."""
    num_steps = 5
    scheduler, table = double_scheduler(num_steps), make_table(num_steps, eta)
    f_T = torch.linspace(-1, 1, num_steps, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.7], dtype=torch.float64)
    for k, t in enumerate(scheduler.timesteps):
        noise = {"variance_noise": torch.ones(1, dtype=torch.float64)} if eta > 0 else {}
        step = scheduler.step(f_T[k], t, x, eta=eta, **noise)
        x = step.prev_sample
        if k == scored:
            x = step.pred_original_sample
            break
    (expected_T,) = torch.autograd.grad(x, f_T)
    last = num_steps - 1 if scored is None else scored
    for k in range(last + 1):
        assert table.path_weight(k, scored) == pytest.approx(float(expected_T[k]), rel=1e-11)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_log_prob_is_the_normal_density_of_the_step(eta: float) -> None:
    num_steps, shape = 5, (3, 2, 4, 4)
    scheduler, table = double_scheduler(num_steps), make_table(num_steps, eta)
    generator = torch.Generator().manual_seed(0)
    x, f, n = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
    for k, t in enumerate(scheduler.timesteps):
        mean, after = (
            scheduler.step(f, t, x, eta=eta, variance_noise=noise).prev_sample for noise in (torch.zeros_like(n), n)
        )
        ends = int(t) - 200
        now = scheduler.alphas_cumprod[t]
        then = scheduler.alphas_cumprod[ends] if ends >= 0 else scheduler.final_alpha_cumprod
        std = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()  # DDIM (arXiv:2010.02502), Eq. 16
        expected = torch.distributions.Normal(mean, std).log_prob(after).mean((1, 2, 3))
        torch.testing.assert_close(table.log_prob(k, x, f, after), expected, rtol=1e-10, atol=1e-10)


def test_a_step_without_noise_has_no_density() -> None:
    x = torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match="step 1 is deterministic"):
        make_table(4).log_prob(1, x, x, x)


@pytest.mark.parametrize("is_one", [False, True])
def test_log_prob_back_is_that_of_the_forward_process(is_one: bool) -> None:
    """q(x_t | x_s) = N(sqrt(abar_t / abar_s) x_s, 1 - abar_t / abar_s), strides of the chain long."""
    num_steps, shape = 5, (3, 2, 4, 4)
    scheduler = double_scheduler(num_steps, set_alpha_to_one=is_one)
    table = make_table(num_steps, 1.0, set_alpha_to_one=is_one)
    generator = torch.Generator().manual_seed(0)
    x, after = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    levels = [*scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod]
    for k in range(num_steps):
        ratio = levels[k] / levels[k + 1]
        forward = torch.distributions.Normal(ratio.sqrt() * after, (1 - ratio).sqrt())
        expected = forward.log_prob(x).mean((1, 2, 3))
        # the variance is a difference of two numbers near 1, of 1e-3 at the last step
        torch.testing.assert_close(table.log_prob_back(k, x, after), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_one", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [4, 7])
def test_levels_are_those_that_the_steps_keep_to(num_steps: int, prediction_type: str, is_one: bool) -> None:
    """From the exact x_k of a known image and the exact output a DDIM step leads to the exact x_{k+1}."""
    table = make_table(num_steps, prediction_type=prediction_type, set_alpha_to_one=is_one)
    scheduler = double_scheduler(num_steps, prediction_type=prediction_type, set_alpha_to_one=is_one)
    generator = torch.Generator().manual_seed(0)
    x_0, n = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(table.signal_U**2 + table.noise_U**2, torch.ones(num_steps + 1).double())
    assert table.signal_U[:-1].tolist() == pytest.approx(
        scheduler.alphas_cumprod[scheduler.timesteps].sqrt().tolist(), rel=1e-14
    )
    assert (float(table.noise_U[-1]) == 0) == is_one
    for k, t in enumerate(scheduler.timesteps):
        x, after = (table.signal_U[i] * x_0 + table.noise_U[i] * n for i in (k, k + 1))
        f = n if prediction_type == "epsilon" else table.signal_U[k] * n - table.noise_U[k] * x_0
        torch.testing.assert_close(scheduler.step(f, t, x, eta=0.0).prev_sample, after, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(table.a_T[k] * x + table.b_T[k] * f, after, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(table.d_T[k] * x + table.e_T[k] * f, x_0, rtol=1e-9, atol=1e-10)
