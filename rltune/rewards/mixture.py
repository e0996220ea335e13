"""Several rewards as one number: each standardised by what the base model scores, then weighted.

B: images in the batch. N: base-model images. H, W: image rows and columns.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rltune.errors import NonFiniteError, RunError
from rltune.rewards.base import Reward, check_batch


@dataclass(frozen=True)
class Calibration:
    """What a reward scores on images of the base model: the zero and the unit of its standardised score."""

    mean: float
    std: float


@dataclass(frozen=True)
class MixtureScore:
    """The scores of one batch. ``raw`` and ``standardised`` hold a ``(B,)`` float32 tensor per reward scored."""

    total_B: Tensor
    """Weighted sum of the standardised scores; 0 is the base model's mean. Differentiable where the rewards are."""
    raw: Mapping[str, Tensor]
    standardised: Mapping[str, Tensor]


def calibrate(reward_values_N: Tensor) -> Calibration:
    """Return mean and population standard deviation of one reward's raw scores of base-model images, in float64.

    A deviation below the float32 resolution of the values is rounding, not preference: it is given as 0.

    Raises:
        ValueError: There are no values, or one is not finite.
    """
    values_N = reward_values_N.detach().double().flatten()
    if values_N.numel() == 0 or not bool(values_N.isfinite().all()):
        raise ValueError(f"a calibration needs at least one finite value and no other, got {values_N.tolist()}")
    std = float(values_N.std(unbiased=False))
    resolution = torch.finfo(torch.float32).eps * float(values_N.abs().max())
    return Calibration(mean=float(values_N.mean()), std=std if std > resolution else 0.0)


@dataclass(frozen=True)
class Shape:
    """What of a raw score is trained on, a loss written as a reward: its negative up to a constant.

    ``linear`` is the score r. ``hinge`` is min(r, target), loss relu(target - r): nothing is gained beyond the target
    (ReFL, arXiv:2304.05977). ``target`` is target - abs(target - r), AlignProp's published loss on the aesthetic score.
    """

    loss: Literal["linear", "hinge", "target"] = "linear"
    target: float = 0.0
    """In the reward's own unit."""

    def __call__(self, raw_B: Tensor) -> Tensor:
        """Shape raw scores ``(B,)``."""
        if self.loss == "hinge":
            return raw_B.clamp(max=self.target)
        return self.target - (self.target - raw_B).abs() if self.loss == "target" else raw_B


LINEAR = Shape()


class Mixture:
    """The weighted sum of standardised rewards: ``sum_k w_k * (shape_k(raw_k) - mean_k) / std_k``, ``sum_k w_k = 1``.

    Rewards have scales of their own (an aesthetic score moves by 1, a CLIP cosine by 0.05), so that weights on raw
    scores would say little; in units of the base model's own spread they compare.

    Args:
        rewards: Name -> reward.
        weights: Name -> weight, not negative, for the same names; normalised here to a sum of 1.
        calibration: Name -> calibration of the rewards that are scored.
        shapes: Name -> shape of the rewards that are not linear.
        score_all: Score rewards of weight 0 too, without gradient, so that they can be reported.

    Raises:
        ValueError: The names differ, or the weights are negative, not finite or all zero.
        RunError: A reward that is scored gives the same score to every base image.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        calibration: Mapping[str, Calibration],
        *,
        shapes: Mapping[str, Shape] | None = None,
        score_all: bool = True,
    ) -> None:
        if set(weights) != set(rewards):
            raise ValueError(f"weights must name the rewards {sorted(rewards)}, got {sorted(weights)}")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"weights must be finite, >= 0 and not all zero, got {dict(weights)}")
        total = math.fsum(weights.values())
        self.shapes = {name: (shapes or {}).get(name, LINEAR) for name in rewards}
        self.weights = {name: weights[name] / total for name in rewards}
        self.rewards = {name: rewards[name] for name in rewards if score_all or weights[name] > 0}
        if missing := sorted(set(self.rewards) - set(calibration)):
            raise ValueError(f"calibration must name the rewards that are scored, {missing} are missing")
        self.calibration = {name: calibration[name] for name in self.rewards}
        for name, unit in self.calibration.items():
            if not unit.std > 0:
                raise RunError(
                    f"reward {name!r}: it gives the same score to every base image (mean {unit.mean:g}, std "
                    f"{unit.std:g}), so it has no scale to be weighed on; leave it out, or calibrate on more prompts"
                )

    @property
    def may_saturate(self) -> bool:
        """Whether a gradient of exactly zero may be what was asked for: every image at its cap."""
        return all(self.shapes[name].loss == "hinge" for name, weight in self.weights.items() if weight > 0)

    @property
    def is_differentiable(self) -> bool:
        """Whether every reward that carries weight is differentiable."""
        return all(reward.is_differentiable for name, reward in self.rewards.items() if self.weights[name] > 0)

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> MixtureScore:
        """Score RGB in [0, 1]. Rewards run in float32 whatever autocast is on; weight 0 runs without gradient.

        Raises:
            ValueError: The batch is malformed, or a reward answers in another shape than ``(B,)``.
            NonFiniteError: A score is not finite; the message names the reward and the prompts.
        """
        check_batch(images_B3HW, prompts)
        raw: dict[str, Tensor] = {}
        standardised: dict[str, Tensor] = {}
        total_B = torch.zeros(len(prompts), dtype=torch.float32, device=images_B3HW.device)
        for name, reward in self.rewards.items():
            with nullcontext() if self.weights[name] > 0 else torch.no_grad():
                raw[name] = score(name, reward, images_B3HW, prompts)
                unit = self.calibration[name]
                standardised[name] = (self.shapes[name](raw[name]) - unit.mean) / unit.std
            if self.weights[name] > 0:  # weight 0 adds no 0 * score, which overflow would make nan
                total_B = total_B + self.weights[name] * standardised[name]
        return MixtureScore(total_B=total_B, raw=raw, standardised=standardised)

    def metrics(self, images_B3HW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return each scored reward's ``metric`` of the images: ``(B,)`` float32, in its own unit.

        Raises:
            ValueError: The batch is malformed, or a reward answers in another shape than ``(B,)``.
            NonFiniteError: A metric is not finite; the message names the reward and the prompts.
        """
        check_batch(images_B3HW, prompts)
        return {name: measure(name, reward, images_B3HW, prompts) for name, reward in self.rewards.items()}

    def to(self, device: torch.device) -> "Mixture":
        """Move every reward to ``device`` and return the mixture."""
        self.rewards = {name: reward.to(device) for name, reward in self.rewards.items()}
        return self


def score(name: str, reward: Reward, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the reward's raw scores ``(B,)``, run in float32 and checked; the name is for messages.

    Raises:
        ValueError: The reward answers in another shape than ``(B,)``.
        NonFiniteError: A score is not finite; the message names the reward and the prompts.
    """
    with torch.autocast(images_B3HW.device.type, enabled=False):
        return _checked(f"reward {name!r}", reward(images_B3HW.float(), prompts), prompts)


def measure(name: str, reward: Reward, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the reward's metric ``(B,)`` as ``score`` returns its scores."""
    with torch.autocast(images_B3HW.device.type, enabled=False):
        return _checked(f"metric of reward {name!r}", reward.metric(images_B3HW.float(), prompts), prompts)


def _checked(what: str, values_B: Tensor, prompts: Sequence[str]) -> Tensor:
    if values_B.shape != (len(prompts),):
        raise ValueError(f"{what}: must be of shape ({len(prompts)},), got {tuple(values_B.shape)}")
    if not bool(values_B.isfinite().all()):
        pairs = zip(prompts, values_B.tolist(), strict=True)
        bad = [(prompt, value) for prompt, value in pairs if not math.isfinite(value)]
        shown = ", ".join(f"{value} for {prompt!r}" for prompt, value in bad[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NonFiniteError(
            f"{what}: not finite, got {shown}{more}; if the images are finite the reward is at fault, "
            "otherwise lower the learning rate or train in float32 or bfloat16"
        )
    return values_B
