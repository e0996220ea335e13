"""The noise of the image at hand as what is optimised: nothing is trained but x_T.

So do SeedSelect (arXiv:2304.14530) and direct noise optimisation (arXiv:2405.18881), by backpropagation through the
sampling chain; ``Ascent`` takes the steps. After each the noise is scaled to the norm that it was drawn with. That is a
draw from the distribution that a standard normal's norm has, which in d dimensions lies within a few 1/sqrt(2) of
sqrt(d); off that shell the network was never trained. Direct noise optimisation has a penalty for this and for other
statistics of the noise; a projection has no weight to set, and leaves the noise that is started from as it is.

Each image has an objective, a norm and a direction of its own, so that, up to rounding, what becomes of it does not
depend on the rest of the batch.

B: images. C, H, W: latent channels, rows, columns. S: iterates, the noise as it was drawn first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rltune.diffusion.chain import GradientPlan, StepNoise
from rltune.diffusion.sampler import Sampler
from rltune.errors import NonFiniteError, UserError
from rltune.rewards.mixture import check_finite

Objective = Callable[[Tensor, Sequence[str]], Tensor]
"""RGB in [0, 1] (B, 3, height, width) and a prompt each -> what is raised, ``(B,)``; row i depends on image i alone."""
LR = 0.1
"""Length of a step, as a share of the norm of the noise."""
MOMENTUM = 0.9
"""Of the direction."""


@dataclass(frozen=True)
class Optimised:
    """What became of the noise of a batch."""

    x_BCHW: Tensor
    """Of each image the noise with its largest objective, float32 at least, detached."""
    objective_SB: Tensor
    """Of every iterate, on the CPU; row 0 is the noise as it was drawn."""
    best_B: Tensor
    """Which iterate that noise is."""


class Ascent:
    """Steps uphill on spheres, one an image: along the mean direction of the gradients so far, the newest first.

    Every gradient counts by its direction alone. Through a whole sampling chain their lengths differ by orders of
    magnitude from one step to the next, and Adam, which SeedSelect takes, would stand still for long after a large
    one. Adam also scales each number of the noise by itself: where gradients agree it ends at numbers of equal size,
    which is no normal distribution, while a gradient's own direction leaves their shape alone.

    Args:
        norm_B111: Radii of the spheres.
        lr: Length of a step, as a share of the radius.
        momentum: Weight of each mean direction in the next.
    """

    def __init__(self, norm_B111: Tensor, lr: float, momentum: float = MOMENTUM) -> None:
        self._norm_B111, self._lr, self._momentum = norm_B111, lr, momentum
        self._mean_BCHW: Tensor | None = None
        self._weight = 0.0

    def step(self, x_BCHW: Tensor, slope_BCHW: Tensor) -> Tensor:
        """Return the next point of each image; one without slope has nothing to add to the direction."""
        unit_BCHW = slope_BCHW / _norms(slope_BCHW).clamp(min=torch.finfo(slope_BCHW.dtype).tiny)
        mean_BCHW = (1 - self._momentum) * unit_BCHW
        if self._mean_BCHW is not None:
            mean_BCHW = mean_BCHW + self._momentum * self._mean_BCHW
        self._mean_BCHW, self._weight = mean_BCHW, 1 - self._momentum * (1 - self._weight)
        x_BCHW = x_BCHW + self._lr / self._weight * self._norm_B111 * mean_BCHW
        return x_BCHW * (self._norm_B111 / _norms(x_BCHW))


def optimise_noise(
    sampler: Sampler,
    prompts: Sequence[str],
    x_BCHW: Tensor,
    objective: Objective,
    *,
    noise: StepNoise | None = None,
    num_steps: int = 20,
    lr: float = LR,
    k: int | None = None,
) -> Optimised:
    """Raise an objective by the initial noise x_T of each image alone, and return the best noise that was met.

    Args:
        sampler: The model as it is, adapters included. Its weights stay as they are.
        prompts: One an image.
        x_BCHW: Standard normal noise; it is optimised in float32 at least, whatever the network's precision.
        objective: What is raised.
        noise: Fresh noise of each sampling step, where the sampler is stochastic; it is not optimised.
        num_steps: Of the optimiser; the objective is looked at once more.
        lr: Length of a step, as a share of the norm of the noise.
        k: Last sampling steps whose network call is differentiated; None for all T. With fewer, gradient reaches the
            noise past the earlier calls, by the sampler's own linear terms, and is no longer that of the image.

    Raises:
        UserError: ``k`` is not in 1..T, the first steps are left to the base model, which carry no gradient, or the
            objective has none.
        NonFiniteError: An image, its objective or its gradient is not finite, or the gradient of the noise as it was
            drawn is exactly zero.
    """
    plan = gradient_plan(sampler, k)
    x_BCHW = x_BCHW.detach().to(torch.promote_types(x_BCHW.dtype, torch.float32))
    norm_B111 = _norms(x_BCHW)
    x_BCHW = x_BCHW.clone().requires_grad_()
    ascent = Ascent(norm_B111, lr)
    best_BCHW = x_BCHW.detach().clone()
    rows: list[Tensor] = []
    for step in range(num_steps + 1):
        with torch.set_grad_enabled(step < num_steps):
            images_B3HW = sampler.decode(sampler.open(prompts, x_BCHW, noise).run(plan))
            check_finite(images_B3HW, prompts)
            objective_B = objective(images_B3HW, prompts)
        _check_objective(objective_B, prompts, step)
        if step < num_steps and not objective_B.requires_grad:
            raise UserError("noise: the objective has no gradient in the images; take a reward that has one")
        is_better_B = _better(objective_B, rows)
        rows.append(objective_B.detach())
        best_BCHW = torch.where(is_better_B.view(-1, 1, 1, 1), x_BCHW.detach(), best_BCHW)
        if step < num_steps:
            (slope_BCHW,) = torch.autograd.grad(objective_B.sum(), x_BCHW)
            _check_slopes(slope_BCHW, prompts, step)
            x_BCHW = ascent.step(x_BCHW.detach(), slope_BCHW).requires_grad_()
    objective_SB = torch.stack(rows).cpu()
    return Optimised(best_BCHW, objective_SB, objective_SB.argmax(dim=0))


def gradient_plan(sampler: Sampler, k: int | None) -> GradientPlan:
    """Return the plan of the last ``k`` sampling steps, or of all of them.

    Raises:
        UserError: ``k`` is not in 1..T, or the first steps are left to the base model.
    """
    if sampler.num_base_steps > 0:
        raise UserError(
            f"noise: the first {sampler.num_base_steps} steps are left to the base model, and gradient does not pass "
            "through them; sample with base_steps 0"
        )
    num_steps = sampler.num_steps
    if k is not None and not 1 <= k <= num_steps:
        raise UserError(f"noise: k must be in 1..{num_steps}, the sampling steps, got {k}")
    return GradientPlan.last(num_steps if k is None else k, num_steps)


def _norms(x_BCHW: Tensor) -> Tensor:
    norm_B111: Tensor = torch.linalg.vector_norm(x_BCHW.flatten(1), dim=1).view(-1, 1, 1, 1)
    return norm_B111


def _better(objective_B: Tensor, rows: Sequence[Tensor]) -> Tensor:
    if not rows:
        return torch.ones_like(objective_B, dtype=torch.bool)
    return objective_B.detach() > torch.stack(list(rows)).amax(dim=0)


def _check_objective(objective_B: Tensor, prompts: Sequence[str], step: int) -> None:
    if objective_B.shape != (len(prompts),):
        raise ValueError(f"objective: must be of shape ({len(prompts)},), got {tuple(objective_B.shape)}")
    for prompt, value in zip(prompts, objective_B.tolist(), strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(f"noise, step {step + 1}: the objective for {prompt!r} is not finite, got {value}")


def _check_slopes(slope_BCHW: Tensor, prompts: Sequence[str], step: int) -> None:
    """Check that there is a way to go; an image that has gone as far as it can, as of a capped reward, stays there."""
    norm_B = torch.linalg.vector_norm(slope_BCHW.flatten(1), dim=1).tolist()
    for prompt, norm in zip(prompts, norm_B, strict=True):
        if not math.isfinite(norm) or (norm == 0 and step == 0):
            what = f"not finite, got a norm of {norm}" if norm != 0 else "exactly zero: it does not depend on the image"
            raise NonFiniteError(
                f"noise, step {step + 1}: the gradient of the objective for {prompt!r} is {what}; lower the rate or "
                "k, or leave out the reward that saturates"
            )
