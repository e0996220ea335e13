"""The one loop over the sampling chain, and how much of it carries gradient.

B: images. C, H, W: latent channels, rows, columns. T: sampling steps. K: steps that carry gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rltune.diffusion.table import ChainTable

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``(x_BCHW, timestep) -> f_BCHW`` float32: the network's output with prompts and guidance already bound."""
StepNoise = Callable[[int], Tensor]
"""Step index -> noise_BCHW, standard normal. Asked only for steps whose coefficient is not zero."""


@dataclass(frozen=True)
class GradientPlan:
    """Which steps of a trajectory carry gradient: all that tells one reward-gradient estimator from another."""

    active: frozenset[int]
    """Step indices, 0 the noisiest, whose network call is differentiated."""
    is_through_latent: bool = True
    """Whether gradient also passes through an active step's input latent to the steps before it."""

    @classmethod
    def last(cls, num_grad_steps: int, num_steps: int) -> "GradientPlan":
        """Return the plan of truncated backpropagation: the last K of T steps.

        Raises:
            ValueError: K is not in [0, T].
        """
        if not 0 <= num_grad_steps <= num_steps:
            raise ValueError(f"num_grad_steps must be in [0, {num_steps}], got {num_grad_steps}")
        return cls(frozenset(range(num_steps - num_grad_steps, num_steps)))


NO_GRADIENT = GradientPlan(frozenset())


def run_chain(
    denoise: Denoiser,
    x_BCHW: Tensor,
    table: ChainTable,
    *,
    plan: GradientPlan = NO_GRADIENT,
    noise: StepNoise | None = None,
    use_checkpoint: bool = True,
) -> Tensor:
    """Denoise x_T -> x_0 (B, C, H, W), in the dtype of ``x_BCHW``; differentiable as ``plan`` says.

    Inactive steps run under ``no_grad``, which gives bit for bit the gradient of running and detaching them, without
    storing anything. An active step stores its input latent and is computed again in the backward pass
    (``use_checkpoint``), so that memory grows with K by one latent a step.

    Args:
        denoise: The bound network.
        x_BCHW: Latents x_T at unit variance.
        table: Coefficients of the T steps.
        plan: Steps that carry gradient.
        noise: Fresh noise per step; needed where the table is stochastic.
        use_checkpoint: Recompute active steps in the backward pass instead of storing their activations.

    Raises:
        ValueError: The table is stochastic and ``noise`` is missing.
    """
    if noise is None and not table.is_deterministic:
        raise ValueError("a chain with eta > 0 needs step noise")
    for k in range(table.num_steps):
        t = table.timesteps_T[k].to(x_BCHW.device)
        is_active = k in plan.active
        # the method itself truncates here: DRTune-like plans cut the path through the input latent
        input_BCHW = x_BCHW if plan.is_through_latent else x_BCHW.detach()
        if is_active and use_checkpoint:
            # no dropout anywhere in the frozen networks, so there is no random state to keep
            f_BCHW = checkpoint(denoise, input_BCHW, t, use_reentrant=False, preserve_rng_state=False)
        else:
            with torch.set_grad_enabled(is_active and torch.is_grad_enabled()):
                f_BCHW = denoise(input_BCHW, t)
        x_BCHW = float(table.a_T[k]) * x_BCHW + float(table.b_T[k]) * f_BCHW
        if noise is not None and table.s_T[k] != 0:
            x_BCHW = x_BCHW + float(table.s_T[k]) * noise(k)
    return x_BCHW
