import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rltune.config.experiment import RunConfig
from rltune.config.load import parse_experiment
from rltune.config.schema import belongs_to_whole_sweep, json_schema, node_at, run_schema
from rltune.config.words import describe, is_leaf, known_keys
from rltune.config.yamlfile import read_yaml

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").rglob("*.yaml"))
DEFAULTS = RunConfig.model_validate({"rewards": {"a": {}}, "constraints": {"a": {"min": 0}}}).model_dump(mode="json")


def errors_of(data: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(json_schema()).iter_errors(data)]


def nested(path: tuple[str, ...], value: Any) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif not isinstance(value, list) and value is not None:
        yield path, value


def empty(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from empty(item, (*path, key))
    elif value is None:
        yield path


LEAVES = list(leaves(DEFAULTS))
NUMBER_OR_WORD = ("alpha", "activation_gib")
"""Keys whose default is a word, and that take a number too."""


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    json.dumps(json_schema(), allow_nan=False)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_shipped_experiments_match_it(path: Path) -> None:
    data, _, _ = read_yaml(path.read_text())
    assert not errors_of(data)


def test_there_are_shipped_experiments() -> None:
    assert EXPERIMENTS


@pytest.mark.parametrize(("path", "value"), LEAVES, ids=[".".join(path) for path, _ in LEAVES])
def test_a_value_or_a_distribution_stands_wherever_trials_may_differ(path: tuple[str, ...], value: Any) -> None:
    assert not errors_of(nested(path, value))
    assert bool(errors_of(nested(path, {"choice": [value]}))) == belongs_to_whole_sweep(path)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not belongs_to_whole_sweep(path):
        assert bool(errors_of(nested(path, {"int": [1, 2]}))) == (not is_number and path[-1] not in NUMBER_OR_WORD)
        assert bool(errors_of(nested(path, {"float": [0.1, 0.2]}))) == (
            not isinstance(value, float) and path[-1] not in NUMBER_OR_WORD
        )
        assert bool(errors_of(nested(path, {"simplex": True}))) == (path != ("rewards", "a", "weight"))


@pytest.mark.parametrize("key", ["estimator.k", "estimator.std", "optim.queries", "rewards.a.target"])
def test_a_distribution_stands_where_nothing_is_the_default(key: str) -> None:
    path = tuple(key.split("."))
    assert not errors_of(nested(path, 3))
    assert not errors_of(nested(path, {"choice": [1, 2]}))
    assert not errors_of(nested(path, {"int": [1, 2]}))
    assert bool(errors_of(nested(path, {"float": [0.5, 2]}))) == (key in ("estimator.k", "optim.queries"))
    assert errors_of(nested(path, {"simplex": True}))


def test_a_setting_that_is_nothing_when_left_out_can_be_set_to_null() -> None:
    """In a file, after ``--set``, and in an editor."""
    paths = list(empty(DEFAULTS))
    assert {("optim", "queries"), ("constraints", "a", "max")} <= set(paths)
    bounded = {"rewards": {"a": {}}, "constraints": {"a": {"min": 0}}}
    for path in paths:
        dotted = ".".join(path)
        assert not errors_of(nested(path, None)), dotted
        experiment = parse_experiment(bounded, overrides=[f"{dotted}=1", f"{dotted}=null"])
        again = parse_experiment(experiment.to_yaml())
        for one in (experiment, again):
            value: Any = one.shared.model_dump()
            for key in path:
                value = value[key]
            assert value is None, dotted


@pytest.mark.parametrize(
    "data",
    [
        {"optim": {"lr": -1}},
        {"optim": {"learning_rate": 1}},
        {"optim": {"lr": {"log_flaot": [1, 2]}}},
        {"optim": {"lr": {"float": [1]}}},
        {"optim": {"lr": {"float": [0.1, 0.2], "step": 1}}},
        {"estimator": {"draw": "random"}},
        {"model": {"lora": {"choice": [1]}}},
        {"evaluate": {"judges": ["a", {"choice": ["b"]}]}},
        {"optim": 3},
        {"optim": {"betas": {"choice": [1]}}},
        {"estimator": {"checkpoint": "sometimes"}},
        {"rewards": {"a": {"loss": "square"}}},
        {"regularize": {"kl": 1}},
        {"resources": {"compile": {"choice": [True]}}},
        {"estimator": {"k": {"int": [1, 9], "when": {}}}},
        {"estimator": {"k": {"int": [1, 9], "when": {"estimator.name": []}}}},
        {"estimator": {"k": {"int": [1, 9], "when": "draft"}}},
        {"estimator": {"k": {"when": {"estimator.name": "draft"}}}},
        {"rewards": {"a": {"weight": {"simplex": True, "when": {"estimator.name": "draft"}}}}},
        {"search": {"points": {"optim.lr": 1}}},
    ],
)
def test_an_editor_underlines_it(data: dict[str, Any]) -> None:
    assert errors_of(data)


@pytest.mark.parametrize(
    "data",
    [
        {"optim": None, "rewards": None},
        {"optim": {"betas": [0.9, {"float": [0.9, 0.99]}]}},
        {"estimator": {"k": {"int": [1, 9], "step": 2}, "options": {"x": {"choice": [1]}}}},
        {"prompts": {"train": ["a cat"]}},
        {"regularize": None, "prompts": {"images_per_prompt": {"choice": [1, 2]}}},
        {"rewards": {"a": {"loss": {"choice": ["hinge", "target"]}, "target": {"float": [5, 7]}}}},
        {"rewards": {"a": {"relative": {"positive": "x", "negative": "y", "k": {"float": [0, 1]}}}}},
        {"rewards": {"a": {"reward": "my:own", "negate": True, "trust": {"ceiling": 3}, "standardise": False}}},
        {"mixture": {"method": {"choice": ["sum", "win_rate"]}}},
        {"estimator": {"k": {"int": [1, 9], "step": 2, "when": {"estimator.name": ["draft", "refl"], "seed": 1}}}},
        {"estimator": {"draw": {"choice": ["fixed"], "when": {"estimator.name": "draft"}}}},
        {"optim": {"lr": {"log_float": [1e-4, 1], "when": {"a.b": True}}, "ema": {"float": [0, 1], "when": {"a": 1}}}},
        {"search": {"points": [{"optim.lr": 1, "estimator.name": "draft"}, {}], "warm_start": "runs/other"}},
        {"estimator": {"name": {"choice": ["a", "b"]}, "activation_gib": 2.5, "checkpoint": "serial"}},
    ],
)
def test_an_editor_accepts_it(data: dict[str, Any]) -> None:
    assert not errors_of(data)


def test_making_it_leaves_the_schema_of_a_run_alone() -> None:
    json_schema()
    assert run_schema() == RunConfig.model_json_schema()


def test_every_key_has_a_description() -> None:
    for definition in (json_schema(), *json_schema()["$defs"].values()):
        assert definition["description"]
        if "title" in definition:
            assert [key for key, child in definition["properties"].items() if not child.get("description")] == []


def test_paths_lead_to_what_stands_there() -> None:
    keys = "reward weight loss target negate relative trust standardise micro_batch options"
    assert known_keys(node_at(("rewards", "any")) or {}) == tuple(keys.split())
    assert known_keys(node_at(("mixture",)) or {}) == ("method", "ideal", "rho")
    assert is_leaf(node_at(("rewards", "any", "relative", "k")) or {})
    assert node_at(("estimator", "options", "x", "y")) == {}
    assert node_at(("estimator", "nope")) is None
    assert node_at(("estimator", "nope", "x")) is None
    assert is_leaf(node_at(("optim", "betas")) or {})
    assert not is_leaf(node_at(("optim",)) or {})


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("optim.lr", "a number from 0 to 1"),
        ("optim.micro_batch", "a whole number, at least 1"),
        ("sampler.height", "a whole number from 8 to 8192, a multiple of 8"),
        ("constraints.a.min", "a number"),
        ("search.prune", "true or false"),
        ("estimator.draw", "'fixed', 'uniform', 'gaussian' or 'per_step'"),
        ("estimator.k", "a whole number from 1 to 1000"),
        ("estimator.activation_gib", "'auto' or a number, at least 0"),
        ("rewards.a.target", "a number"),
        ("optim.ema", "a number, at least 0 and below 1"),
        ("optim.betas.1", "a number, at least 0 and below 1"),
        ("evaluate.judges.3", "text"),
        ("prompts.train", "text or a list of items, each text"),
        ("search", "a section with any of the keys sampler, trials, prune, grace, reduction, seed, points, warm_start"),
    ],
)
def test_a_value_is_described_in_words(path: str, words: str) -> None:
    assert describe(node_at(tuple(path.split("."))) or {}) == words
