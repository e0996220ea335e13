"""What a metric is counted in: how much the base model's own scores scatter, and where they do not, what stands for it.

N: images, prompt-major. P: prompts. I: images per prompt.
"""

import math
from collections.abc import Mapping

import numpy as np

from rltune.config.sections import JOINT_SHARES
from rltune.rewards.base import Reward
from rltune.runs.metrics import JUDGES, OVER_PROMPTS, Unit, Values
from rltune.training.evaluation import Pixels, Samples, diversity, drift

NEGLIGIBLE = 1e-6
"""Of the largest value: scatter below it is rounding in float32."""


def measure_units(
    values: Mapping[str, Values], samples: Samples, images_per_prompt: int, rewards: Mapping[str, Reward]
) -> dict[str, Unit]:
    """Return the unit of every reward and judge.

    It is the standard deviation of the base model's values over prompts. Where all prompts have the same value, as of
    the drift, of a judge at its ceiling, or of a single prompt: for a judge that is a distance between images, the
    distance of two of the base model's images that differ in their noise; for a share of images, 1; for a reward, the
    standard deviation over images, else that of a score that takes its stated range evenly; else 1, its own unit.

    Args:
        values: Of every prompt, ``(P,)`` each.
        samples: The images behind them, with every reward's score.
        images_per_prompt: I.
        rewards: Those that score the images.
    """
    units = {}
    for name, values_P in values.items():
        size = _scatter(values_P)
        if size > 0:
            units[name] = Unit(size, OVER_PROMPTS)
        elif name in JOINT_SHARES:
            units[name] = Unit(1.0, "share of images")
        elif name in JUDGES:
            units[name] = _distance_unit(samples.pixels_NHW3, images_per_prompt)
        else:
            units[name] = _score_unit(samples.values[name], rewards[name])
    return units


def _scatter(values: Values) -> float:
    if len(values) < 2:
        return 0.0
    size = float(values.std(ddof=1))
    return size if size > NEGLIGIBLE * float(np.abs(values).max()) else 0.0


def _distance_unit(pixels_NHW3: Pixels, images_per_prompt: int) -> Unit:
    if images_per_prompt > 1:
        size = float(diversity(pixels_NHW3, images_per_prompt).mean())
        what = "mean distance of two images of a prompt"
    elif len(pixels_NHW3) > 1:
        size = float(drift(pixels_NHW3[1:], pixels_NHW3[:-1], 1).mean())
        what = "mean distance of the images of two prompts"
    else:
        size, what = 0.0, ""
    return Unit(size, what) if size > 0 else _own_unit()


def _score_unit(values_N: Values, reward: Reward) -> Unit:
    size = _scatter(values_N)
    if size > 0:
        return Unit(size, "standard deviation over images")
    low, high = reward.value_range
    if not reward.metric_unit and math.isfinite(high - low) and high > low:  # else reported in another unit
        return Unit((high - low) / math.sqrt(12), f"standard deviation of even scores from {low:g} to {high:g}")
    return _own_unit()


def _own_unit() -> Unit:
    return Unit(1.0, "its own unit, since nothing of it scatters")
