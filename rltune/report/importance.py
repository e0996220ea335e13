"""How much each searched setting has to do with each objective, and how sure that is.

The measure is Spearman's rank correlation over the trials that ran to their end: from -1 (the larger the setting, the
worse the objective) over 0 (no order) to 1. It needs no model, takes any monotone relation, and says which way to turn
a setting. Of a choice among words, each option is looked at: trials with it against trials without.

Its 95 % interval is that of Bonett and Wright, "Sample size requirements for estimating Pearson, Kendall and Spearman
correlations" (2000): normal in Fisher's z with the variance (1 + r^2 / 2) / (n - 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rltune.report.gather import Gathered

Array = npt.NDArray[np.float64]

Z = 1.959964
"""Of a standard normal, 95 % lie within."""
FEWEST = 6
"""Trials, below which nothing is said."""


@dataclass(frozen=True)
class Importance:
    """What one setting, or one option of it, has to do with one objective."""

    setting: str
    option: str
    """Of a choice among words; empty for numbers."""
    objective: str
    correlation: float
    """Positive where more of the setting goes with a better objective."""
    low: float
    high: float
    chance: float
    """Correlations of a setting without any effect lie within plus or minus this in 95 % of cases."""
    num_trials: int


def importances(run: Gathered) -> list[Importance]:
    """Return the importance of every searched setting for every objective; none where too few trials ended."""
    found = []
    ended = [result for result in run.trained if result.state == "ok"]
    for setting in run.settings:
        rows = [result for result in ended if setting in result.values]
        for option, numbers in _as_numbers([row.values[setting] for row in rows]):
            for name, sign in zip(run.objectives, run.front.objectives.signs_D, strict=True):
                values = sign * np.array([row.metrics[f"eval/{name}"] for row in rows])
                r = spearman(numbers, values)
                if r is not None:
                    low, high = interval(r, len(rows))
                    chance = min(Z / (len(rows) - 1) ** 0.5, 1.0)
                    found.append(Importance(setting, option, name, r, low, high, chance, len(rows)))
    return found


def _as_numbers(values: Sequence[Any]) -> list[tuple[str, Array]]:
    """Return a setting's values as numbers; of words, for each option whether it was taken."""
    if not values:
        return []
    if all(isinstance(value, int | float) for value in values):
        return [("", np.array(values, dtype=np.float64))]
    words = [str(value) for value in values]
    options = list(dict.fromkeys(words))
    options = options[:1] if len(options) == 2 else options
    return [(option, np.array([word == option for word in words], dtype=np.float64)) for option in options]


def spearman(x_N: Array, y_N: Array) -> float | None:
    """Return the rank correlation, ties at their mean rank; None of too few points, or where one does not vary."""
    if len(x_N) < FEWEST:
        return None
    x, y = _ranks(x_N), _ranks(y_N)
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else None


def interval(r: float, num: int) -> tuple[float, float]:
    """Return the 95 % interval of a rank correlation."""
    z = float(np.arctanh(np.clip(r, -0.999999, 0.999999)))
    half = Z * ((1 + r**2 / 2) / (num - 3)) ** 0.5
    return float(np.tanh(z - half)), float(np.tanh(z + half))


def _ranks(values_N: Array) -> Array:
    _, place, count = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    mean_rank: Array = (2 * last - count - 1) / 2
    return mean_rank[place]
