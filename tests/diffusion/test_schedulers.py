"""Tables against the schedulers of diffusers themselves: a whole chain of a known network, step by step.

T: steps.
"""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from rltune.diffusion.chain import run_chain
from rltune.diffusion.schedulers.base import has_reader, read_scheduler
from rltune.diffusion.table import ChainTable
from tests.tiny import SD15_SCHEDULE

SHAPE = (2, 4, 3, 3)
BETAS = {name: value for name, value in SD15_SCHEDULE.items() if name not in ("steps_offset", "set_alpha_to_one")}
SDXL = {**BETAS, "prediction_type": "epsilon"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

FIRST = {"solver_order": 1, "disable_corrector": list(range(9)), "final_sigmas_type": "zero"}


def network(x: Tensor, t: Tensor) -> Tensor:
    """Not linear, and another at every timestep."""
    return torch.sin(3 * x + 0.01 * float(t)) + 0.5 * x.roll(1, dims=1)


def noises(num_steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(num_steps + 1)]


def theirs(scheduler: Any, num_steps: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    """The chain as a pipeline of diffusers runs it, in float64, noise handed in."""
    *fresh, start = noises(num_steps)
    own = type(scheduler).from_config(scheduler.config)
    own.set_timesteps(num_steps)
    queue = list(fresh)
    module = __import__(type(own).__module__, fromlist=["x"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: queue.pop(0))
    x = start * getattr(own, "init_noise_sigma", 1.0)
    for t in own.timesteps:
        scale = getattr(own, "scale_model_input", lambda x, t: x)
        f = network(scale(x, t), t)
        x = own.step(f, t, x, return_dict=False, **options)[0]
    return x


def ours(table: ChainTable, num_steps: int) -> Tensor:
    *fresh, start = noises(num_steps)
    queue = list(fresh)
    return run_chain(network, table.init_scale * start, table, noise=lambda k: queue.pop(0))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 9])
@pytest.mark.parametrize(
    ("scheduler", "eta", "options"),
    [
        (EulerDiscreteScheduler(**SDXL, timestep_spacing="leading"), 0.0, {}),
        (EulerDiscreteScheduler(**SDXL, timestep_spacing="trailing"), 0.0, {}),
        (EulerDiscreteScheduler(**SDXL, use_karras_sigmas=True), 0.0, {}),
        (EulerDiscreteScheduler(**{**SDXL, "prediction_type": "v_prediction"}), 0.0, {}),
        (EulerAncestralDiscreteScheduler(**SDXL, timestep_spacing="trailing"), 1.0, {}),
        (EulerAncestralDiscreteScheduler(**{**SDXL, "prediction_type": "v_prediction"}), 1.0, {}),
        (DPMSolverMultistepScheduler(**BETAS, solver_order=1, final_sigmas_type="zero"), 0.0, {}),
        (DPMSolverMultistepScheduler(**BETAS, solver_order=1, algorithm_type="sde-dpmsolver++"), 1.0, {}),
        (DPMSolverMultistepScheduler(**FLOW, solver_order=1), 0.0, {}),
        (UniPCMultistepScheduler(**BETAS, **FIRST), 0.0, {}),
        (UniPCMultistepScheduler(**FLOW, **FIRST), 0.0, {}),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 0.0, {}),
        (FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True), 1.0, {}),
        (FlowMatchLCMScheduler(shift=3.0), 1.0, {}),
        (LCMScheduler(**SD15_SCHEDULE), 1.0, {}),
        (TCDScheduler(**SD15_SCHEDULE), 0.3, {"eta": 0.3}),
        (TCDScheduler(**SD15_SCHEDULE), 0.0, {"eta": 0.0}),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else "",
)
def test_a_chain_is_the_schedulers_own(
    scheduler: Any, eta: float, options: dict[str, Any], num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = read_scheduler(scheduler, num_steps=num_steps, eta=eta)
    assert table.is_deterministic == (eta == 0 or num_steps == 1)
    expected = theirs(scheduler, num_steps, monkeypatch, **options)
    # some of them compute sigmas in float32, or cast the sample to it
    torch.testing.assert_close(ours(table, num_steps), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_flow_sigmas_of_a_solver_are_a_flow_s(kind: Any) -> None:
    solver = read_scheduler(kind(**FLOW), num_steps=6, eta=0.0)
    own = kind(**FLOW)
    own.set_timesteps(6)
    torch.testing.assert_close(solver.noise_U, own.sigmas.double(), rtol=0, atol=0)
    torch.testing.assert_close(solver.b_T, solver.noise_U.diff(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_chain_of_angles_is_the_schedulers_own(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCM's state is ours times sigma_data, and what it leaves is the last clean prediction."""
    own = SCMScheduler(sigma_data=0.5)
    grid = {"num_inference_steps": num_steps, **({} if num_steps == 2 else {"intermediate_timesteps": None})}
    table = read_scheduler(own, num_steps=num_steps, eta=1.0, grid=grid)
    *fresh, start = noises(num_steps)
    queue = list(fresh)
    monkeypatch.setattr("diffusers.schedulers.scheduling_scm.randn_tensor", lambda *_, **__: queue.pop(0))
    own.set_timesteps(**grid)
    x = 0.5 * start
    for t in own.timesteps[:-1]:
        x, clean = own.step(0.5 * network(x / 0.5, t), t, x, return_dict=False)
    torch.testing.assert_close(ours(table, num_steps), clean / 0.5, rtol=1e-6, atol=1e-6)
    assert table.path_weight(num_steps - 1, None) == pytest.approx(-float(table.timesteps_T[-1].sin()))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_euler_is_ddim_on_other_levels(eta: float) -> None:
    """One step between the same two levels: alpha-bar of each from sigma."""
    table = read_scheduler(EulerDiscreteScheduler(**SDXL), num_steps=5, eta=eta)
    for k in range(4):
        bar, after = float(table.signal_U[k]) ** 2, float(table.signal_U[k + 1]) ** 2
        sigma = eta * ((1 - after) / (1 - bar) * (1 - bar / after)) ** 0.5  # DDIM, Eq. 16
        a = (after / bar) ** 0.5
        b = (1 - after - sigma**2) ** 0.5 - a * (1 - bar) ** 0.5
        assert [float(c[k]) for c in (table.a_T, table.b_T, table.s_T)] == pytest.approx([a, b, sigma], rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rule", ["posterior", "flow_grpo"])
def test_a_flow_keeps_its_levels(eta: float, rule: Any) -> None:
    """A network that knows the noise, f = n - x_0, is brought from level to level; the spread of Euler-Maruyama follows
    as steps become many."""
    grid = {"sigmas": np.linspace(1.0, 1 / 400, 400)}
    table = read_scheduler(FlowMatchEulerDiscreteScheduler(shift=1.0), num_steps=400, eta=eta, rule=rule, grid=grid)
    generator = torch.Generator().manual_seed(0)
    clean, x = (torch.randn(20_000, generator=generator, dtype=torch.float64) for _ in range(2))
    clean = 0.3 * clean + 1.0  # x_0 of mean 1 and deviation 0.3: then f is known, by regression on x
    stop = 300
    for k in range(stop):
        sigma = float(table.noise_U[k])
        variance = (1 - sigma) ** 2 * 0.09 + sigma**2
        cov = (1 - sigma) * 0.09
        x0 = 1.0 + cov / variance * (x - (1 - sigma))
        f = (x - x0) / sigma
        n = torch.randn(len(x), generator=generator, dtype=torch.float64)
        x = float(table.a_T[k]) * x + float(table.b_T[k]) * f + float(table.s_T[k]) * n
    sigma = float(table.noise_U[stop])
    assert float(x.mean()) == pytest.approx(1 - sigma, abs=0.02)
    assert float(x.std()) == pytest.approx(((1 - sigma) ** 2 * 0.09 + sigma**2) ** 0.5, rel=0.05)


def test_flow_grpo_has_the_published_coefficients() -> None:
    """x + dt (v + s^2 / (2 sigma) (x + (1 - sigma) v)) + s sqrt(-dt) n, s = eta sqrt(sigma / (1 - sigma))."""
    table = read_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), num_steps=5, eta=0.7, rule="flow_grpo")
    sigma, after = float(table.noise_U[2]), float(table.noise_U[3])
    s, dt = 0.7 * (sigma / (1 - sigma)) ** 0.5, after - sigma
    x, v, n = 0.3, -1.2, 0.8
    expected = x + dt * (v + s**2 / (2 * sigma) * (x + (1 - sigma) * v)) + s * (-dt) ** 0.5 * n
    got = float(table.a_T[2]) * x + float(table.b_T[2]) * v + float(table.s_T[2]) * n
    assert got == pytest.approx(expected, rel=1e-12)


def test_log_probabilities_back_and_forth_are_those_of_the_posterior_at_eta_1() -> None:
    """p(x' | x, x0_hat) of eta 1 is q(x' | x, x0), so that p / q of the two directions is q(x') / q(x) given x0."""
    table = read_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), num_steps=6, eta=1.0)
    generator = torch.Generator().manual_seed(0)
    clean, x, after = (torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    k = 2
    f = (x - clean) / float(table.noise_U[k])

    def level(k: int, x: Tensor) -> Tensor:
        mean, std = float(table.signal_U[k]) * clean, float(table.noise_U[k])
        return torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)

    forward = table.log_prob(k, x, f, after) + level(k, x)
    backward = table.log_prob_back(k, x, after) + level(k + 1, after)
    torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-9)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (HeunDiscreteScheduler(), {}, "HeunDiscreteScheduler is not affine in one state; write EulerDiscreteScheduler as"),
    (FlowMatchHeunDiscreteScheduler(), {}, "FlowMatchHeun.* write FlowMatchEulerDiscreteScheduler as _class_name in"),
    (DEISMultistepScheduler(**FLOW), {}, "DEIS.* write DPMSolverMultistepScheduler as _class_name in the model's"),
    (DPMSolverMultistepScheduler(thresholding=True), {}, "thresholding makes a step non-affine"),
    (UniPCMultistepScheduler(use_flow_sigmas=True), {}, "must be flow_prediction with use_flow_sigmas, got 'epsilon'"),
    (SCMScheduler(), {"eta": 0.0}, "SCM draws every step anew, which is eta 1, got 0; write sampler.eta: 1"),
    (FlowMatchLCMScheduler(), {"eta": 0.0}, "LCM draws every step anew, which is eta 1"),
    (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}, "draws every step anew, which is eta 1"),
    (FlowMatchLCMScheduler(scale_factors=[0.5], upscale_mode="bicubic"), {"eta": 1.0}, "scale_factors"),
    (EulerDiscreteScheduler(timestep_type="continuous"), {}, "continuous timesteps"),
    (EulerDiscreteScheduler(prediction_type="sample"), {}, "prediction_type must be epsilon or v_prediction"),
    (EulerDiscreteScheduler(), {"rule": "flow_grpo"}, "rule 'flow_grpo' is that of a flow model"),
    (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {}, "invert_sigmas runs the flow the other way"),
    (LCMScheduler(), {"eta": 0.5}, r"LCM draws every step anew, which is eta 1, got 0\.5; write sampler\.eta: 1"),
    (TCDScheduler(clip_sample=True), {}, "clip_sample/thresholding make a step non-affine"),
]


@pytest.mark.parametrize(("scheduler", "options", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_no_such_table_is_refused(scheduler: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_scheduler(scheduler, num_steps=2, **{"eta": 0.0, **options})


def test_a_pipeline_s_scheduler_is_left_as_it_is() -> None:
    scheduler = EulerDiscreteScheduler(**SDXL)
    scheduler.set_timesteps(7)
    before = scheduler.timesteps.clone()
    read_scheduler(scheduler, num_steps=3, eta=0.0)
    assert torch.equal(scheduler.timesteps, before)
    assert has_reader(scheduler)
    assert not has_reader(HeunDiscreteScheduler())


def test_the_rest_of_a_table_does_not_scale_again() -> None:
    table = read_scheduler(EulerDiscreteScheduler(**SDXL, timestep_spacing="trailing"), num_steps=4, eta=0.0)
    assert table.init_scale == pytest.approx(0.99767, abs=1e-5)  # families.md: SD-Turbo
    assert table.part(1, 4).init_scale == 1.0
