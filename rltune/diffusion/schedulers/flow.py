"""Flow matching: x = (1 - sigma) x_0 + sigma n, the network's output f the velocity n - x_0. ``T``: steps."""

from typing import Any

import numpy as np

from rltune.diffusion.schedulers.base import READERS, Rule, make_table
from rltune.diffusion.schedulers.consistency import read_flow_lcm
from rltune.diffusion.table import ChainTable


@READERS.register("FlowMatchEulerDiscreteScheduler")
def read_flow(scheduler: Any, *, eta: float, rule: Rule) -> ChainTable:
    """Return the table of Euler's method on the flow, or of a stochastic form of it with the same marginals.

    ``posterior``: eta as in DDIM (arXiv:2010.02502), for this forward process: eta 1 draws from q(x' | x, x0_hat).
    ``flow_grpo``: Euler-Maruyama of the stochastic equation of Flow-GRPO (arXiv:2505.05470, section 4.2), eta its noise
    level. The last step adds no noise here and ends at the clean prediction: the published code adds some, and leaves
    that step out of training.

    Raises:
        ValueError: ``invert_sigmas`` is on; ``stochastic_sampling`` is, and eta is not 1.
    """
    if scheduler.config.get("stochastic_sampling"):
        return read_flow_lcm(scheduler, eta=eta, rule=rule)
    if scheduler.config.get("invert_sigmas"):
        raise ValueError("invert_sigmas runs the flow the other way; switch it off in the scheduler's config")
    sigma_U = scheduler.sigmas.double().numpy()
    now_T, after_T = sigma_U[:-1], sigma_U[1:]
    ones_T = np.ones_like(now_T)
    if rule == "flow_grpo" and eta > 0:
        # sigma = 1 would divide by 0; the published code takes the next level there
        safe_T = np.where(now_T == 1.0, sigma_U[1], now_T)
        std_T = eta * np.sqrt(now_T / (1 - safe_T))
        dt_T = after_T - now_T
        a_T = 1 + std_T**2 / (2 * now_T) * dt_T
        b_T = (1 + std_T**2 * (1 - now_T) / (2 * now_T)) * dt_T
        s_T = std_T * np.sqrt(-dt_T)
        a_T[-1], b_T[-1], s_T[-1] = 1.0, dt_T[-1], 0.0
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            kept_T = np.where(after_T < 1, (1 - now_T) / (1 - after_T) * after_T, 0.0)
        s_T = eta * after_T / now_T * np.sqrt(np.maximum(now_T**2 - kept_T**2, 0.0))
        rest_T = np.sqrt(np.maximum(after_T**2 - s_T**2, 0.0))
        a_T = (1 - after_T) + rest_T
        b_T = -(1 - after_T) * now_T + rest_T * (1 - now_T)
    return make_table(scheduler.timesteps, (a_T, b_T, s_T, ones_T, -now_T, 1 - sigma_U, sigma_U))
