"""The sampling chain as a table of numbers, read from the pipeline's own diffusers scheduler.

Every sampler supported here is affine in the latent x_k, the network's output f and fresh noise n:

    x_{k+1} = a_k x_k + b_k f(x_k, t_k) + s_k n_k          x0_hat_k = d_k x_k + e_k f(x_k, t_k)

Step 0 is the noisiest, step T-1 the last. The forward process has x_k = signal_k x_0 + noise_k n, k = T the image that
the last step leaves. T: sampling steps.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from diffusers import DDIMScheduler
from torch import Tensor


@dataclass(frozen=True)
class ChainTable:
    """Coefficients of T sampling steps, float64 on the CPU; ``timesteps_T`` is what the network is conditioned on.

    ``_U`` stands for the T + 1 states: row k is the level of x_k, the last row that of what the last step leaves.
    """

    timesteps_T: Tensor
    a_T: Tensor
    b_T: Tensor
    s_T: Tensor
    d_T: Tensor
    e_T: Tensor
    signal_U: Tensor
    noise_U: Tensor
    init_scale: float = 1.0
    """What standard normal noise is multiplied by to be x_T: some samplers begin at a level below pure noise."""

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.timesteps_T)

    @property
    def is_deterministic(self) -> bool:
        """Whether no step adds noise (DDIM with eta = 0)."""
        return not bool(self.s_T.any())

    def part(self, start: int, stop: int) -> "ChainTable":
        """Return the table of steps ``start .. stop - 1``."""
        columns = {column.name: getattr(self, column.name) for column in fields(self) if column.name != "init_scale"}
        parts = {name: c[start : stop + 1 if name.endswith("_U") else stop] for name, c in columns.items()}
        return ChainTable(**parts)  # it starts from a latent that is scaled already

    def path_weight(self, step: int, scored: int | None) -> float:
        """Return d(result) / d f_step through the linear part of the chain alone, inputs of later steps held fixed.

        The result is x_T, or the clean prediction at step ``scored``. This is the whole derivative where the inputs of
        the network are detached.
        """
        if step == scored:
            return float(self.e_T[step])
        last = self.num_steps if scored is None else scored
        weight = float(self.b_T[step] * self.a_T[step + 1 : last].prod())
        return weight if scored is None else weight * float(self.d_T[scored])

    def log_prob(
        self, step: int, x_BCHW: Tensor, f_BCHW: Tensor, next_BCHW: Tensor, drawn_B1HW: Tensor | None = None
    ) -> Tensor:
        """Return log N(x_{k+1}; a_k x_k + b_k f_k, s_k^2 I), the mean over latent elements, ``(B,)``.

        The mean and not the sum, as in the code of DDPO, DPOK and DAG: their published clip ranges are meant for it.
        Where a part is given, over those elements that are drawn: the others are no choice of the policy.

        Raises:
            ValueError: The step adds no noise.
        """
        s = float(self.s_T[step])
        if s == 0:
            raise ValueError(f"step {step} is deterministic and has no density; sample with eta > 0")
        mean_BCHW = float(self.a_T[step]) * x_BCHW + float(self.b_T[step]) * f_BCHW
        return _normal_log_density((next_BCHW - mean_BCHW) / s, s, drawn_B1HW)

    def log_prob_back(self, step: int, x_BCHW: Tensor, next_BCHW: Tensor, drawn_B1HW: Tensor | None = None) -> Tensor:
        """Return log q(x_k | x_{k+1}) of the forward process, the mean over the elements drawn, ``(B,)``."""
        ratio = float(self.signal_U[step] / self.signal_U[step + 1])
        std = math.sqrt(float(self.noise_U[step]) ** 2 - (ratio * float(self.noise_U[step + 1])) ** 2)
        return _normal_log_density((x_BCHW - ratio * next_BCHW) / std, std, drawn_B1HW)


def _normal_log_density(standard_BCHW: Tensor, std: float, drawn_B1HW: Tensor | None) -> Tensor:
    square_BCHW = standard_BCHW.square()
    if drawn_B1HW is None:
        mean_B = square_BCHW.flatten(1).mean(1)
    else:
        mean_B = (square_BCHW * drawn_B1HW).flatten(1).sum(1) / drawn_B1HW.expand_as(square_BCHW).flatten(1).sum(1)
    return -0.5 * mean_B - math.log(std) - 0.5 * math.log(2 * math.pi)


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
        ValueError: The step is not affine (``clip_sample`` or ``thresholding`` is on), the schedule has no such steps,
            or one of them divides by zero.
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
    num_levels = len(ddim.alphas_cumprod)
    if int(ddim.timesteps.max()) >= num_levels:
        raise ValueError(
            f"{num_steps} steps begin at timestep {int(ddim.timesteps.max())} of a schedule that ends at "
            f"{num_levels - 1} (steps_offset {ddim.config.steps_offset}); take fewer"
        )

    x_3, f_3, n_3 = torch.eye(3, dtype=torch.float64)
    rows = []
    for t in ddim.timesteps:
        noise = {"variance_noise": n_3} if eta > 0 else {}
        step = ddim.step(f_3, t, x_3, eta=eta, **noise)
        rows.append(torch.cat([step.prev_sample, step.pred_original_sample[:2]]))
    a_T, b_T, s_T, d_T, e_T = torch.stack(rows).unbind(1)
    # where a step leaves off, as diffusers' step has it: one stride earlier, below 0 the scheduler's final level
    stride = ddim.config.num_train_timesteps // num_steps
    ends = [int(t) - stride for t in ddim.timesteps]
    after_T = torch.stack([ddim.alphas_cumprod[t] if t >= 0 else ddim.final_alpha_cumprod for t in ends])
    alpha_bar_U = torch.cat([ddim.alphas_cumprod[ddim.timesteps], after_T[-1:]])
    # From a level without signal all noise is fresh (zero terminal SNR and eta 1): what is left of the old is the root
    # of 1 - alpha_bar - s^2, which rounds to less than 0 at one number of steps in three, and is 0.
    is_fresh_T = a_T.isnan() & d_T.isfinite() & (eta == 1) & (alpha_bar_U[:-1] == 0)
    a_T = torch.where(is_fresh_T, after_T.sqrt() * d_T, a_T)
    b_T = torch.where(is_fresh_T, after_T.sqrt() * e_T, b_T)
    s_T = torch.where(is_fresh_T, (1 - after_T).sqrt(), s_T)
    signal_U, noise_U = alpha_bar_U.sqrt(), (1 - alpha_bar_U).sqrt()
    table = ChainTable(cast(Tensor, ddim.timesteps), a_T, b_T, s_T, d_T, e_T, signal_U, noise_U)
    _check_finite(table, prediction_type=ddim.config.prediction_type, eta=eta)
    return table


def _check_finite(table: ChainTable, *, prediction_type: str, eta: float) -> None:
    columns = torch.stack([table.a_T, table.b_T, table.s_T, table.d_T, table.e_T])
    wrong = (~columns.isfinite().all(dim=0)).nonzero().flatten().tolist()
    if not wrong:
        return
    t, signal = int(table.timesteps_T[wrong[0]]), float(table.signal_U[wrong[0]])
    why = (
        f"no signal is left there, where prediction_type {prediction_type!r} says nothing of the image; set "
        "rescale_betas_zero_snr: false in the model's scheduler_config.json, or its true prediction_type"
        if signal == 0
        else "the model's scheduler_config.json describes no noise schedule"
    )
    where = f"step {wrong[0] + 1} of {table.num_steps} (timestep {t}, eta {eta:g})"
    raise ValueError(f"{where} has coefficients that are not finite: {why}")
