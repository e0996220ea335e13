"""What a run measures, as numbers: judges, units, means with errors, constraints.

P: prompts. N: images, prompt-major.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rltune.config.experiment import RunConfig
from rltune.config.sections import JOINT_SHARES
from rltune.intervals import standard_error

Values = npt.NDArray[np.float64]

JUDGES = {"diversity": True, "drift": False, "domination": True, "collapse": False}
"""Judge -> whether larger is better."""
OVER_PROMPTS = "standard deviation over prompts"


@dataclass(frozen=True)
class Unit:
    """A unit of one reward or judge, fixed when the base model is measured and so before any trial."""

    size: float
    what: str
    """Of the base model, in words."""


def joint_shares(
    values: Mapping[str, Values], base_values: Mapping[str, Values], objectives: Sequence[str], images_per_prompt: int
) -> dict[str, Values]:
    """Return which share of each prompt's images is better than the base model's in every objective, and in none.

    The joint domination and the joint collapse rate of PG-OT (arXiv:2605.13155), ``(P,)`` each, in [0, 1]; ``collapse``
    is the share that is worse in every objective. An image is compared with the base model's of the same prompt and
    noise, and a tie in one objective makes it neither. Objectives without a score for each image are left out.

    Args:
        values: Scores, ``(N,)`` per reward.
        base_values: The base model's of the same prompts and noise.
        objectives: What an image is compared in.
        images_per_prompt: Images that follow each other.

    Returns:
        ``JOINT_SHARES``; nothing where no objective has scores for each image, or the base model's were not kept.
    """
    names = [name for name in objectives if name in values]
    if not names or any(name not in base_values for name in names):
        return {}
    gains_ND = np.stack([values[name] - base_values[name] for name in names], axis=1)
    better_N, worse_N = (gains_ND > 0).all(axis=1), (gains_ND < 0).all(axis=1)
    shares = (flags_N.reshape(-1, images_per_prompt).mean(axis=1) for flags_N in (better_N, worse_N))
    return dict(zip(JOINT_SHARES, shares, strict=True))


def summarise(values: Mapping[str, Values], base_values: Mapping[str, Values]) -> dict[str, float]:
    """Return ``eval/NAME``, ``gain/NAME`` over the base model, and standard errors ``.._se``, from values per prompt.

    The unit of a standard error is the prompt: images of one prompt are not independent samples of the prompt set. A
    gain is paired by prompt and noise, so its standard error is far smaller than that of a difference of two means. Of
    a single prompt there is no ``.._se``.
    """
    summary: dict[str, float] = {}
    for name, values_P in values.items():
        for kind, rows_P in (("eval", values_P), ("gain", values_P - base_values[name])):
            summary[f"{kind}/{name}"] = float(rows_P.mean())
            if (error := standard_error(rows_P)) is not None:
                summary[f"{kind}/{name}_se"] = error
    return summary


def violations(config: RunConfig, metrics: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """Return by how much each constraint is broken: at most 0 where it holds, in the metric's own unit.

    ``min_ratio_to_base: q`` asks for at least q times the base model's value; of a negative value (a cost, such as
    minus kilobytes) it asks for at most 1/q times the cost.
    """
    broken = {}
    for name, bound in config.constraints.items():
        value = metrics[f"eval/{name}"]
        if bound.min is not None:
            broken[f"{name}.min"] = bound.min - value
        if bound.max is not None:
            broken[f"{name}.max"] = value - bound.max
        if bound.min_ratio_to_base is not None:
            reference = base[f"eval/{name}"]
            ratio = bound.min_ratio_to_base if reference >= 0 else 1 / bound.min_ratio_to_base
            broken[f"{name}.min_ratio_to_base"] = ratio * reference - value
    return broken
