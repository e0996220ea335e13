"""Proof that a reward does what training asks of it, on images at hand: numbers, and what is wrong with them.

B: images. H, W: image rows and columns.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rltune.diffusion.memory import stored_bytes
from rltune.rewards.base import Reward, check_batch
from rltune.rewards.frozen import held_bytes
from rltune.rewards.mixture import measure, score

ROUNDING = 1e-4
"""Of the larger of 1 and the score: what another batch size may change in float32."""
RANGE_SLACK = 1e-4
"""By how much rounding may pass the ends of the stated range, of the larger of 1 and the end."""


@dataclass(frozen=True)
class Proof:
    """What a reward did with a batch."""

    scores: tuple[float, ...]
    metrics: tuple[float, ...]
    value_range: tuple[float, float]
    gradient_norms: tuple[float, ...] | None
    """L2 norm of the image gradient of each score; None where the reward has none."""
    leak: float
    """Largest gradient of one image's score in another image, and largest change of a score scored alone."""
    forward_ms: float
    """A batch, without gradient; the first call, which may still be loading, is not counted."""
    backward_ms: float | None
    """A batch, forward and backward."""
    weights_bytes: int
    activation_bytes: int | None
    """What a batch stores for its backward pass."""
    faults: tuple[str, ...]
    """What training would stumble over."""


def prove(name: str, reward: Reward, images_B3HW: Tensor, prompts: Sequence[str]) -> Proof:
    """Return what a reward does with a batch.

    Raises:
        ValueError: The batch is malformed, or the reward answers in another shape than ``(B,)``.
        NonFiniteError: A score is not finite.
    """
    check_batch(images_B3HW, prompts)
    with torch.no_grad():
        scores_B = score(name, reward, images_B3HW, prompts)
        start = _now(images_B3HW)
        score(name, reward, images_B3HW, prompts)
        forward_ms = 1000 * (_now(images_B3HW) - start)
        metrics_B = measure(name, reward, images_B3HW, prompts)
        leak = 0.0 if reward.sees_group else _change_alone(name, reward, images_B3HW, prompts, scores_B)
    norms_B, backward_ms, activation_bytes = None, None, None
    if reward.is_differentiable:
        images_B3HW = images_B3HW.clone().requires_grad_()
        start = _now(images_B3HW)
        (slope_B3HW,) = torch.autograd.grad(score(name, reward, images_B3HW, prompts).sum(), images_B3HW)
        backward_ms = 1000 * (_now(images_B3HW) - start)
        norms_B = torch.linalg.vector_norm(slope_B3HW.flatten(1), dim=1)
        if len(prompts) > 1 and not reward.sees_group:
            (first_B3HW,) = torch.autograd.grad(score(name, reward, images_B3HW, prompts)[0], images_B3HW)
            leak = max(leak, float(first_B3HW[1:].abs().max()))
        frozen = nn.ModuleList(networks_of(reward))
        activation_bytes = stored_bytes(lambda: score(name, reward, images_B3HW, prompts), frozen)
    proof = Proof(
        scores=tuple(scores_B.tolist()),
        metrics=tuple(metrics_B.tolist()),
        value_range=reward.value_range,
        gradient_norms=None if norms_B is None else tuple(norms_B.tolist()),
        leak=leak,
        forward_ms=forward_ms,
        backward_ms=backward_ms,
        weights_bytes=held_bytes(networks_of(reward)),
        activation_bytes=activation_bytes,
        faults=(),
    )
    return Proof(**(vars(proof) | {"faults": tuple(_faults(proof))}))


def networks_of(reward: object) -> tuple[nn.Module, ...]:
    """Return the networks that a reward holds, also through what it wraps or looks through."""
    found: dict[int, nn.Module] = {}
    waiting, seen = [reward], {id(reward)}
    while waiting:
        for value in vars(waiting.pop()).values():
            if isinstance(value, nn.Module):
                found[id(value)] = value
            elif hasattr(value, "__dict__") and not isinstance(value, type) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
    return tuple(found.values())


def _change_alone(name: str, reward: Reward, images_B3HW: Tensor, prompts: Sequence[str], scores_B: Tensor) -> float:
    alone_B = torch.cat([score(name, reward, images_B3HW[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))])
    return float(((alone_B - scores_B).abs() / scores_B.abs().clamp(min=1)).max())


def _faults(proof: Proof) -> Iterator[str]:
    low, high = proof.value_range
    for i, value in enumerate(proof.scores):
        slack = RANGE_SLACK * max(1.0, *(abs(end) for end in (low, high) if math.isfinite(end)), 0.0)
        if not low - slack <= value <= high + slack:
            yield f"image {i + 1}: the score {value:g} is outside the stated range {low:g} to {high:g}"
    for i, norm in enumerate(proof.gradient_norms or ()):
        if not math.isfinite(norm):
            yield f"image {i + 1}: its gradient is not finite, got a norm of {norm}"
        elif norm == 0:
            yield f"image {i + 1}: its gradient is exactly zero, so that training could not move from here"
    if proof.leak > ROUNDING:
        yield f"a score depends on the other images of the batch, by {proof.leak:.2g}; say so with sees_group = True"


def _now(images_B3HW: Tensor) -> float:
    if images_B3HW.device.type == "cuda":
        torch.cuda.synchronize(images_B3HW.device)
    return time.perf_counter()
