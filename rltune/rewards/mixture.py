"""Several rewards as one number: each standardised by what the base model scores, then made one of.

B: images in the batch. N: base-model images. H, W: image rows and columns.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rltune.errors import NonFiniteError, RltuneError, RunError, is_out_of_memory
from rltune.rewards.base import Reward, Score, check_batch
from rltune.rewards.clip import embeddings_kept
from rltune.rewards.scalarise import Chebyshev, Scalarisation, WeightedSum
from rltune.rewards.trust import Trust
from rltune.rewards.wrappers import features_of


@dataclass(frozen=True)
class Calibration:
    """What a reward scores on images of the base model: the zero and the unit of its standardised score."""

    mean: float
    std: float
    values: tuple[float, ...] = ()
    """The raw scores of those images."""


Reading = Callable[[str, Reward, Tensor, Sequence[str]], Tensor]
"""``score`` or ``measure``."""
RAW = Calibration(mean=0.0, std=1.0)
"""Leaves scores in their own unit."""


@dataclass(frozen=True)
class MixtureScore:
    """The scores of one batch. ``raw`` and ``standardised`` hold a ``(B,)`` float32 tensor per reward scored."""

    total_B: Tensor
    """The number that is backpropagated, trust included; of a weighted sum, 0 is the base model's mean. Differentiable
    where the rewards are."""
    raw: Mapping[str, Tensor]
    standardised: Mapping[str, Tensor]
    plain_B: Tensor | None = None
    """The same number without trust, where some reward is trusted."""
    trust_B: Tensor | None = None
    """The weight of each image in a loss that compares images: the mean of the rewards' trusts, by their weights."""

    @property
    def compared_B(self) -> Tensor:
        """The number that images are compared by where nothing is backpropagated.

        Trust is no part of it: an image that is trusted more would be taken for a better one, or a worse one below 0.
        """
        return self.total_B if self.plain_B is None else self.plain_B


def calibrate(reward_values_N: Tensor) -> Calibration:
    """Return mean, population standard deviation and values of one reward's raw scores of base-model images.

    A deviation below the float32 resolution of the values is rounding, not preference: it is given as 0.

    Raises:
        ValueError: There are no values, or one is not finite.
    """
    values_N = reward_values_N.detach().double().flatten()
    if values_N.numel() == 0 or not bool(values_N.isfinite().all()):
        raise ValueError(f"a calibration needs at least one finite value and no other, got {values_N.tolist()}")
    std = float(values_N.std(unbiased=False))
    resolution = torch.finfo(torch.float32).eps * float(values_N.abs().max())
    std = std if std > resolution else 0.0
    return Calibration(mean=float(values_N.mean()), std=std, values=tuple(values_N.tolist()))


@dataclass(frozen=True)
class Shape:
    """What of a raw score is trained on, a loss written as a reward: its negative up to a constant.

    ``linear`` is the score r. ``hinge`` is min(r, target), loss relu(target - r): nothing is gained beyond the target
    (ReFL, arXiv:2304.05977). ``target`` is target - abs(target - r), AlignProp's published loss on the aesthetic score.
    """

    loss: Literal["linear", "hinge", "target"] = "linear"
    target: float = 0.0
    """In the unit of the score."""

    def __call__(self, raw_B: Tensor) -> Tensor:
        """Shape raw scores ``(B,)``."""
        if self.loss == "hinge":
            return raw_B.clamp(max=self.target)
        return self.target - (self.target - raw_B).abs() if self.loss == "target" else raw_B


LINEAR = Shape()


class Mixture:
    """One number of standardised rewards, by default ``sum_k w_k * (shape_k(raw_k) - mean_k) / std_k``.

    Rewards have scales of their own (an aesthetic score moves by 1, a CLIP cosine by 0.05), so that weights on raw
    scores would say little; in units of the base model's own spread they compare.

    Args:
        rewards: Name -> reward.
        weights: Name -> weight w_k, not negative, for the same names; normalised here to a sum of 1.
        calibration: Name -> calibration of the rewards that are scored.
        shapes: Name -> shape of the rewards that are not linear.
        trusts: Name -> trust in the rewards that are to count more where they know what they see.
        scalarise: Makes one number of the standardised scores of the rewards that carry weight.
        images_per_prompt: Images of a prompt that follow each other in a batch; if given, those alone are compared by
            the rewards that compare images, and not all that happen to have the same prompt.
        score_all: Score rewards of weight 0 too, without gradient, so that they can be reported.

    Raises:
        ValueError: The names differ, or the weights are negative, not finite or all zero.
        RunError: A reward that carries weight gives the same score to every base image.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        calibration: Mapping[str, Calibration],
        *,
        shapes: Mapping[str, Shape] | None = None,
        trusts: Mapping[str, Trust] | None = None,
        scalarise: Scalarisation | None = None,
        images_per_prompt: int | None = None,
        score_all: bool = True,
    ) -> None:
        if set(weights) != set(rewards):
            raise ValueError(f"weights must name the rewards {sorted(rewards)}, got {sorted(weights)}")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"weights must be finite, >= 0 and not all zero, got {dict(weights)}")
        total = math.fsum(weights.values())
        self.shapes = {name: (shapes or {}).get(name, LINEAR) for name in rewards}
        self.weights = {name: weights[name] / total for name in rewards}
        self.trusts = dict(trusts or {})
        self.scalarise = scalarise or WeightedSum()
        self._images_per_prompt = images_per_prompt
        self.rewards = {name: rewards[name] for name in rewards if score_all or weights[name] > 0}
        if missing := sorted(set(self.rewards) - set(calibration)):
            raise ValueError(f"calibration must name the rewards that are scored, {missing} are missing")
        self.calibration = {name: calibration[name] for name in self.rewards}
        for name, unit in self.calibration.items():
            if unit.std > 0:
                continue
            if weights[name] > 0:
                raise RunError(
                    f"reward {name!r}: it gives the same score to every base image (mean {unit.mean:g}, std "
                    f"{unit.std:g}), so it has no scale to be weighed on; leave it out, or calibrate on more prompts"
                )
            self.calibration[name] = replace(unit, std=1.0)  # nothing is weighed: it is watched in its own unit
        units = {name: self.calibration[name] for name, weight in self.weights.items() if weight > 0}
        self._base_scores = {
            name: (self.shapes[name](torch.tensor(unit.values)) - unit.mean) / unit.std for name, unit in units.items()
        }

    @property
    def may_saturate(self) -> bool:
        """Whether a gradient of exactly zero may be what was asked for: every image at its cap."""
        caps = [self.shapes[name].loss == "hinge" for name, weight in self.weights.items() if weight > 0]
        # where the worst reward counts alone, it may be a capped one for every image
        is_worst_alone = isinstance(self.scalarise, Chebyshev) and self.scalarise.rho == 0
        return any(caps) if is_worst_alone else all(caps)

    @property
    def is_differentiable(self) -> bool:
        """Whether every reward that carries weight is differentiable."""
        return all(reward.is_differentiable for name, reward in self.rewards.items() if self.weights[name] > 0)

    def __call__(
        self, images_B3HW: Tensor, prompts: Sequence[str], weights: Mapping[str, Tensor] | None = None
    ) -> MixtureScore:
        """Score RGB in [0, 1]. Rewards run in float32 whatever autocast is on; weight 0 runs without gradient.

        Args:
            images_B3HW: What is scored.
            prompts: What they were drawn for.
            weights: Weights ``(B,)`` of every image's own, of the rewards that carry weight; together 1.

        Raises:
            ValueError: The batch is malformed, or a reward answers in another shape than ``(B,)``.
            NonFiniteError: An image or a score is not finite; the message names the prompts, and the reward.
        """
        check_batch(images_B3HW, prompts)
        check_finite(images_B3HW, prompts)
        images_B3HW = images_B3HW.float()  # once, so that every reward is given the same tensor
        used = self.weights if weights is None else weights
        raw: dict[str, Tensor] = {}
        standardised: dict[str, Tensor] = {}
        with embeddings_kept():
            for name, reward in self.rewards.items():
                with nullcontext() if self.weights[name] > 0 else torch.no_grad():
                    raw[name] = in_groups(score, name, reward, images_B3HW, prompts, self._images_per_prompt)
                    unit = self.calibration[name]
                    standardised[name] = (self.shapes[name](raw[name]) - unit.mean) / unit.std
            # weight 0 adds no 0 * score, which overflow would make nan
            carried = {name: score_B for name, score_B in standardised.items() if self.weights[name] > 0}
            trust = {
                name: self.trusts[name](features(self.rewards[name], images_B3HW, prompts))
                for name in carried
                if name in self.trusts
            }
            with nullcontext() if not trust else torch.no_grad():
                plain_B = self.scalarise(carried, used, images_B3HW, self._base_scores)
            if not trust:
                return MixtureScore(total_B=plain_B, raw=raw, standardised=standardised)
            total_B = self.scalarise(carried, used, images_B3HW, self._base_scores, trust)
        each = [used[name] * trust.get(name, torch.ones_like(plain_B)) for name in carried]
        return MixtureScore(total_B, raw, standardised, plain_B, torch.stack(each).sum(dim=0))

    def metrics(self, images_B3HW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return each scored reward's ``metric`` of the images: ``(B,)`` float32, in its own unit.

        Raises:
            ValueError: The batch is malformed, or a reward answers in another shape than ``(B,)``.
            NonFiniteError: A metric is not finite; the message names the reward and the prompts.
        """
        check_batch(images_B3HW, prompts)
        with embeddings_kept():
            return {name: measure(name, reward, images_B3HW, prompts) for name, reward in self.rewards.items()}

    def to(self, device: torch.device) -> "Mixture":
        """Move every reward to ``device`` and return the mixture."""
        self.rewards = {name: reward.to(device) for name, reward in self.rewards.items()}
        return self


def check_finite(images_B3HW: Tensor, prompts: Sequence[str]) -> None:
    """Check that images are numbers; rewards that round to 8 bits would make a picture of what is not.

    Raises:
        NonFiniteError: One is not; the message names its prompt.
    """
    is_finite_B = images_B3HW.isfinite().flatten(1).all(dim=1)
    if not bool(is_finite_B.all()):
        bad = [repr(prompt) for prompt, is_finite in zip(prompts, is_finite_B.tolist(), strict=True) if not is_finite]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NonFiniteError(
            f"the model drew images that are not finite, for {', '.join(bad[:3])}{more}; lower the learning rate, or "
            "train in float32 or bfloat16"
        )


def score(name: str, reward: Reward, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the reward's raw scores ``(B,)``, run in float32 and checked; the name is for messages.

    Raises:
        ValueError: The reward answers in another shape than ``(B,)``.
        NonFiniteError: A score is not finite; the message names the reward and the prompts.
        RunError: The reward fails.
    """
    with torch.autocast(images_B3HW.device.type, enabled=False):
        return _checked(f"reward {name!r}", _asked(name, reward, images_B3HW.float(), prompts), prompts)


def in_groups(
    read: Reading, name: str, reward: Reward, images_B3HW: Tensor, prompts: Sequence[str], each: int | None
) -> Tensor:
    """Return what ``read`` (``score`` or ``measure``) says of a batch, ``(B,)``, comparing ``each`` images at most.

    A prompt may have its turn twice. Whether both are in one batch depends on workers and micro-batches, on which a
    score must not; so a reward that compares images is given those of one turn at a time.
    """
    if each is None or not reward.sees_group:
        return read(name, reward, images_B3HW, prompts)
    parts = [slice(start, start + each) for start in range(0, len(prompts), each)]
    return torch.cat([read(name, reward, images_B3HW[part], prompts[part]) for part in parts])


@torch.no_grad()
def features(reward: Reward, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return what a reward sees in images, ``(B, D)`` float32, run in float32 and without gradient.

    Raises:
        UserError: The reward does not say.
    """
    with torch.autocast(images_B3HW.device.type, enabled=False):
        return features_of(reward, images_B3HW, prompts)


def measure(name: str, reward: Reward, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the reward's metric ``(B,)`` as ``score`` returns its scores."""
    with torch.autocast(images_B3HW.device.type, enabled=False):
        values_B = _asked(name, reward.metric, images_B3HW.float(), prompts)
        return _checked(f"metric of reward {name!r}", values_B, prompts)


def _asked(name: str, read: Score, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return a reward's answer; whatever it fails with names it, but for memory, which other batches may not use up."""
    try:
        return read(images_B3HW, prompts)
    except Exception as error:
        if isinstance(error, RltuneError) or is_out_of_memory(error):
            raise
        raise RunError(f"reward {name!r}: it failed with {type(error).__name__}: {error}") from error


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
