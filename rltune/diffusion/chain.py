"""The one loop over the sampling chain, and how much of it carries gradient.

B: images. C, H, W: latent channels, rows, columns. T: sampling steps. K: steps that carry gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rltune.diffusion.inpaint import Blend
from rltune.diffusion.table import ChainTable

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``(x_BCHW, timestep) -> f_BCHW`` float32: the network's output with prompts and guidance already bound."""
StepNoise = Callable[[int], Tensor]
"""Step index -> noise_BCHW, standard normal. Asked only for steps whose coefficient is not zero."""
Observer = Callable[[int, Tensor, Tensor], None]
"""``(step, x_BCHW, f_BCHW)``: a step's input, and the network's output as it is in the graph."""


@dataclass(frozen=True)
class GradientPlan:
    """Which steps of a trajectory carry gradient, and which image is scored: all that tells estimators apart."""

    active: frozenset[int]
    """Step indices, 0 the noisiest, whose network call is differentiated."""
    is_through_latent: bool = True
    """Whether gradient also passes through an active step's input latent to the steps before it."""
    scored: int | None = None
    """Step whose clean prediction x0_hat is the result; the chain ends there. None: x_0, after all steps."""

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
    num_kept: int = 0,
    denoise_frozen: Denoiser | None = None,
    observe: Observer | None = None,
    blend: Blend | None = None,
) -> Tensor:
    """Denoise x_T -> x_0, or the clean prediction that ``plan`` names, (B, C, H, W), in the dtype of ``x_BCHW``.

    Differentiable as ``plan`` says. Inactive steps run under ``no_grad``, which gives bit for bit the gradient of
    running and detaching them, without storing anything. An active step stores its input latent and is computed again
    in the backward pass, so that memory grows with K by one latent a step; the last ``num_kept`` of them store their
    activations instead. Backward frees those first, before it computes anything again.

    Args:
        denoise: The bound network.
        x_BCHW: Latents x_T at unit variance.
        table: Coefficients of the T steps.
        plan: Steps that carry gradient.
        noise: Fresh noise per step; needed where the table is stochastic.
        num_kept: Active steps whose activations are kept instead of computed again.
        denoise_frozen: The same network in a form that has no gradient but is faster, for the inactive steps.
        observe: Called at every step.
        blend: The part of the latents that is given; the rest alone is drawn, and carries gradient.

    Raises:
        ValueError: The table is stochastic and ``noise`` is missing.
    """
    if noise is None and not table.is_deterministic:
        raise ValueError("a chain with eta > 0 needs step noise")
    kept = set(sorted(plan.active)[len(plan.active) - num_kept :] if num_kept < len(plan.active) else plan.active)
    last = table.num_steps - 1 if plan.scored is None else plan.scored
    for k in range(last + 1):
        t = table.timesteps_T[k].to(x_BCHW.device)
        # the method itself truncates here: DRTune-like plans cut the path through the input latent
        input_BCHW = x_BCHW if plan.is_through_latent else x_BCHW.detach()
        if k not in plan.active or not torch.is_grad_enabled():
            with torch.no_grad():
                f_BCHW = (denoise_frozen or denoise)(input_BCHW, t)
        elif k in kept:
            f_BCHW = denoise(input_BCHW, t)
        else:
            # no dropout anywhere in the frozen networks, so there is no random state to keep
            f_BCHW = checkpoint(denoise, input_BCHW, t, use_reentrant=False, preserve_rng_state=False)
        if observe is not None:
            observe(k, input_BCHW, f_BCHW)
        if k == plan.scored:
            clean_BCHW = float(table.d_T[k]) * x_BCHW + float(table.e_T[k]) * f_BCHW
            return clean_BCHW if blend is None else blend.clean(clean_BCHW)
        x_BCHW = float(table.a_T[k]) * x_BCHW + float(table.b_T[k]) * f_BCHW
        if noise is not None and table.s_T[k] != 0:
            x_BCHW = x_BCHW + float(table.s_T[k]) * noise(k)
        if blend is not None:
            x_BCHW = blend.after(k, x_BCHW)
    return x_BCHW
