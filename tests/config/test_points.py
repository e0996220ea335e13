"""Points that are tried first: each must lie in the space."""

import pytest

from rltune.config.load import parse_experiment
from rltune.errors import ExperimentError

TEXT = """
rewards: {a: {weight: {simplex: true}}, b: {weight: {simplex: true}}}
estimator:
  name: {choice: [alignprop, refl]}
  k: {int: [1, 9], step: 2, when: {estimator.name: alignprop}}
optim: {lr: {log_float: [1e-4, 1e-2]}, ema: {float: [0, 0.5]}}
search:
  sampler: random
  points:
    - {optim.ema: 0}
    - {%s}
"""
"""The second point stands on line 11."""


def faults_of(point: str) -> list[str]:
    with pytest.raises(ExperimentError) as caught:
        parse_experiment(TEXT % point, "x.yaml")
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize(
    "point",
    [
        "optim.lr: 1e-4, optim.ema: 0.5",
        "estimator.name: alignprop, estimator.k: 9",
        "estimator.name: refl",
        "estimator.name: alignprop",
        "rewards.a.weight: 1, rewards.b.weight: 0",
        "rewards.a.weight: 0.333333, rewards.b.weight: 0.666667",
    ],
)
def test_a_point_may_name_some_settings_or_all(point: str) -> None:
    experiment = parse_experiment(TEXT % point, "x.yaml")
    assert len(experiment.shared.search.points) == 2
    assert parse_experiment(experiment.to_yaml(), "x.yaml").shared == experiment.shared


@pytest.mark.parametrize(
    ("point", "fault"),
    [
        ("optim.lr: 1", ".optim.lr: must be a number from 0.0001 to 0.01, got 1; that is what is searched"),
        ("optim.ema: .nan", ".optim.ema: must be a number from 0.0 to 0.5, got nan"),
        ("optim.ema: true", ".optim.ema: must be a number from 0.0 to 0.5, got true"),
        ("optim.lr: {choice: [1]}", ".optim.lr: must be a number from 0.0001 to 0.01, got {choice: [1]}"),
        ("estimator.name: draft", ".estimator.name: must be one of 'alignprop', 'refl', got 'draft'"),
        (
            "estimator.name: alignprop, estimator.k: 4",
            ".estimator.k: must be a whole number from 1 to 9 in steps of 2, got 4",
        ),
        ("estimator.name: alignprop, estimator.k: 3.0", ".estimator.k: must be a whole number from 1 to 9"),
        ("optim.steps: 5", ".optim.steps: is not searched, got 5; did you mean "),
        ("", ": a point needs a setting, got none; write one such as {optim.lr: 1e-3}"),
        (
            "rewards.a.weight: 0.5",
            ": weights on the simplex go together, got rewards.a.weight without rewards.b.weight",
        ),
        ("rewards.a.weight: 0.5, rewards.b.weight: 0.6", ": weights on the simplex must sum to 1, got 1.1"),
        ("rewards.a.weight: 1.5, rewards.b.weight: 0", ".rewards.a.weight: must be a number from 0 to 1, got 1.5"),
        (
            "estimator.k: 3",
            ".estimator.k: is searched only where estimator.name is 'alignprop', got 3 without estimator.name; give",
        ),
        (
            "estimator.name: refl, estimator.k: 3",
            ".estimator.k: is searched only where estimator.name is 'alignprop', got 'refl' for estimator.name; delete",
        ),
    ],
)
def test_what_does_not_lie_in_the_space_is_one_fault_with_its_line_and_place(point: str, fault: str) -> None:
    (found,) = faults_of(point)
    assert found.startswith("x.yaml:11 search.points[1]" + fault)


def test_a_value_has_the_line_it_stands_on() -> None:
    (fault,) = faults_of("optim.ema: 0.1,\n       optim.lr: 1")
    assert fault.startswith("x.yaml:12 search.points[1].optim.lr: ")


def test_what_is_no_list_of_mappings_is_told_what_it_should_be() -> None:
    with pytest.raises(ExperimentError, match=r"search\.points: must be a list of mappings of searched settings"):
        parse_experiment("rewards: {a: {weight: 1.0}}\nseed: {choice: [0, 1]}\nsearch: {points: 3}")
    with pytest.raises(ExperimentError, match=r"search\.points\[0\]: must be "):
        parse_experiment("rewards: {a: {weight: 1.0}}\nseed: {choice: [0, 1]}\nsearch: {points: [3]}")


def test_a_grid_takes_no_points() -> None:
    text = "rewards: {a: {weight: 1.0}}\nseed: {choice: [0, 1]}\nsearch: {sampler: grid, points: [{seed: 1}]}"
    with pytest.raises(ExperimentError, match=r"search\.points: a grid tries every combination in turn, got 1 to try"):
        parse_experiment(text)


def test_where_nothing_is_searched_a_point_has_no_place() -> None:
    with pytest.raises(ExperimentError, match=r"search\.points\[0\]\.seed: is not searched, got 1; give it a distri"):
        parse_experiment("rewards: {a: {weight: 1.0}}\nsearch: {points: [{seed: 1}]}")


def test_a_point_at_a_broken_distribution_is_no_fault_of_its_own() -> None:
    with pytest.raises(ExperimentError) as caught:
        parse_experiment("rewards: {a: {weight: 1.0}}\nseed: {int: [2, 1]}\nsearch: {points: [{seed: 1}]}", "x.yaml")
    (fault,) = caught.value.faults
    assert str(fault).startswith("x.yaml:2 seed.int: low must be below high")
