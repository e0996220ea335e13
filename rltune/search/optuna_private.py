"""What rltune uses of Optuna that Optuna keeps private, and why there is no public way.

``tests/search/test_optuna_private.py`` has a test for each name, which says what to do where one is gone.
"""

import json
from dataclasses import asdict
from typing import Any

from optuna.artifacts import ArtifactMeta
from optuna.artifacts._upload import ARTIFACTS_ATTR_PREFIX
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


def artifact_attribute(artifact: str, filename: str, mimetype: str) -> dict[str, str]:
    """Return the attribute by which a trial has a file of an artifact store, for a trial that has ended already.

    ``upload_artifact`` sets it of trials that run; those of a mirrored study have ended when they are added.
    """
    meta = ArtifactMeta(artifact_id=artifact, filename=filename, mimetype=mimetype, encoding=None)
    return {f"{ARTIFACTS_ATTR_PREFIX}{artifact}": json.dumps(asdict(meta))}
