"""The sampling chain as a table of numbers, read from the pipeline's own diffusers scheduler.

Every sampler supported here is affine in the latent x_k, the network's output f and fresh noise n:

    x_{k+1} = a_k x_k + b_k f(x_k, t_k) + s_k n_k          x0_hat_k = d_k x_k + e_k f(x_k, t_k)

Step 0 is the noisiest, step T-1 the last. T: sampling steps.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DDIMScheduler
from torch import Tensor


@dataclass(frozen=True)
class ChainTable:
    """Coefficients of T sampling steps, float64 on the CPU; ``timesteps_T`` is what the network is conditioned on."""

    timesteps_T: Tensor
    a_T: Tensor
    b_T: Tensor
    s_T: Tensor
    d_T: Tensor
    e_T: Tensor

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.timesteps_T)

    @property
    def is_deterministic(self) -> bool:
        """Whether no step adds noise (DDIM with eta = 0)."""
        return not bool(self.s_T.any())


def read_ddim_table(scheduler: Any, *, num_steps: int, eta: float) -> ChainTable:
    """Return the table of DDIM (arXiv:2010.02502, section 4.1) on a pipeline's own noise schedule.

    A step of diffusers' scheduler is probed with unit vectors instead of writing its formula a second time, so that
    epsilon-, v- and sample-prediction, timestep spacing and the last step's convention are the pipeline's own.
    Pipelines that ship another solver (SD 1.5 ships PNDM) are sampled with DDIM on the same schedule.

    Args:
        scheduler: Any diffusers scheduler whose config DDIM can be made from.
        num_steps: Sampling steps T.
        eta: Share of the posterior noise that is added back; 0 is deterministic, 1 is ancestral sampling.

    Raises:
        ValueError: The step is not affine (``clip_sample`` or ``thresholding`` is on).
    """
    # a solver that never clips says nothing of it, and DDIM's own default would be to clip
    clip_sample = scheduler.config.get("clip_sample", False)
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=clip_sample)
    if ddim.config.clip_sample or ddim.config.thresholding:
        raise ValueError("clip_sample/thresholding make a step non-affine; switch them off in the scheduler's config")
    # float64 betas, so that the table is exact to double rounding rather than to float32's
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()
    ddim.final_alpha_cumprod = ddim.final_alpha_cumprod.double()
    ddim.set_timesteps(num_steps)

    x_3, f_3, n_3 = torch.eye(3, dtype=torch.float64)
    rows = []
    for t in ddim.timesteps:
        noise = {"variance_noise": n_3} if eta > 0 else {}
        step = ddim.step(f_3, t, x_3, eta=eta, **noise)
        rows.append(torch.cat([step.prev_sample, step.pred_original_sample[:2]]))
    a_T, b_T, s_T, d_T, e_T = torch.stack(rows).unbind(1)
    return ChainTable(cast(Tensor, ddim.timesteps), a_T, b_T, s_T, d_T, e_T)
