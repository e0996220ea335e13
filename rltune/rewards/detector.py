"""Rewards on the objects in a picture, by an open-vocabulary detector: how many there are, whether they are there.

For pictures of anything; ``count`` and ``presence`` are the same for the built-in world. B: images in the batch. H, W:
image rows and columns. N: boxes of an image. Q: phrases.

A box shows its object by ``sigmoid(z)``, ``z = (logit - logit(threshold)) / temperature``: half at the threshold, and
next to nothing at the logits of a background of thousands of boxes, which would else add up. Where nothing is found,
``sigmoid(z)`` underflows and its gradient with it: everything here is computed from log chances.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torchvision.ops import box_iou, nms

from rltune.errors import UserError
from rltune.rewards.base import REWARDS, Card
from rltune.rewards.owlv2 import OWLV2, OWLV2_FILES, load_owlv2
from rltune.rewards.scale import score_of_chance

THRESHOLD = 0.3
TEMPERATURE = 0.25
"""In logits. A box of chance 0.5 then counts 0.97, and 3600 boxes at a logit of -6 count 4e-6 together."""
SAME_OBJECT_IOU = 0.5
"""Boxes of one object overlap by more than this."""
FAINT_COUNT = 0.1
"""Objects; below it the soft count falls more slowly than the sum of chances, so that its gradient lasts."""


class Detector(Protocol):
    """What the rewards need of a detector whose phrases are fixed; ``rltune.rewards.owlv2.Owlv2`` is one."""

    def logits(self, images_B3HW: Tensor) -> Tensor:
        """How surely each box shows each phrase, ``(B, N, Q)`` float32 logits."""
        ...

    def detect(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the boxes, ``(B, N, 4)``: left, top, right, bottom in any unit."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move weights to ``device``."""
        ...


class _DetectorReward:
    """What both rewards share.

    Raises:
        UserError: ``threshold`` or ``temperature`` is out of range.
    """

    def __init__(self, name: str, detector: Detector, *, threshold: float, temperature: float) -> None:
        check_numbers(name, threshold=threshold, temperature=temperature)
        self._detector = detector
        self._threshold = threshold
        self._temperature = temperature

    def _excess(self, logits: Tensor) -> Tensor:
        """How far above the threshold, in units of the temperature."""
        return (logits - math.log(self._threshold / (1 - self._threshold))) / self._temperature

    def to(self, device: torch.device) -> None:
        """Move the detector to ``device``."""
        self._detector.to(device)


class ObjectCount(_DetectorReward):
    """Minus the number of objects that are missing or too many, softly counted; the metric counts what is detected.

    Args:
        detector: With one phrase.
        target: How many objects there should be.
        threshold: Chance from which on a box is an object.
        temperature: How softly, in logits.

    Raises:
        UserError: An option is out of range.
    """

    def __init__(
        self, detector: Detector, *, target: int, threshold: float = THRESHOLD, temperature: float = TEMPERATURE
    ) -> None:
        super().__init__("object_count", detector, threshold=threshold, temperature=temperature)
        check_target(target)
        self._target = target

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, <= 0, differentiable; its gradient is 0 at the target alone.

        Ignores what the prompts say.
        """
        logits_BN1, boxes_BN4 = self._detector.detect(images_B3HW)
        pairs = zip(self._excess(logits_BN1[..., 0]), boxes_BN4, strict=True)
        return -(torch.stack([soft_count(z_N, boxes_N4) for z_N, boxes_N4 in pairs]) - self._target).abs()

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return minus the error of the number detected: boxes above the threshold, one an object; no gradient."""
        logits_BN1, boxes_BN4 = self._detector.detect(images_B3HW)
        errors = []
        for z_N, boxes_N4 in zip(self._excess(logits_BN1[..., 0]), boxes_BN4, strict=True):
            is_found_N = z_N > 0
            num_objects = nms(boxes_N4[is_found_N], z_N[is_found_N], SAME_OBJECT_IOU).numel()
            errors.append(-abs(num_objects - self._target))
        return torch.tensor(errors, dtype=torch.float32, device=images_B3HW.device)


class ObjectPresence(_DetectorReward):
    """Log chance that the objects are there, at least one of each, or that they are not; the metric is the chance.

    Args:
        detector: With one phrase or more.
        remove: Whether they should not be there.
        threshold: Chance from which on a box is an object.
        temperature: How softly, in logits.

    Raises:
        UserError: An option is out of range.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        remove: bool = False,
        threshold: float = THRESHOLD,
        temperature: float = TEMPERATURE,
    ) -> None:
        super().__init__("object_presence", detector, threshold=threshold, temperature=temperature)
        if not isinstance(remove, bool):
            raise UserError(f"reward 'object_presence': remove must be true or false, got {remove!r}")
        self._remove = remove

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, <= 0, differentiable: the mean over the phrases.

        Its gradient lasts however far the goal is, and until it is met by 100 temperatures, beyond float32. Ignores
        what the prompts say.
        """
        log_odds_BQ = log_odds(self._excess(self._detector.logits(images_B3HW)))
        return logsigmoid(-log_odds_BQ if self._remove else log_odds_BQ).mean(dim=1)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the chance, in [0, 1]: of several phrases the geometric mean."""
        return self(images_B3HW, prompts).exp()

    def score_of(self, metric: float, *, num_pixels: int) -> float:
        """Return the logarithm of a chance.

        Raises:
            UserError: It is no chance above 0.
        """
        return score_of_chance("object_presence", metric)


def soft_count(z_N: Tensor, boxes_N4: Tensor) -> Tensor:
    """Return how many objects the boxes show together, a number >= 0, differentiable in ``z_N``.

    Each box counts ``sigmoid(z)``, divided by one plus what the other boxes count that overlap it: n boxes on one
    object count 1 together, as non-maximum suppression would have it, and faint ones what they are. Whether two boxes
    overlap is yes or no, so that no gradient flows into where they are.

    Below ``FAINT_COUNT`` = f of these, at a count of ``f exp(-x)``, we return ``f / (1 + x)`` instead: the same value
    and slope at x = 0, at most 0.021 objects more below, and a gradient of ``f / (1 + x)^2`` a logit where that of the
    sum has long underflowed.
    """
    overlaps_NN = (box_iou(boxes_N4, boxes_N4) > SAME_OBJECT_IOU).to(z_N).fill_diagonal_(0)
    log_count = (logsigmoid(z_N) - torch.log1p(overlaps_NN @ z_N.sigmoid())).logsumexp(dim=0)
    # The clamp zeroes the gradient of the branch that is not taken.
    x = (math.log(FAINT_COUNT) - log_count).clamp(min=0)
    return torch.where(x > 0, FAINT_COUNT / (1 + x), log_count.exp())


def log_odds(z_BNQ: Tensor) -> Tensor:
    """Log odds that the object is there, ``(B, Q)``: the odds of the boxes, ``exp(z)``, add up.

    Where nothing is found these are the chances, which add up as those of independent boxes do. Boxes on one object are
    not independent, though: twenty of chance 0.995 would leave a chance of e^-107 that it is not there, which is 0 in
    float32 with its gradient; so they leave e^-8.
    """
    return z_BNQ.logsumexp(dim=1)


def check_numbers(reward: str, **values: Any) -> None:
    """Check that ``threshold`` is a chance and ``temperature`` positive.

    Raises:
        UserError: One is not.
    """
    for option, value in values.items():
        high = 1.0 if option == "threshold" else math.inf
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < high:
            what = "a number between 0 and 1" if option == "threshold" else "a number greater than 0"
            raise UserError(f"reward {reward!r}: {option} must be {what}, got {value!r}")


def check_target(target: Any) -> None:
    """Check that ``target`` is a number of objects.

    Raises:
        UserError: It is not.
    """
    if not isinstance(target, int) or isinstance(target, bool) or target < 0:
        raise UserError(f"reward 'object_count': target must be a whole number of objects, got {target!r}")


def is_phrase(of: Any) -> bool:
    """Return whether ``of`` can name an object."""
    return isinstance(of, str) and bool(of.split())


CARD_COUNT = Card(
    "minus the error of the number, 0 at best", weights=OWLV2_FILES, value_range=(-math.inf, 0.0), metric_unit="objects"
)
CARD_PRESENCE = Card("log of a chance, 0 at best", weights=OWLV2_FILES, value_range=(-math.inf, 0.0))


@REWARDS.register("object_count", CARD_COUNT)
def build_object_count(
    *,
    of: str | None = None,
    target: int | None = None,
    model: str = OWLV2,
    threshold: float = THRESHOLD,
    temperature: float = TEMPERATURE,
) -> ObjectCount:
    """Minus the objects missing or too many of those that a phrase names, by OWLv2.

    Args:
        of: What to count, such as ``red apple``; must be given.
        target: How many; must be given.
        model: OWLv2: id on the Hugging Face hub, or a folder in the layout of transformers.
        threshold: Chance from which on a box is an object.
        temperature: How softly boxes are counted, in logits.

    Raises:
        UserError: An option is missing or out of range, ``of`` is too long, or ``model`` is no OWLv2.
        RunError: The model is not on this machine and cannot be fetched.
    """
    if not is_phrase(of):
        raise UserError(f"reward 'object_count': of must be a phrase such as 'red apple', got {of!r}")
    check_target(target)
    check_numbers("object_count", threshold=threshold, temperature=temperature)  # before a large model is loaded
    assert of is not None
    assert target is not None
    detector = load_owlv2("object_count", model, (of,))
    return ObjectCount(detector, target=target, threshold=threshold, temperature=temperature)


@REWARDS.register("object_presence", CARD_PRESENCE)
def build_object_presence(
    *,
    of: str | Sequence[str] | None = None,
    remove: bool = False,
    model: str = OWLV2,
    threshold: float = THRESHOLD,
    temperature: float = TEMPERATURE,
) -> ObjectPresence:
    """Log chance that what a phrase names is there, or is not, by OWLv2; the metric is the chance.

    Args:
        of: What should be there, such as ``red apple``, or a list of such; must be given.
        remove: Whether it should not be there.
        model: OWLv2: id on the Hugging Face hub, or a folder in the layout of transformers.
        threshold: Chance from which on a box is an object.
        temperature: How soft that is, in logits.

    Raises:
        UserError: An option is missing or out of range, ``of`` is too long, or ``model`` is no OWLv2.
        RunError: The model is not on this machine and cannot be fetched.
    """
    phrases = (of,) if isinstance(of, str) else tuple(of) if isinstance(of, list | tuple) else ()
    if not phrases or not all(is_phrase(phrase) for phrase in phrases):
        raise UserError(
            f"reward 'object_presence': of must be a phrase such as 'red apple' or a list of phrases, got {of!r}"
        )
    check_numbers("object_presence", threshold=threshold, temperature=temperature)
    if not isinstance(remove, bool):
        raise UserError(f"reward 'object_presence': remove must be true or false, got {remove!r}")
    detector = load_owlv2("object_presence", model, phrases)
    return ObjectPresence(detector, remove=remove, threshold=threshold, temperature=temperature)
