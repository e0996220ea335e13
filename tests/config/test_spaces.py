"""What is accepted can be suggested: random spaces, whose every point a sampler may come to."""

import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rltune.config import validation
from rltune.config.distributions import Choice, FloatRange, IntRange, LogFloatRange, Simplex
from rltune.config.load import Experiment, parse_experiment
from rltune.config.rules import Known
from rltune.config.yamlfile import write_yaml
from rltune.errors import ExperimentError

KNOWN = Known(
    rewards=("a", "b", "opaque", "apart"),
    estimators=("alignprop", "cut", "policy"),
    rewards_without_gradient=("opaque",),
    policy_estimators=("policy",),
    serial_estimators=("cut",),
    group_rewards=("apart",),
)
# the settings that rules read together, with values that make every rule hold here and break there
OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "sampler.steps": (20, 10, 12),
    "sampler.base_steps": (0, 5),
    "estimator.k": (1, 10, 8),
    "estimator.name": ("alignprop", "policy", "cut"),
    "sampler.eta": (1.0, 0.0, 0.5),
    "regularize.flatness_image": (0.0, 0.5),
    "estimator.checkpoint": ("auto", "serial"),
    "mixture.method": ("sum", "non_dominated"),
    "optim.batch": (8, 4, 12, 6),
    "optim.micro_batch": (2, 4, 8),
    "prompts.images_per_prompt": (2, 1, 4, 3),
    "optim.steps": (20, 5, 2),
    "optim.queries": (80, 8),
    "rewards.a.weight": (1.0, 0.0),
    "rewards.b.weight": (0.0, 1.0),
    "rewards.a.loss": ("linear", "hinge"),
    "rewards.a.target": (None, 2.0),
    "rewards.b.reward": ("b", "opaque", "apart"),
}
GROUPS = (
    ("sampler.steps", "sampler.base_steps", "estimator.k"),
    ("optim.batch", "optim.micro_batch", "prompts.images_per_prompt", "rewards.b.reward", "rewards.b.weight"),
    ("estimator.name", "sampler.eta", "regularize.flatness_image", "estimator.checkpoint", "mixture.method"),
    ("rewards.a.weight", "rewards.b.weight", "rewards.b.reward", "estimator.name", "sampler.eta"),
    ("rewards.a.loss", "rewards.a.target", "optim.steps", "optim.queries", "optim.batch"),
)


@st.composite
def spaces(draw: st.DrawFn) -> dict[str, Any]:
    """A few settings that some rule reads together, most of them searched, one perhaps where a choice holds."""
    raw: dict[str, Any] = {"rewards": {"a": {}, "b": {}}, "evaluate": {"images_per_prompt": 2, "every": 1}}
    choices: list[tuple[str, tuple[Any, ...]]] = []
    for path in draw(st.lists(st.sampled_from(draw(st.sampled_from(GROUPS))), min_size=2, unique=True)):
        options = draw(st.lists(st.sampled_from(OPTIONS[path]), min_size=1, max_size=3, unique=True))
        numbers = [option for option in options if option is not None and not isinstance(option, str)]
        value: dict[str, Any] = {"choice": options}
        if len(numbers) > 1 and draw(st.booleans()):
            value = {"int" if isinstance(numbers[0], int) else "float": [min(numbers), max(numbers)]}
        if len(options) > 1:
            if choices and draw(st.integers(0, 3)) == 0:
                parent, known = draw(st.sampled_from(choices))
                value["when"] = {parent: draw(st.sampled_from(known))}
            elif "choice" in value:
                choices.append((path, tuple(options)))
        *sections, last = path.split(".")
        section = raw
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = options[0] if len(options) == 1 else value
    return raw


def some_point(space: Experiment, rng: random.Random) -> dict[str, Any]:
    """Values that a sampler may suggest: any option, any whole number, and of ranges of numbers one at its very end."""
    values: dict[str, Any] = {}
    ranges = [path for path, kind in space.space.items() if isinstance(kind, FloatRange | LogFloatRange)]
    at_end = rng.choice(ranges) if ranges else ""
    for path, kind in space.space.items():
        match kind:
            case Choice(options=options):
                values[path] = rng.choice(options)
            case IntRange(low=low, high=high, step=step):
                values[path] = rng.randrange(low, high + 1, step)
            case FloatRange(low=low, high=high) | LogFloatRange(low=low, high=high):
                values[path] = rng.choice((low, high)) if path == at_end else rng.uniform(low, high)
            case Simplex():
                raise AssertionError("none is drawn here")
    return space.active(values)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(raw=spaces(), seed=st.integers(0, 2**16))
def test_what_is_accepted_can_be_dealt(raw: dict[str, Any], seed: int) -> None:
    try:
        space = parse_experiment(write_yaml(raw), known=KNOWN)
    except ExperimentError:
        return  # that it is rightly refused: each fault was seen at a point of the space
    rng = random.Random(seed)
    for _ in range(40):
        data = validation.replaced(
            space.raw,
            {tuple(path.split(".")): value for path, value in some_point(space, rng).items()},
            {tuple(path.split(".")): kind for path, kind in space.space.items()},
        )
        assert not validation.faults_of_run(data, validation.Context(KNOWN))
