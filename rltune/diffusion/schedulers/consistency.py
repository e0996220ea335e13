"""LCM, TCD, SCM, LCM of a flow: a clean prediction is noised again to the next level. ``T``: steps."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rltune.diffusion.schedulers.base import READERS, Rule, make_table, only_posterior
from rltune.diffusion.table import ChainTable


@READERS.register("LCMScheduler")
def read_lcm(scheduler: Any, *, eta: float, rule: Rule) -> ChainTable:
    """Return LCM's table (arXiv:2310.04378): every step but the last is drawn anew, which is eta 1.

    Raises:
        ValueError: eta is another.
    """
    only_posterior(rule, "LCM")
    _only_anew(eta, "LCM")
    return _probed(scheduler, {})


@READERS.register("TCDScheduler")
def read_tcd(scheduler: Any, *, eta: float, rule: Rule) -> ChainTable:
    """Return TCD's table (arXiv:2402.19159); eta is its gamma, the share of the way back that is drawn anew."""
    only_posterior(rule, "TCD")
    return _probed(scheduler, {"eta": eta})


@READERS.register("SCMScheduler")
def read_scm(scheduler: Any, *, eta: float, rule: Rule) -> ChainTable:
    """Return SANA-Sprint's table (arXiv:2503.09641): y = cos t x_0 + sin t n, f = cos t n - sin t x_0 (TrigFlow).

    y is what the scheduler has divided by ``sigma_data``, as the network is given it. Timesteps are angles.

    Raises:
        ValueError: eta is not 1.
    """
    only_posterior(rule, "SCM")
    _only_anew(eta, "SCM")
    cos_U, sin_U = scheduler.timesteps.double().cos(), scheduler.timesteps.double().sin()
    return _anew(scheduler.timesteps[:-1], cos_U[:-1], -sin_U[:-1], cos_U, sin_U)


@READERS.register("FlowMatchLCMScheduler")
def read_flow_lcm(scheduler: Any, *, eta: float, rule: Rule) -> ChainTable:
    """Return the table of a flow whose every step but the last is drawn anew.

    Raises:
        ValueError: eta is not 1, the flow runs the other way, or the size of latents changes on the way.
    """
    only_posterior(rule, "LCM")
    _only_anew(eta, "LCM")
    if scheduler.config.get("invert_sigmas") or scheduler.config.get("scale_factors"):
        raise ValueError(
            "invert_sigmas and scale_factors are for other models; switch them off in the scheduler's config"
        )
    sigma_U = scheduler.sigmas.double()
    return _anew(scheduler.timesteps, torch.ones_like(sigma_U[:-1]), -sigma_U[:-1], 1 - sigma_U, sigma_U)


def _only_anew(eta: float, name: str) -> None:
    if eta != 1:
        raise ValueError(f"{name} draws every step anew, which is eta 1, got {eta:g}; write sampler.eta: 1")


def _anew(timesteps_T: Tensor, d_T: Tensor, e_T: Tensor, signal_U: Tensor, noise_U: Tensor) -> ChainTable:
    """Return the table of a clean prediction d x + e f that is noised to the next level."""
    columns = (signal_U[1:] * d_T, signal_U[1:] * e_T, noise_U[1:], d_T, e_T, signal_U, noise_U)
    return make_table(timesteps_T, columns)


def _probed(scheduler: Any, options: dict[str, Any]) -> ChainTable:
    """Return the table of a scheduler that steps x, f and a noise of its own: the three axes go through it."""
    if scheduler.config.get("clip_sample") or scheduler.config.get("thresholding"):
        raise ValueError("clip_sample/thresholding make a step non-affine; switch them off in the scheduler's config")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.as_tensor(scheduler.final_alpha_cumprod).double()
    x_3, f_3, n_3 = torch.eye(3, dtype=torch.float64)
    rows, cleans = [], []
    with _drawing(scheduler, n_3):
        for t in scheduler.timesteps:
            step = scheduler.step(f_3, t, x_3, return_dict=True, **options)
            rows.append(step.prev_sample)
            cleans.append(step.denoised if hasattr(step, "denoised") else _clean(scheduler, t, x_3, f_3))
    a_T, b_T, s_T = torch.stack(rows).unbind(1)
    d_T, e_T, _ = torch.stack(cleans).unbind(1)
    alpha_bar_U = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1, dtype=torch.float64)])
    columns = (a_T, b_T, s_T, d_T, e_T, alpha_bar_U.sqrt(), (1 - alpha_bar_U).sqrt())
    return make_table(scheduler.timesteps, columns)


@contextmanager
def _drawing(scheduler: Any, noise_3: Tensor) -> Iterator[None]:
    """Have a scheduler's step draw this noise: it takes none as an argument."""
    module: Any = sys.modules[type(scheduler).__module__]
    draw = module.randn_tensor
    module.randn_tensor = lambda *_, **__: noise_3
    try:
        yield
    finally:
        module.randn_tensor = draw


def _clean(scheduler: Any, t: Tensor, x_3: Tensor, f_3: Tensor) -> Tensor:
    """Return the clean prediction of a network that predicts noise; TCD's step does not."""
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(f"prediction_type must be epsilon, got {scheduler.config.prediction_type!r}")
    alpha_bar = scheduler.alphas_cumprod[t]
    clean: Tensor = (x_3 - (1 - alpha_bar).sqrt() * f_3) / alpha_bar.sqrt()
    return clean
