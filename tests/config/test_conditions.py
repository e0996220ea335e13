"""Settings that are searched only where a choice has taken certain options."""

from typing import Any

import pytest

from rltune.config.conditions import ancestors, condition_in_words, fill, is_active, without
from rltune.config.distributions import Choice, IntRange
from rltune.config.load import Experiment, parse_experiment
from rltune.config.rules import Known
from rltune.errors import ExperimentError

NAMES = Known(estimators=("alignprop", "draft", "refl"))
K = """
rewards: {a: {weight: 1.0}}
estimator:
  name: {choice: [alignprop, draft, refl]}
  k: {int: [1, 3], when: {estimator.name: [alignprop, draft]}}
"""
CHAIN = K + "  draw: {choice: [fixed, gaussian], when: {estimator.name: alignprop}}\n"
CHAIN += "  std: {float: [1.0, 3.0], when: {estimator.draw: gaussian}}\n"
NAME, DRAW, STD = ("estimator", "name"), ("estimator", "draw"), ("estimator", "std")


def load(text: str, *overrides: str) -> Experiment:
    return parse_experiment(text, "x.yaml", overrides, NAMES)


def faults_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ExperimentError) as caught:
        load(text, *overrides)
    return [str(fault) for fault in caught.value.faults]


# ---- what is active


@pytest.mark.parametrize(
    ("values", "active"),
    [
        ({"name": "refl"}, {"name"}),
        ({"name": "draft"}, {"name", "k"}),
        ({"name": "alignprop"}, {"name", "k", "draw"}),
        ({"name": "alignprop", "draw": "fixed"}, {"name", "k", "draw"}),
        ({"name": "alignprop", "draw": "gaussian"}, {"name", "k", "draw", "std"}),
        ({"name": "refl", "draw": "gaussian"}, {"name"}),  # the draw itself is not active
        ({"draw": "gaussian"}, {"name"}),
    ],
)
def test_a_setting_is_active_where_every_choice_above_it_allows(values: dict[str, str], active: set[str]) -> None:
    dotted = {f"estimator.{key}": value for key, value in values.items()}
    assert load(CHAIN).active_paths(dotted) == {f"estimator.{key}" for key in active}
    expected = [f"estimator.{key}" for key in ("name", "k", "draw", "std") if key in values and key in active]
    assert list(load(CHAIN).active(dotted)) == expected


def test_all_conditions_must_hold() -> None:
    space = {
        ("a",): Choice((1, 2)),
        ("b",): Choice((True, 1)),
        ("c",): IntRange(1, 9, when=((("a",), (1,)), (("b",), (True,)))),
    }
    assert is_active(space, ("c",), {("a",): 1, ("b",): True})
    assert not is_active(space, ("c",), {("a",): 2, ("b",): True})
    assert not is_active(space, ("c",), {("a",): 1, ("b",): 1})  # true and 1 are two options


def test_a_choice_need_not_stand_before_what_depends_on_it() -> None:
    text = "rewards: {a: {weight: 1.0}}\noptim: {ema: {float: [0, 0.9], when: {seed: 1}}}\nseed: {choice: [0, 1]}"
    assert load(text).active_paths({"seed": 1}) == {"seed", "optim.ema"}
    assert load(text).active_paths({"seed": 0}) == {"seed"}


def test_assignments_are_found_for_what_is_to_be_tried_together() -> None:
    space = load(CHAIN).space
    paths = {tuple(path.split(".")): kind for path, kind in space.items()}
    k = ("estimator", "k")
    assert fill(paths, {}) == {NAME: "alignprop", k: 1, DRAW: "fixed"}
    assert fill(paths, {STD: 3.0}) == {NAME: "alignprop", k: 1, DRAW: "gaussian", STD: 3.0}
    assert fill(paths, {NAME: "draft", k: 3}) == {NAME: "draft", k: 3}
    assert fill(paths, {NAME: "draft", STD: 3.0}) is None
    assert fill(paths, {NAME: "refl", k: 3}) is None
    assert without(paths, k) == {NAME: "refl"}
    assert without(paths, STD) == {NAME: "alignprop", k: 1, DRAW: "fixed"}
    assert without(paths, NAME) is None
    assert set(ancestors(paths, STD)) == {NAME, DRAW}


# ---- runs


def test_what_is_not_active_is_as_if_the_file_did_not_have_it() -> None:
    run = load(CHAIN).concrete({"estimator.name": "refl"})
    assert run == load("rewards: {a: {weight: 1.0}}\nestimator: {name: refl}\nname: x").concrete({})
    run = load(CHAIN).concrete(
        {"estimator.name": "alignprop", "estimator.k": 2, "estimator.draw": "gaussian", "estimator.std": 1.5}
    )
    assert (run.estimator.k, run.estimator.draw, run.estimator.std) == (2, "gaussian", 1.5)


@pytest.mark.parametrize(
    "values",
    [
        {"estimator.name": "refl", "estimator.k": 1},
        {"estimator.name": "draft"},
        {"estimator.k": 1},
        {},
        {"estimator.name": "alignprop", "estimator.k": 1},
    ],
)
def test_values_are_for_the_active_settings_exactly(values: dict[str, Any]) -> None:
    assert not load(CHAIN).has(values)
    with pytest.raises(ValueError, match="values must be for"):
        load(CHAIN).concrete(values)


def test_values_of_other_ranges_are_not_of_this_space() -> None:
    assert load(CHAIN).has({"estimator.name": "draft", "estimator.k": 3})
    assert not load(CHAIN).has({"estimator.name": "draft", "estimator.k": 4})
    assert not load(CHAIN).has({"estimator.name": "draft", "estimator.k": 2.0})


def test_the_first_values_are_a_run() -> None:
    assert load(K).shared.estimator.k == 1
    reordered = K.replace("[alignprop, draft, refl]", "[refl, alignprop, draft]")
    assert load(reordered).shared.estimator.k is None


def test_a_grid_holds_each_active_combination_once() -> None:
    values = load(CHAIN.replace("{float: [1.0, 3.0]", "{choice: [1.0, 2.0]")).grid_values
    assert values is not None
    shown = [tuple(value.values()) for value in values]
    assert len(shown) == len(set(shown)) == 3 * (1 + 2) + 3 + 1  # alignprop: K times fixed or two stds
    assert shown[:4] == [
        ("alignprop", 1, "fixed"),
        ("alignprop", 1, "gaussian", 1.0),
        ("alignprop", 1, "gaussian", 2.0),
        ("alignprop", 2, "fixed"),
    ]
    assert shown[-4:] == [("draft", 1), ("draft", 2), ("draft", 3), ("refl",)]
    grid = load(CHAIN.replace("{float: [1.0, 3.0]", "{choice: [1.0, 2.0]"), "search={sampler: grid, trials: 99}")
    assert grid.num_trials == 13


def test_corners_try_a_setting_wherever_it_is_searched() -> None:
    runs = [(run.estimator.name, run.estimator.k) for run in load(K).corners(("estimator",))]
    assert runs == [("alignprop", 1), ("alignprop", 3), ("draft", 1), ("draft", 3), ("refl", None)]
    # what decides is varied too where it stands in another section
    elsewhere = "rewards: {a: {weight: 1.0}}\nseed: {choice: [0, 1, 2]}\nestimator: {k: {int: [1, 9], when: {seed: 1}}}"
    runs = [(run.seed, run.estimator.k) for run in load(elsewhere).corners(("estimator",))]
    assert runs == [(0, None), (1, 1), (1, 9), (2, None)]


def test_the_largest_run_has_the_greatest_numbers_of_what_is_named_where_they_are_active() -> None:
    text = K.replace("rewards:", "model: {lora: {rank: {choice: [8, 64, 2]}}}\nseed: {int: [3, 9]}\nrewards:")
    (run,) = load(text).largest(("model.lora.rank", "estimator.k", "optim.batch"))
    assert (run.model.lora.rank, run.estimator.name, run.estimator.k, run.seed) == (64, "alignprop", 3, 3)


def test_an_experiment_is_written_with_its_conditions() -> None:
    again = load(load(CHAIN).to_yaml())
    assert again.space == load(CHAIN).space
    assert again.is_conditional
    assert not load("rewards: {a: {weight: 1.0}}\nseed: {choice: [0, 1]}").is_conditional


def test_an_override_may_have_a_condition() -> None:
    experiment = load(K, "optim.lr={log_float: [1e-4, 1e-2], when: {estimator.name: refl}}")
    assert experiment.active_paths({"estimator.name": "refl"}) == {"estimator.name", "optim.lr"}


def test_conditions_are_said_in_words() -> None:
    space = load(CHAIN).space
    assert condition_in_words(space["estimator.k"]) == "where estimator.name is 'alignprop' or 'draft'"
    assert condition_in_words(space["estimator.name"]) == ""


# ---- faults


@pytest.mark.parametrize(
    ("when", "fault"),
    [
        (
            "{estimator.nam: draft}",
            "must name a choice that is searched, got 'estimator.nam'; did you mean 'estimator.na",
        ),
        (
            "{sampler.steps: 20}",
            "must name a choice that is searched, got 'sampler.steps'; known: seed, estimator.name",
        ),
        (
            "{optim.lr: 1}",
            "must name a choice, got 'optim.lr', which is a number from 0.0001 to 0.01; make that a choice",
        ),
        (
            "{estimator.name: drat}",
            "estimator.name is one of 'alignprop', 'draft', 'refl', got 'drat'; did you mean 'dra",
        ),
        ("{seed: [1, 2]}", "seed is one of 0, 1, got 2; take one of them"),
        ("{seed: true}", "seed is one of 0, 1, got true; take one of them"),
        ("{estimator.k: 1}", "waits for itself, got estimator.k; let one of them stand"),
        ("{}", "must be a mapping of searched choices to the options it is searched at, got {}; write when: "),
        ("draft", "must be a mapping of searched choices to the options it is searched at, got 'draft'"),
        ("{seed: []}", "seed must be given an option or a list, got []"),
        ("{seed: {choice: [1]}}", "seed must be given an option or a list, got {choice: [1]}"),
    ],
)
def test_a_condition_that_cannot_hold_is_one_fault_with_its_line(when: str, fault: str) -> None:
    text = f"""
rewards: {{a: {{weight: 1.0}}}}
seed: {{choice: [0, 1]}}
optim: {{lr: {{log_float: [1e-4, 1e-2]}}}}
estimator:
  name: {{choice: [alignprop, draft, refl]}}
  k:
    choice: [1, 2]
    when: {when}
"""
    (found,) = faults_of(text)
    assert found.startswith("x.yaml:9 estimator.k.when: " + fault)


def test_each_choice_of_a_condition_has_its_own_line() -> None:
    text = K + "optim:\n  ema:\n    float: [0, 0.5]\n    when:\n      estimator.name: refl\n      estimator.nme: refl\n"
    (fault,) = faults_of(text)
    assert fault.startswith("x.yaml:11 optim.ema.when: must name a choice that is searched, got 'estimator.nme'")


def test_a_ring_of_conditions_is_one_fault() -> None:
    text = """
rewards: {a: {weight: 1.0}}
seed: {choice: [0, 1], when: {model.lora.rank: 2}}
model: {lora: {rank: {choice: [2, 4], when: {optim.batch: 8}}}}
optim: {batch: {choice: [4, 8], when: {seed: 1}}, ema: {float: [0, 0.5], when: {seed: 1}}}
"""
    (fault,) = faults_of(text)
    assert fault.startswith(
        "x.yaml:3 seed.when: waits for itself, got a ring of conditions: model.lora.rank, optim.batch"
    )


def test_what_waits_for_a_broken_choice_is_no_fault_of_its_own() -> None:
    (fault,) = faults_of(CHAIN.replace("[fixed, gaussian]", "[]"))
    assert fault.startswith("x.yaml:6 estimator.draw.choice: must be a list of at least one value")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (
            "rewards: {a: {weight: {simplex: true, when: {seed: 1}}}, b: {weight: {simplex: true}}}",
            "a.weight.when: weight",
        ),
        ("rewards: {a: {weight: 1.0}}\noptim: {ema: {when: {seed: 1}}}", "optim.ema.when: a condition needs a distrib"),
        (
            "rewards: {a: {options: {x: {when: {seed: 1}}}}}",
            "rewards.a.options.x.when: a condition needs a distribution",
        ),
        (
            "rewards: {a: {weight: 1.0}}\noptim: {betas: [{float: [0.5, 0.9], when: {seed: 1}}, 0.9]}",
            "optim.betas[0].when: an item of a list cannot come and go",
        ),
        (
            "rewards: {a: {weight: 1.0}}\noptim: {ema: {choice: [0.5], when: {seed: 1}, steps: 2}}",
            "optim.ema: a distribution has one kind",
        ),
    ],
)
def test_a_condition_stands_beside_one_distribution_of_one_value(line: str, fault: str) -> None:
    (found,) = faults_of("seed: {choice: [0, 1]}\n" + line)
    assert fault in found


# ---- corners


def test_a_setting_is_tried_only_where_it_is_searched() -> None:
    """K above T breaks; where the steps are few, it is not searched."""
    text = """
rewards: {a: {weight: 1.0}}
sampler: {steps: {choice: [20, 5]}}
estimator: {k: {int: [1, 20], when: {sampler.steps: 20}}}
"""
    load(text)
    (fault,) = faults_of(text.replace("when: {sampler.steps: 20}", "when: {sampler.steps: [5, 20]}"))
    assert "x.yaml:4 estimator.k.int[1]: K must not exceed the 5 sampling steps" in fault
    (fault,) = faults_of(text.replace("when: {sampler.steps: 20}", "when: {sampler.steps: 5}"))
    assert "x.yaml:4 estimator.k.int[1]: K must not exceed the 5 sampling steps" in fault


def test_settings_that_are_never_searched_together_are_not_tried_together() -> None:
    text = """
rewards: {a: {weight: 1.0}}
seed: {choice: [0, 1]}
optim: {batch: {choice: [8, 3], when: {seed: 0}}, micro_batch: {choice: [1, 4], when: {seed: 1}}}
"""
    load(text)  # 4 images at a time are more than 3
    (fault,) = faults_of(text.replace("{choice: [1, 4], when: {seed: 1}}", "{choice: [1, 4], when: {seed: 0}}"))
    assert "optim.micro_batch.choice[1]: must not exceed optim.batch, 3 images, got 4" in fault


def test_what_breaks_where_a_condition_does_not_hold_is_found() -> None:
    text = """
rewards: {a: {loss: hinge, target: {float: [0.1, 0.2], when: {seed: 1}}}}
seed: {choice: [1, 0]}
"""
    (fault,) = faults_of(text)
    assert fault.startswith("x.yaml:2 rewards.a.target.when: where it does not hold, loss: hinge needs a target")
    # where it is the choice itself that breaks it, its option is named, once
    text = "rewards: {a: {loss: {choice: [hinge, target]}, target: {float: [0.1, 0.2], when: {rewards.a.loss: hinge}}}}"
    (fault,) = faults_of(text)
    assert fault.startswith("x.yaml:1 rewards.a.loss.choice[1]: loss: target needs a target")
    load(text.replace("[hinge, target]", "[hinge, linear]"))
