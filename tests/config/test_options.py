"""Options of estimators and rewards: typed as their builders are, in the faults of a file and in the JSON schema."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jsonschema
import pytest

from rltune.config.load import parse_experiment
from rltune.config.options import node_of, options_section
from rltune.config.rules import Known
from rltune.config.schema import json_schema
from rltune.config.words import describe
from rltune.config.yamlfile import read_yaml
from rltune.errors import ExperimentError
from rltune.registry import Option, Within, options_of


@dataclass(frozen=True)
class Thrower:
    """Throws.

    Attributes:
        copy: A name that a model has a method of.
        force: Newtons.
    """

    copy: Annotated[int, Within(1, 8)] = 2
    force: Annotated[float, Within(0, 1)] = 0.5
    spin: Literal["left", "right"] = "left"
    is_wet: bool = False
    aim: Annotated[int, Within(0, 9)] | None = None
    words: str | Sequence[str] | None = None
    headers: Mapping[str, str] | None = None
    anything: object = None


def rested(*, naps: int = 1) -> None:
    """Rest.

    Args:
        naps: How many,
            all in all.
    """


def plain(images: Any, prompts: Any) -> None:
    """Nothing."""


THROWER = options_section("thrower", options_of(Thrower))
KNOWN = Known(
    estimator_options={"thrower": THROWER, "rested": options_section("rested", options_of(rested))},
    reward_options={"thrower": THROWER, "plain": options_section("plain", ())},
)
VALUES: Mapping[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "copy": ((1, 8), (0, 9, 2.5, True, "2", None)),
    "force": ((0, 1, 0.25), (-0.1, 2, "0.5", False, None)),
    "spin": (("left", "right"), ("up", 1, None)),
    "is_wet": ((True, False), (0, "yes", None)),
    "aim": ((None, 0, 9), (-1, 1.5, "x")),
    "words": ((None, "a", ["a", "b"]), (3, ["a", 3])),
    "headers": (({"a": "b"}, {}), ("a", 3)),
    "anything": ((None, 1, "a", [1], {"b": 2}), ()),
}
"""Option -> values that it takes, and that it does not."""


def faults_of(text: str) -> list[str]:
    try:
        parse_experiment(text, "x", known=KNOWN)
    except ExperimentError as error:
        return [str(fault).removeprefix("x:").split(" ", 1)[1] for fault in error.faults]
    return []


def estimator(options: str, name: str = "thrower", more: str = "") -> str:
    return f"rewards: {{plain: {{}}}}\nestimator: {{name: {name}, options: {options}{more}}}\n"


CASES = [(key, value, right) for key, pair in VALUES.items() for right in (True, False) for value in pair[not right]]


@pytest.mark.parametrize(("key", "value", "is_right"), CASES, ids=[f"{key}-{value}" for key, value, _ in CASES])
def test_the_loader_and_the_schema_take_the_same(key: str, value: Any, is_right: bool) -> None:
    text = estimator(json.dumps({key: value}))
    found = faults_of(text)
    assert (found == []) == is_right, found
    assert all(fault.startswith(f"estimator.options.{key}: must be ") for fault in found)
    in_reward = f"rewards: {{mine: {{reward: thrower, options: {json.dumps({key: value})}}}}}\n"
    assert (faults_of(in_reward) == []) == is_right
    by_key = f"rewards: {{thrower: {{options: {json.dumps({key: value})}}}}}\n"
    assert (faults_of(by_key) == []) == is_right
    for written in (text, in_reward, by_key):
        assert is_fit(written) == is_right, written


def is_fit(text: str) -> bool:
    data, _, _ = read_yaml(text)
    return jsonschema.Draft202012Validator(json_schema(KNOWN)).is_valid(data)


def test_an_unknown_option_is_told_with_the_nearest_and_all() -> None:
    text = estimator("{forse: 1}")
    names = "copy, force, spin, is_wet, aim, words, headers, anything"
    what = "estimator.options.forse: thrower has no such option, got 'forse'; did you mean 'force'?"
    assert faults_of(text) == [f"{what} known: {names}"]
    assert not is_fit(text)
    text = "rewards: {plain: {options: {force: 1}}}\n"
    assert faults_of(text) == ["rewards.plain.options.force: plain has no such option, got 'force'; it takes none"]
    assert not is_fit(text)


def test_all_are_told_at_once_with_what_else_is_wrong() -> None:
    text = (
        "rewards: {thrower: {options: {spin: lefd}}, plain: {}}\n"
        "estimator: {name: rested, options: {naps: '3'}, k: 2}\n"
        "optim: {lr: -1}\n"
    )
    assert faults_of(text) == [
        "rewards.thrower.options.spin: must be 'left' or 'right', got 'lefd'; did you mean 'left'? known: left, right",
        "estimator.options.naps: must be a whole number, got '3'; remove the quotes",
        "estimator.k: rested has no such setting, got 2; delete it",
        "optim.lr: must be a number from 0 to 1, got -1; the default is 0.001",
    ]


def test_what_may_be_a_secret_is_not_shown() -> None:
    found = faults_of("rewards: {thrower: {options: {headers: Bearer abc}}}\n")
    assert found == ["rewards.thrower.options.headers: must be a mapping, got str; write {name: value}"]


def test_a_setting_that_is_given_twice_is_refused() -> None:
    found = faults_of("rewards: {plain: {}}\nestimator: {k: 3, options: {k: 2}}\n")
    assert "estimator.options.k: is given beside estimator.k (3), got 2; delete one" in found


def test_a_number_that_is_none_is_told_once() -> None:
    assert faults_of(estimator("{force: .nan}")) == [
        "estimator.options.force: must be a finite number, got nan; write a number"
    ]


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ("{force: {float: [0.5, 1.5]}}", "estimator.options.force.float[1]: must be a number from 0 to 1, got 1.5"),
        ("{copy: {int: [1, 9]}}", "estimator.options.copy.int[1]: must be a whole number from 1 to 8, got 9"),
        ("{spin: {choice: [left, up]}}", "estimator.options.spin.choice[1]: must be 'left' or 'right', got 'up'"),
    ],
)
def test_a_distribution_is_tried_at_its_ends(options: str, where: str) -> None:
    (fault,) = faults_of(estimator(options))
    assert fault.startswith(where)
    assert is_fit(estimator(options))  # an editor sees the kind of a distribution, not where it ends


@pytest.mark.parametrize(
    "options",
    [
        "{force: {float: [0.5, 1]}, copy: {int: [1, 8]}, spin: {choice: [left, right]}, aim: {int: [0, 9]}}",
        "{is_wet: {choice: [true, false]}, words: {choice: [a, b]}, force: {log_float: [0.1, 1]}}",
    ],
)
def test_a_distribution_may_stand_for_a_value(options: str) -> None:
    assert faults_of(estimator(options)) == []
    assert is_fit(estimator(options))


@pytest.mark.parametrize("options", ["{spin: {int: [1, 2]}}", "{is_wet: {float: [0, 1]}}", "{copy: {float: [1, 2]}}"])
def test_an_editor_underlines_a_distribution_of_another_type(options: str) -> None:
    assert not is_fit(estimator(options))
    assert faults_of(estimator(options))


def test_options_of_estimators_that_are_searched_are_tried_with_each() -> None:
    text = estimator("{naps: 2}", name="{choice: [rested, thrower]}")
    (fault,) = faults_of(text)
    assert fault.startswith("estimator.name.choice[1]: thrower has no such option, got 'naps'")
    assert is_fit(text)  # an editor does not know whose they are
    naps, force = "{int: [1, 3], when: {estimator.name: rested}}", "{float: [0, 1], when: {estimator.name: thrower}}"
    assert faults_of(estimator(f"{{naps: {naps}, force: {force}}}", name="{choice: [rested, thrower]}")) == []


def test_the_default_estimator_has_its_options_without_being_named() -> None:
    known = Known(estimator_options={"alignprop": THROWER})
    validator = jsonschema.Draft202012Validator(json_schema(known))
    assert validator.is_valid({"estimator": {"options": {"force": 1}}})
    assert not validator.is_valid({"estimator": {"options": {"forse": 1}}})
    assert validator.is_valid({"estimator": {"name": "other", "options": {"forse": 1}}})
    assert validator.is_valid({"estimator": {"options": None}})


def test_an_option_that_two_estimators_bound_otherwise_is_tried_with_each() -> None:
    def narrow(*, copy: Annotated[int, Within(1, 3)] = 2) -> None: ...

    known = Known(
        estimators=("thrower", "narrow"),
        estimator_options={"thrower": THROWER, "narrow": options_section("narrow", options_of(narrow))},
    )
    text = estimator("{copy: {int: [1, 5]}}", name="{choice: [thrower, narrow]}")
    with pytest.raises(ExperimentError, match=r"must be a whole number from 1 to 3, got 5"):
        parse_experiment(text, "x", known=known)


def test_texts_defaults_and_words_come_from_the_builder() -> None:
    nodes = node_of(THROWER)["properties"]
    assert nodes["force"] == {
        "default": 0.5,
        "description": "Newtons.",
        "maximum": 1,
        "minimum": 0,
        "title": "Force",
        "type": "number",
    }
    assert node_of(KNOWN.estimator_options["rested"])["properties"]["naps"]["description"] == "How many, all in all."
    assert describe(nodes["words"]) == "text or a list of items, each text"
    assert describe(nodes["aim"]) == "a whole number from 0 to 9"
    unlimited = options_section("x", [Option("one", float, math.inf), Option("two", Annotated[str, Within(0, 1)], "a")])
    assert node_of(unlimited)["properties"] == {
        "one": {"title": "One", "type": "number"},
        "two": {"default": "a", "title": "Two", "type": "string"},
    }
    made_anew = node_of(options_section("x", [Option("one", Mapping[str, str])]))["properties"]["one"]
    assert "default" not in made_anew


def test_the_schema_with_options_is_one() -> None:
    schema = json_schema(KNOWN)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert all(definition["description"] for definition in schema["$defs"].values())
    assert json_schema() == json_schema(Known())
