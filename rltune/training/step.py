"""One optimiser step: sample, score, backpropagate, accumulate, reduce, clip, update.

B: images of one micro-batch. C, H, W: latent channels, rows, columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rltune.diffusion.chain import GradientPlan, StepNoise, run_chain
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.sampling import PromptEmbeddings, decode_images, guided_denoiser
from rltune.diffusion.table import ChainTable
from rltune.errors import NonFiniteError
from rltune.rewards.mixture import Mixture
from rltune.training.workers import Stopwatch, Workers


@dataclass(frozen=True)
class Sampler:
    """A model with its sampler settings: from prompts and noise to images."""

    model: ModelFamily
    embeddings: PromptEmbeddings
    table: ChainTable
    guidance_scale: float
    use_checkpoint: bool = True
    negative_prompt: str = ""

    def latents(self, prompts: Sequence[str], x_BCHW: Tensor, *, plan: GradientPlan, noise: StepNoise | None) -> Tensor:
        """Run the chain from x_T -> x_0 (B, C, H, W), differentiable as ``plan`` says."""
        text_BLD = self.embeddings.get(prompts, x_BCHW.device)
        negative_1LD = self.embeddings.get([self.negative_prompt], x_BCHW.device)
        denoise = guided_denoiser(self.model, text_BLD, negative_1LD, guidance_scale=self.guidance_scale)
        return run_chain(denoise, x_BCHW, self.table, plan=plan, noise=noise, use_checkpoint=self.use_checkpoint)

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """Decode x_0 -> RGB in [0, 1] (B, 3, height, width)."""
        return decode_images(self.model, x_BCHW, use_checkpoint=self.use_checkpoint)


@dataclass(frozen=True)
class Batch:
    """What one worker trains on in one micro-batch."""

    prompts: tuple[str, ...]
    x_BCHW: Tensor
    """Latents x_T on the worker's device."""
    noise: StepNoise | None = None


@dataclass
class Sums:
    """Scores summed over images, to be reduced over workers."""

    names: tuple[str, ...]
    totals: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.totals = torch.zeros(len(self.names), dtype=torch.float64)

    def add(self, scores: dict[str, Tensor]) -> None:
        """Add a ``(B,)`` tensor per name."""
        self.totals += torch.stack([scores[name].detach().double().sum().cpu() for name in self.names])


def backward(
    sampler: Sampler,
    mixture: Mixture,
    plan: GradientPlan,
    batch: Batch,
    *,
    num_images: int,
    stopwatch: Stopwatch,
) -> dict[str, Tensor]:
    """Add the gradient of ``-sum(reward) / num_images`` to the adapters and return the scores, ``(B,)`` each.

    Args:
        sampler: Model and sampler.
        mixture: The reward.
        plan: Steps that carry gradient.
        batch: Prompts and noise.
        num_images: Images of the whole step over all micro-batches and workers, so that gradients add up to the mean's.
        stopwatch: Receives ``sampling``, ``reward`` and ``backward`` seconds.

    Raises:
        NonFiniteError: A reward is not finite.
    """
    with stopwatch.measure("sampling"):
        x_BCHW = sampler.latents(batch.prompts, batch.x_BCHW, plan=plan, noise=batch.noise)
    with stopwatch.measure("reward"):
        score = mixture(sampler.decode(x_BCHW), batch.prompts)
    with stopwatch.measure("backward"):
        (-score.total_B.sum() / num_images).backward()
    scores = {"reward": score.total_B}
    scores |= dict(score.raw) | {f"{name}_z": values_B for name, values_B in score.standardised.items()}
    return scores


def apply_gradient(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    workers: Workers,
    *,
    max_grad_norm: float,
) -> float:
    """Sum gradients over workers, clip, update, clear; return the global gradient norm before clipping.

    Raises:
        NonFiniteError: The norm is not finite or exactly zero; nothing was updated.
    """
    workers.sum_gradients(parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    if not 0 < norm < float("inf"):
        optimizer.zero_grad(set_to_none=True)
        what = "exactly zero: the reward does not depend on the images" if norm == 0 else f"{norm}"
        raise NonFiniteError(
            f"the gradient of the mixed reward is {what}; lower optim.lr or estimator.k, or leave out the reward "
            "that saturates"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
