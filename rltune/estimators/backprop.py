"""Backpropagation of a differentiable reward through the chain, as a gradient plan says: the engine of six estimators.

B: images. C, H, W: latent channels, rows, columns. K: steps that carry gradient.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rltune.diffusion.chain import GradientPlan
from rltune.diffusion.sampler import Chain
from rltune.estimators.base import Batch, Round
from rltune.rewards.mixture import MixtureScore

TINY = 1e-12


def follow(round: Round, plan: GradientPlan) -> None:
    """Draw the round's images, backpropagate their reward as ``plan`` says, and update."""

    def accumulate() -> None:
        for batch in round.batches:
            chain = round.open(batch)
            add_gradient(round, plan, chain, batch)

    descend(round, accumulate)


def descend(round: Round, accumulate: Callable[[], None]) -> None:
    """Update by the gradient that ``accumulate`` adds up over this worker's batches.

    With ``flatness_weights`` the gradient is taken where the loss is worst nearby (RSA-FT, arXiv:2603.21175): at
    theta + rho_w grad L / ||grad L||, applied at theta. That draws and scores every image twice.
    """
    rho = round.regularisers.flatness_weights
    if rho > 0:
        accumulate()
        round.peers.sum_gradients(round.parameters)
        gradients = [parameter.grad for parameter in round.parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in present]))
        kept = [parameter.detach().clone() for parameter in round.parameters]
        with torch.no_grad():
            for parameter, gradient in zip(round.parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.add_(gradient, alpha=rho / (float(norm) + TINY))
                parameter.grad = None
        round.tally.is_noting = False
        accumulate()
        with torch.no_grad():
            for parameter, value in zip(round.parameters, kept, strict=True):
                parameter.copy_(value)
    else:
        accumulate()
    round.update()


def add_gradient(
    round: Round, plan: GradientPlan, chain: Chain, batch: Batch, *, share: float = 1.0, is_counted: bool = True
) -> Tensor:
    """Add the gradient of ``-share * mean(reward)`` and of the regularisers; return the result's latents, detached.

    Where the inputs of the active steps are detached, their graphs are independent: each hangs on the result by a
    number alone (``ChainTable.path_weight``). In serial mode they are built and freed one at a time against the one
    dL/dx, so that the memory of a single network pass does for any K; the gradient is the same.

    Args:
        round: What is trained, and with how many images in all.
        plan: Steps that carry gradient and the image that is scored.
        chain: The batch's chain.
        batch: Its prompts.
        share: Of the loss that this image has.
        is_counted: Whether the scores belong to the round's statistics.

    Raises:
        ValueError: Serial mode, and gradient is to pass through an active step's input.
    """
    if round.is_serial and plan.is_through_latent and len(plan.active) > 1:
        raise ValueError("serial mode needs a plan whose inputs are detached")
    num_outputs = round.num_images * max(1, len(plan.active))
    inputs: dict[int, Tensor] = {}
    penalties: list[Tensor] = []

    def observe(step: int, x_BCHW: Tensor, f_BCHW: Tensor) -> None:
        if step not in plan.active:
            return
        inputs[step] = x_BCHW.detach()
        if not round.is_serial:
            penalties.extend(penalise(step, x_BCHW, f_BCHW))

    def penalise(step: int, x_BCHW: Tensor, f_BCHW: Tensor) -> list[Tensor]:
        values = round.penalties_B(chain, step, x_BCHW, f_BCHW)
        return [weight / num_outputs * share * value_B.sum() for weight, value_B in values]

    with round.timer.measure("sampling"):
        forward = replace(plan, active=frozenset()) if round.is_serial else plan
        x_BCHW = chain.run(forward, observe=observe)
        if round.is_serial:
            x_BCHW = x_BCHW.detach().requires_grad_()
    with round.timer.measure("reward"):
        score = _score(round, x_BCHW, batch, is_counted=is_counted)
    with round.timer.measure("backward"):
        loss = -share * score.total_B.sum() / round.num_images
        torch.stack([loss, *penalties]).sum().backward()
        if round.is_serial:
            assert x_BCHW.grad is not None
            slope_BCHW = x_BCHW.grad if chain.drawn_B1HW is None else chain.drawn_B1HW * x_BCHW.grad
            for step in sorted(inputs, reverse=True):
                f_BCHW = chain.predict(step, inputs[step])
                surrogate = chain.table.path_weight(step, plan.scored) * (slope_BCHW * f_BCHW).sum()
                torch.stack([surrogate, *penalise(step, inputs[step], f_BCHW)]).sum().backward()
    round.tally.num_active = len(inputs)
    num_run = chain.table.num_steps if plan.scored is None else plan.scored + 1
    num_again = len(inputs) if round.is_serial else max(0, len(inputs) - round.sampler.num_kept)
    round.tally.num_calls += len(batch.prompts) * (num_run + num_again + len(inputs))
    return x_BCHW.detach()


def _score(round: Round, x_BCHW: Tensor, batch: Batch, *, is_counted: bool) -> MixtureScore:
    """Return the score to train on, and note that of the image itself."""
    image_B3HW = round.sampler.decode(x_BCHW)
    rho = round.regularisers.flatness_image
    if rho > 0:
        probe_B3HW = image_B3HW.detach().requires_grad_()
        plain = round.score(probe_B3HW, batch)
        (slope_B3HW,) = torch.autograd.grad(plain.total_B.sum(), probe_B3HW)
        norm_B111 = torch.linalg.vector_norm(slope_B3HW.flatten(1), dim=1).view(-1, 1, 1, 1)
        image_B3HW = image_B3HW - rho * slope_B3HW / (norm_B111 + TINY)
        round.tally.num_queries += len(batch.prompts)
    round.tally.num_queries += len(batch.prompts)
    score = round.score(image_B3HW, batch)
    if is_counted:
        round.tally.add(plain if rho > 0 else score)
    return score
