"""From the unit that a reward is reported in to that of its score: the same for most, and who differs says how."""

import math

from rltune.errors import UserError
from rltune.rewards.base import Reward


def score_of(reward: Reward, metric: float, *, num_pixels: int) -> float:
    """Return the score of images that are reported with ``metric``: that itself, unless the reward says otherwise.

    Raises:
        UserError: No image has it, or the score does not say what the metric is.
    """
    return metric if reward.score_of is None else reward.score_of(metric, num_pixels=num_pixels)


def score_of_chance(reward: str, metric: float) -> float:
    """Return the logarithm of a chance, which rewards of presence score.

    Raises:
        UserError: It is no chance above 0.
    """
    if not 0 < metric <= 1:
        raise UserError(f"reward {reward!r}: a target is a chance, above 0 and at most 1, got {metric:g}")
    return math.log(metric)
