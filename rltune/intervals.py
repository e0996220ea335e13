"""How far a mean can be trusted: 95 % intervals by Student's t, since its standard error is an estimate itself.

P: prompts. S, T: seeds.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit  # type: ignore[import-untyped]

Array = npt.NDArray[np.float64]

LEVEL = 0.95


def half_width(standard_error: float | None, freedom: float) -> float | None:
    """Return half the width of the 95 % interval of a mean, or None where nothing is known of its error.

    A mean of 4 prompts lies within 1.96 of its estimated standard errors in 86 % of cases only, of 16 in 93 %.

    Args:
        standard_error: Of the mean, estimated from the spread of what it is a mean of.
        freedom: Degrees of freedom of that estimate: for a mean of P values, P - 1. Need not be whole.
    """
    if standard_error is None or freedom <= 0:
        return None
    return standard_error * float(stdtrit(freedom, (1 + LEVEL) / 2))


def standard_error(values_P: npt.ArrayLike) -> float | None:
    """Return the standard error of the mean; None for a single value, of whose error nothing is known."""
    values = np.asarray(values_P, dtype=np.float64)
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def over_prompts_and_seeds(values_SP: npt.ArrayLike) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % interval over both: other prompts, and trained with other seeds.

    The variance of the mean is that over prompts (of means over seeds) plus that over seeds (of means over prompts).
    What is peculiar to a prompt and a seed is counted twice, so the interval is rather too wide than too narrow. Its
    degrees of freedom are Satterthwaite's (1946): those of the prompts where these dominate, S - 1 where seeds do. A
    single seed says nothing of others: the interval is then over prompts alone.
    """
    values = np.asarray(values_SP, dtype=np.float64)
    return float(values.mean()), _half_width_of_sum(_means(values))


def difference(values_SP: npt.ArrayLike, others_TP: npt.ArrayLike) -> tuple[float, float | None]:
    """Return the difference of two means and half the width of its 95 % interval, as ``over_prompts_and_seeds``.

    Prompts are the same in both and so are paired; seeds are not, S in one and T in the other.
    """
    values, others = np.asarray(values_SP, dtype=np.float64), np.asarray(others_TP, dtype=np.float64)
    parts = [values.mean(axis=0) - others.mean(axis=0), values.mean(axis=1), others.mean(axis=1)]
    return float(values.mean() - others.mean()), _half_width_of_sum(parts)


def _half_width_of_sum(samples: Sequence[Array]) -> float | None:
    """Return half the width of the interval of a sum of independent means; a sample of one says nothing of errors."""
    parts = [(float(sample.var(ddof=1)) / len(sample), len(sample) - 1) for sample in samples if len(sample) > 1]
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts)
    freedom = variance**2 / spread if spread > 0 else min((freedom for _, freedom in parts), default=0)
    return half_width(variance**0.5, freedom)


def _means(values_SP: Array) -> tuple[Array, Array]:
    return values_SP.mean(axis=0), values_SP.mean(axis=1)
