"""What a model scored beside the base model, as it is told: means and 95 % intervals by Student's t over prompts."""

from collections.abc import Mapping
from dataclasses import dataclass

from rltune.intervals import half_width

EVAL, GAIN = "eval/", "gain/"


@dataclass(frozen=True)
class Figure:
    """One reward or judge. Half widths are None where a single prompt was measured."""

    name: str
    value: float
    half_width: float | None
    gain: float
    """Over the base model, paired by prompt and noise."""
    gain_half_width: float | None
    base: float | None
    """The base model's value; None where it was not kept."""


def figures_of(metrics: Mapping[str, float], base_metrics: Mapping[str, float], num_prompts: int) -> tuple[Figure, ...]:
    """Return the figures of metrics as ``runs.metrics.summarise`` has them.

    Args:
        metrics: The model's.
        base_metrics: The base model's on the same prompts and noise.
        num_prompts: That they are means over.
    """
    found = []
    for name in (key.removeprefix(EVAL) for key in metrics if key.startswith(EVAL) and not key.endswith("_se")):
        value, gain = metrics[f"{EVAL}{name}"], metrics.get(f"{GAIN}{name}")
        if gain is None:  # of an early version
            continue
        halves = [half_width(metrics.get(f"{kind}{name}_se"), num_prompts - 1) for kind in (EVAL, GAIN)]
        found.append(Figure(name, value, halves[0], gain, halves[1], base_metrics.get(f"{EVAL}{name}")))
    return tuple(found)
