"""Euler, Euler-ancestral, and DPM-Solver++ and UniPC at first order, of models with a variance-preserving process.

The samplers work in x = x_0 + sigma n; the table works in y = x / sqrt(1 + sigma^2), whose forward process has
signal 1 / sqrt(1 + sigma^2) and noise sigma times that. What diffusers calls ``scale_model_input`` is this very change
of variables, so that the network's input is y. ``T``: steps.
"""

from typing import Any

import numpy as np

from rltune.diffusion.schedulers.base import READERS, Rule, make_table, only_posterior
from rltune.diffusion.schedulers.flow import read_flow
from rltune.diffusion.table import ChainTable


@READERS.register("EulerDiscreteScheduler")
@READERS.register("EulerAncestralDiscreteScheduler")
def read_euler(scheduler: Any, *, eta: float, rule: Rule) -> ChainTable:
    """Return Euler's table at eta 0, that of Euler-ancestral at eta 1 (k-diffusion's ``sample_euler_ancestral``).

    On the same levels they are DDIM with the same eta; they differ from it in the grid and in the last level, which is
    free of noise here. With ``timestep_spacing`` linspace or trailing the pipeline begins at sigma_max n and not at
    sqrt(1 + sigma_max^2) n: ``init_scale``.

    Raises:
        ValueError: Its timesteps are continuous, or the network predicts neither noise nor v.
    """
    only_posterior(rule, "Euler")
    config = scheduler.config
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError("continuous timesteps (EDM, CosXL) are another kind of model; take a discrete one")
    sigma_U = scheduler.sigmas.double().numpy()
    start = float(sigma_U[0])
    scale = float(scheduler.init_noise_sigma) / (1 + start**2) ** 0.5
    return _variance_preserving(scheduler, sigma_U, eta=eta, init_scale=scale)


@READERS.register("DPMSolverMultistepScheduler")
@READERS.register("UniPCMultistepScheduler")
def read_first_order(scheduler: Any, *, eta: float, rule: Rule) -> ChainTable:
    """Return the table of the solver's first order on its own levels: a later order looks at the step before too.

    UniPC's corrector does so as well, and is left out. The first order of SDE-DPM-Solver++ is that of DPM-Solver++ at
    eta 1.

    Raises:
        ValueError: It clips clean predictions, or the network predicts something that it does not know.
    """
    if scheduler.config.get("thresholding"):
        raise ValueError("thresholding makes a step non-affine; switch it off in the scheduler's config")
    if scheduler.config.get("use_flow_sigmas"):
        if scheduler.config.prediction_type != "flow_prediction":
            kind = scheduler.config.prediction_type
            raise ValueError(f"prediction_type must be flow_prediction with use_flow_sigmas, got {kind!r}")
        return read_flow(scheduler, eta=eta, rule=rule)
    only_posterior(rule, type(scheduler).__name__)
    return _variance_preserving(scheduler, scheduler.sigmas.double().numpy(), eta=eta, init_scale=1.0)


def _variance_preserving(scheduler: Any, sigma_U: Any, *, eta: float, init_scale: float) -> ChainTable:
    now_T, after_T = sigma_U[:-1], sigma_U[1:]
    c_T, c_after_T = 1 / np.sqrt(1 + now_T**2), 1 / np.sqrt(1 + after_T**2)
    up_T = eta * np.sqrt(np.maximum(after_T**2 * (now_T**2 - after_T**2) / now_T**2, 0.0))
    down_T = np.sqrt(np.maximum(after_T**2 - up_T**2, 0.0))
    # in x: x0_hat = own x + out f, x' = x0_hat + (x - x0_hat) down / sigma + up n
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        own_T, out_T = np.ones_like(now_T), -now_T
    elif kind == "v_prediction":
        own_T, out_T = c_T**2, -now_T * c_T
    else:
        raise ValueError(f"prediction_type must be epsilon or v_prediction, got {kind!r}")
    kept_T = down_T / now_T
    signal_U = 1 / np.sqrt(1 + sigma_U**2)
    columns = (
        (own_T + (1 - own_T) * kept_T) * c_after_T / c_T,
        out_T * (1 - kept_T) * c_after_T,
        up_T * c_after_T,
        own_T / c_T,
        out_T,
        signal_U,
        sigma_U * signal_U,
    )
    return make_table(scheduler.timesteps, columns, init_scale=init_scale)
