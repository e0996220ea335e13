"""What rltune uses of Optuna that Optuna keeps private, and why there is no public way.

``tests/search/test_optuna_private.py`` has a test for each name, which says what to do where one is gone.
"""

from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseGASampler


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether a value is one that a distribution could give: Optuna's own rule for steps and rounding."""
    return bool(distribution._contains(distribution.to_internal_repr(value)))


def generation_key(sampler: BaseGASampler) -> str:
    """Return under which attribute a genetic sampler notes a trial's generation.

    It breeds only from trials whose generation it knows, and ``get_trial_generation`` notes it of running trials
    alone, not of those of an earlier start.
    """
    return str(sampler._get_generation_key())
