"""Rewards on the objects in a picture, by the built-in soft counter: how many there are, and whether they are there.

B: images in the batch. C, S: colours and shapes of the built-in world. N: cells of the counter's grid.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.functional import resize

from rltune.assets import BUILTIN_COUNTER
from rltune.builtin.counter import Counter, load_counter, log_chances
from rltune.builtin.grammar import parse
from rltune.builtin.scenes import OBJECT_COLORS, SHAPES, SIZE_PX
from rltune.errors import UserError
from rltune.rewards.base import REWARDS, Card, weights_file
from rltune.rewards.scale import score_of_chance

COLORS = tuple(OBJECT_COLORS)
FROM_PROMPT = "prompt"
MAX_CHANCE = 1 - 1e-4
"""An object that is seen this surely counts as there: from here on ``presence`` has nothing to gain."""


def to_network(images_B3HW: Tensor) -> Tensor:
    """RGB in [0, 1] of any size -> what counter and judge read: ``(B, 3, 64, 64)`` float32 in [-1, 1]."""
    x_B3HW = images_B3HW.float()
    if x_B3HW.shape[-2:] != (SIZE_PX, SIZE_PX):
        x_B3HW = resize(x_B3HW, [SIZE_PX, SIZE_PX], antialias=True)
    return 2 * x_B3HW - 1


class _ObjectReward:
    """What ``count`` and ``presence`` share: the counter, and which objects are meant."""

    def __init__(self, name: str, counter: Counter, of: str) -> None:
        self._name = name
        self._counter = counter
        self._named = None if of == FROM_PROMPT else _read_name(name, of)

    def _log_chances(self, images_B3HW: Tensor) -> Tensor:
        return log_chances(self._counter, to_network(images_B3HW))

    def _asked(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """How many of each colour and shape the prompts ask for, ``(B, C, S)`` float32."""
        asked = torch.zeros(len(prompts), len(COLORS), len(SHAPES))
        for row, prompt in enumerate(prompts):
            content = parse(prompt)
            if content is None:
                raise UserError(
                    f"reward {self._name!r}: cannot read what {prompt!r} asks for; with `of: prompt` prompts must be "
                    "like 'two red stars and a blue ring on a white background'; else name the objects, as in "
                    "`of: red stars`"
                )
            for group in content.groups:
                asked[row, COLORS.index(group.color), SHAPES.index(group.shape)] += group.count
        return asked.to(device)

    def to(self, device: torch.device) -> None:
        """Move the counter to ``device``."""
        self._counter.to(device)


class Count(_ObjectReward):
    """Minus the number of objects that are missing or too many, softly counted.

    Where the prompt says what is asked, every colour and shape counts, so that objects that nobody asked for cost as
    much as those that are missing.

    Args:
        counter: The network.
        of: ``prompt``, or the objects meant: ``stars``, ``red stars``, ``red objects``, ``objects``.
        target: How many of them, where ``of`` names them.

    Raises:
        UserError: ``of`` names no objects of the built-in world, or ``target`` does not go with it.
    """

    def __init__(self, counter: Counter, *, of: str = FROM_PROMPT, target: int | None = None) -> None:
        super().__init__("count", counter, of)
        is_number = isinstance(target, int) and not isinstance(target, bool) and target >= 0
        if (self._named is None) != (target is None) or not (target is None or is_number):
            raise UserError(
                f"reward 'count': target must be a whole number of objects where `of` names them, and left out with "
                f"`of: prompt`; got of: {of!r}, target: {target!r}"
            )
        self._target = target or 0

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, <= 0, differentiable."""
        count_BCS = self._log_chances(images_B3HW).exp().sum(dim=3)
        if self._named is None:
            return -(count_BCS - self._asked(prompts, count_BCS.device)).abs().sum(dim=(1, 2))
        return -((count_BCS * self._named.to(count_BCS)).sum(dim=(1, 2)) - self._target).abs()


class Presence(_ObjectReward):
    """Log chance that the named objects are there, at least one of each, or that none is; the metric is the chance.

    The logarithm keeps a gradient where the counter sees nothing at all, and for a removal where it is sure.

    Args:
        counter: The network.
        of: ``prompt``, or the objects meant: ``stars``, ``red stars``, ``red objects``, ``objects``.
        remove: Whether none of them should be there.

    Raises:
        UserError: ``of`` names no objects of the built-in world, or ``remove`` does not go with it.
    """

    def __init__(self, counter: Counter, *, of: str = FROM_PROMPT, remove: bool = False) -> None:
        super().__init__("presence", counter, of)
        if not isinstance(remove, bool) or (remove and self._named is None):
            raise UserError(
                "reward 'presence': remove must be true or false, and true only where `of` names the objects; got "
                f"of: {of!r}, remove: {remove!r}"
            )
        self._remove = remove

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score RGB in [0, 1] -> ``(B,)`` float32, <= 0, differentiable; the mean over the kinds asked for."""
        log_chance_BCSN = self._log_chances(images_B3HW)
        if self._named is not None:
            is_other_CS1 = self._named.to(log_chance_BCSN.device)[:, :, None] == 0
            log_chance_BN = log_chance_BCSN.masked_fill(is_other_CS1, -math.inf).logsumexp(dim=(1, 2))
            return log_none(log_chance_BN) if self._remove else _log_any(log_chance_BN)
        is_asked_BCS = self._asked(prompts, log_chance_BCSN.device) > 0
        log_any_BCS = _log_any(log_chance_BCSN)
        return (log_any_BCS * is_asked_BCS).sum(dim=(1, 2)) / is_asked_BCS.sum(dim=(1, 2)).clamp(min=1)

    def metric(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the chance, in [0, 1]: of several kinds the geometric mean."""
        return self(images_B3HW, prompts).exp()

    def score_of(self, metric: float, *, num_pixels: int) -> float:
        """Return the logarithm of a chance.

        Raises:
            UserError: It is no chance above 0.
        """
        return score_of_chance("presence", metric)


def _log_any(log_chance: Tensor) -> Tensor:
    """Log chance that something is in at least one cell (the last axis), from the log chance of each, independently."""
    log_none = torch.log1p(-log_chance.exp().clamp(max=MAX_CHANCE)).sum(dim=-1)
    # Small chances add up, and their logarithm must not pass through a number that underflows. At e^-12 the two agree
    # to half of e^-12; the clamp keeps the branch that is not taken from giving NaN gradients.
    log_sum = log_chance.logsumexp(dim=-1)
    return torch.where(log_sum < -12, log_sum, torch.log(-torch.expm1(log_none.clamp(max=-math.exp(-13)))))


def log_none(log_chance: Tensor) -> Tensor:
    """Log chance that something is in none of the cells (the last axis), from the log chance of each, independently.

    ``log(1 - exp(x))`` in the two forms that keep its digits near 0 and far below it (Maechler, 2012, the vignette of
    R's Rmpfr); the clamps keep the branch that is not taken from giving NaN gradients, and stop the sum at a chance of
    1 - 1e-30, whose gradient is zero.
    """
    x = log_chance.clamp(max=-1e-30)
    near, far = x.clamp(min=-math.log(2)), x.clamp(max=-math.log(2))
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(near)), torch.log1p(-far.exp())).sum(dim=-1)


def _read_name(reward: str, of: str) -> Tensor:
    """Which colours and shapes ``of`` means, ``(C, S)`` of 0 and 1."""
    words = of.lower().split() if isinstance(of, str) else []
    nouns: dict[str, tuple[str, ...]] = {"objects": SHAPES, "object": SHAPES}
    nouns |= {form: (shape,) for shape in SHAPES for form in (shape, f"{shape}s", f"{shape}es")}
    color = words[0] if len(words) == 2 else None
    if not 1 <= len(words) <= 2 or words[-1] not in nouns or color not in (None, *COLORS):
        raise UserError(
            f"reward {reward!r}: of must be 'prompt', or a colour ({', '.join(COLORS)}) and a shape "
            f"({', '.join(SHAPES)}, objects), as in 'red stars' or 'objects'; got {of!r}"
        )
    chosen = torch.zeros(len(COLORS), len(SHAPES))
    colors = COLORS if color is None else (color,)
    for name in colors:
        for shape in nouns[words[-1]]:
            chosen[COLORS.index(name), SHAPES.index(shape)] = 1
    return chosen


@REWARDS.register(
    "count", Card("minus objects, 0 at best", is_shipped=True, value_range=(-math.inf, 0.0), metric_unit="objects")
)
def build_count(*, of: str = FROM_PROMPT, target: int | None = None, weights: str | None = None) -> Count:
    """Minus the objects missing or too many, softly counted (built-in world).

    Args:
        of: ``prompt``, or the objects meant: ``stars``, ``red stars``, ``red objects``, ``objects``.
        target: How many of them, where ``of`` names them.
        weights: Another file of the counter's layout.

    Raises:
        UserError: ``of`` or ``target`` is wrong, or the two do not go together.
        RunError: The counter's weights are missing.
    """
    return Count(load_counter(weights_file("count", weights, BUILTIN_COUNTER)), of=of, target=target)


@REWARDS.register("presence", Card("log of a chance, 0 at best", is_shipped=True, value_range=(-math.inf, 0.0)))
def build_presence(*, of: str = FROM_PROMPT, remove: bool = False, weights: str | None = None) -> Presence:
    """Log chance that each kind of object asked for is there, or none (built-in world); the metric is the chance.

    Args:
        of: ``prompt``, or the objects meant: ``stars``, ``red stars``, ``red objects``, ``objects``.
        remove: Whether none of the objects named should be there.
        weights: Another file of the counter's layout.

    Raises:
        UserError: ``of`` names no objects of the built-in world, or ``remove`` does not go with it.
        RunError: The counter's weights are missing.
    """
    return Presence(load_counter(weights_file("presence", weights, BUILTIN_COUNTER)), of=of, remove=remove)
