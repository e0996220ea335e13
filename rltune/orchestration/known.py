"""Every name that an experiment may use, from the registries."""

from rltune.config.options import options_section
from rltune.config.rules import Known
from rltune.estimators.base import ESTIMATORS
from rltune.orchestration.executors.base import EXECUTORS
from rltune.rewards.base import REWARDS, compares_group, has_gradient
from rltune.runs.metrics import JUDGES
from rltune.search.searcher import SAMPLERS
from rltune.training.adapters.base import ADAPTERS


def known_names() -> Known:
    """Return every name that an experiment may use, and what a name says of what it stands for; loads no weights."""
    estimators = {name: ESTIMATORS.get(name) for name in ESTIMATORS.names()}
    return Known(
        rewards=REWARDS.names(),
        estimators=tuple(estimators),
        adapters=ADAPTERS.names(),
        judges=tuple(JUDGES),
        samplers=SAMPLERS,
        executors=EXECUTORS.names(),
        fixed_size_executors=tuple(name for name in EXECUTORS.names() if EXECUTORS.build(name, {}).is_fixed_size),
        group_rewards=tuple(name for name in REWARDS.names() if compares_group(name)),
        canvas_rewards=tuple(name for name in REWARDS.names() if REWARDS.card(name).needs_canvas),
        rewards_without_gradient=tuple(name for name in REWARDS.names() if not has_gradient(name)),
        policy_estimators=tuple(name for name, kind in estimators.items() if not getattr(kind, "needs_gradient", True)),
        estimator_options={name: options_section(name, ESTIMATORS.options(name)) for name in estimators},
        reward_options={name: options_section(name, REWARDS.options(name)) for name in REWARDS.names()},
        serial_estimators=tuple(name for name, kind in estimators.items() if getattr(kind, "has_serial_mode", False)),
    )
