"""Fine-tunes a reward's head against counterfactual images, so that its score hangs on the object.

Masked images as counterfactual samples: Xiao et al., arXiv 2303.03052. There a classifier is fine-tuned on clean images
and, on images whose object or context is masked and refilled from another, held to what a frozen teacher sees. Ours is
inspired by that and differs in what the masked images are to give. A head on frozen features that starts as its own
teacher has nothing to learn from it, so the teacher says what an image is worth, and the mask what of it is left:

    loss = mean (h(x) - t(x))^2 + weight * (mean (h(x') - t(x))^2 + mean (h(x'') - floor)^2) / 2

h is the head and t what it was before, both of the features of an image; x' has its ground replaced and keeps its
score, x'' has its object replaced and gets a low one; all in units of the variance of t(x).

N: images. D: width of the features. F: ways to refill, those of ``FILLS``. H, W: image rows and columns.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rltune.errors import NonFiniteError, UserError
from rltune.rewards.aesthetic import Aesthetic
from rltune.rewards.audit import FILLS, PARTS, check_masks, replaced

BATCH = 256
LEAST = 10
"""Images that it takes."""
HELD_OUT = 5
"""Every fifth image is measured on, and not learnt from."""
CLIP = 1.0
"""Greatest norm of the gradient."""


@dataclass(frozen=True)
class Features:
    """What a reward sees in images and in their counterfactuals, float32 on its device."""

    clean_ND: Tensor
    replaced_PFND: Tensor
    """By the part that is replaced, of ``PARTS``, and what with, of ``FILLS``."""

    def __len__(self) -> int:
        return len(self.clean_ND)

    def pick(self, which: Tensor) -> "Features":
        """Return those of some images, by their numbers or by a bool each."""
        return Features(self.clean_ND[which], self.replaced_PFND[:, :, which])


@dataclass(frozen=True)
class Settings:
    """How a head is fine-tuned."""

    weight: float = 1.0
    """Of the counterfactuals beside the images as they are."""
    floor: float = 0.05
    """What an image without its object is to get: this quantile of the scores of the images as they are."""
    steps: int = 1500
    lr: float = 1e-3
    """Its peak, of one cycle."""
    seed: int = 0


@dataclass(frozen=True)
class Fit:
    """A head on images that it did not learn from."""

    loss: float
    explained: float
    """Share of the variance of the first head's scores that this one's explain, on the images as they are."""
    scores: tuple[float, ...]
    """Mean of the images as they are, and with each of ``PARTS`` replaced."""


@dataclass(frozen=True)
class FineTuned:
    """A reward with its new head, and what both heads make of images that were held out."""

    reward: Aesthetic
    before: Fit
    after: Fit


def read_features(reward: Aesthetic, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Features:
    """Return what a reward sees in images with known objects, each refilled from the one before it in its batch.

    Args:
        reward: A head on CLIP features.
        batches: RGB in [0, 1], ``(B, 3, H, W)``, and bool masks of the objects, ``(B, 1, H, W)``.
        device: Where the reward is.

    Raises:
        UserError: There are fewer than two images in a batch, or one shows no object or nothing else.
    """
    clean: list[Tensor] = []
    others: list[Tensor] = []
    with torch.no_grad():  # the features are the head's data
        for images_B3HW, objects_B1HW in batches:
            check_masks(objects_B1HW, first=sum(map(len, clean)))
            images_B3HW, objects_B1HW = images_B3HW.to(device), objects_B1HW.to(device)
            prompts = [""] * len(images_B3HW)
            clean.append(reward.features(images_B3HW, prompts))
            parts = [
                reward.features(replaced(images_B3HW, objects_B1HW, part, fill), prompts)
                for part in PARTS
                for fill in FILLS
            ]
            others.append(torch.stack(parts).unflatten(0, (len(PARTS), len(FILLS))))
    return Features(torch.cat(clean), torch.cat(others, dim=2))


def objective(
    head: nn.Module, features: Features, scores_N: Tensor, *, floor: float, weight: float, unit: float
) -> Tensor:
    """Return the loss of a head, 0-d, differentiable in its parameters.

    Args:
        head: From ``(B, D)`` to ``(B, 1)``.
        features: Of a batch of images.
        scores_N: What the images as they are should get, in the unit of the head's output.
        floor: What those without their object should get.
        weight: Of the counterfactuals.
        unit: Variance of the scores.
    """
    clean = (head(features.clean_ND)[:, 0] - scores_N).square().mean()
    of_object, of_ground = (head(part_FND)[..., 0] for part_FND in features.replaced_PFND)
    changed = (of_object - floor).square().mean() + (of_ground - scores_N).square().mean()
    loss: Tensor = (clean + weight * changed / 2) / unit
    return loss


def fine_tune(reward: Aesthetic, features: Features, settings: Settings) -> FineTuned:
    """Return a reward with its head fine-tuned; the given one stays as it is. On a CPU the seed decides every bit.

    Raises:
        UserError: There are fewer than ``LEAST`` images, or the head gives all of them the same score.
        NonFiniteError: The loss is not finite.
    """
    if len(features) < LEAST:
        raise UserError(f"images: fine-tuning takes {LEAST} or more, got {len(features)}")
    is_held_N = torch.arange(len(features), device=features.clean_ND.device) % HELD_OUT == HELD_OUT - 1
    held, features = features.pick(is_held_N), features.pick(~is_held_N)
    with torch.no_grad():
        scores_N = reward.head(features.clean_ND)[:, 0]
    unit, floor = float(scores_N.var(correction=0)), float(scores_N.double().quantile(settings.floor))
    if unit <= 1e-12 * float(scores_N.square().mean()):
        raise UserError(f"images: the head gives all {len(features)} one score; give images that it tells apart")
    head = deepcopy(reward.head).requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(settings.steps):
        pick_B = torch.randint(len(features), (BATCH,), generator=generator).to(scores_N.device)
        loss = objective(head, features.pick(pick_B), scores_N[pick_B], floor=floor, weight=settings.weight, unit=unit)
        if not bool(loss.isfinite()):
            raise NonFiniteError(f"head: the loss is {float(loss.detach())} at step {step}; give a lower --lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    tuned = reward.with_head(head)
    fits = [_fit(reward, part, held, settings.weight, floor, unit) for part in (reward, tuned)]
    return FineTuned(tuned, *fits)


def _fit(first: Aesthetic, reward: Aesthetic, held: Features, weight: float, floor: float, unit: float) -> Fit:
    with torch.no_grad():
        old_N, new_N = (one.head(held.clean_ND)[:, 0] for one in (first, reward))
        loss = objective(reward.head, held, old_N, floor=floor, weight=weight, unit=unit)
        changed = [reward.of_features(part_FND).mean() for part_FND in held.replaced_PFND]
    error, spread = float((new_N - old_N).square().mean()), float(old_N.var(correction=0))
    scores = [float(mean) for mean in (reward.of_features(held.clean_ND).mean(), *changed)]
    return Fit(float(loss), 1 - error / spread if spread > 0 else 1.0, tuple(scores))
