"""What a run measures, as numbers: judges, units, means with errors, constraints.

P: prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rltune.config.experiment import RunConfig
from rltune.intervals import standard_error

Values = npt.NDArray[np.float64]

JUDGES = {"diversity": True, "drift": False}
"""Judge -> whether larger is better."""
OVER_PROMPTS = "standard deviation over prompts"


@dataclass(frozen=True)
class Unit:
    """A unit of one reward or judge, fixed when the base model is measured and so before any trial."""

    size: float
    what: str
    """Of the base model, in words."""


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
