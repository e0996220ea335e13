"""Corners of a space: what one distribution breaks alone, what two break only together, and what none breaks."""

import pytest

from rltune.config.load import parse_experiment
from rltune.errors import ExperimentError


def faults_in(text: str) -> list[str]:
    try:
        parse_experiment("rewards: {a: {}, b: {}}\n" + text, "x.yaml")
    except ExperimentError as error:
        return [str(fault) for fault in error.faults]
    return []


@pytest.mark.parametrize(
    "text",
    [
        "sampler: {steps: {choice: [30, 12]}}\nestimator: {k: {int: [1, 12]}}",
        "optim: {batch: {int: [2, 2000], step: 2}}\nresources: {workers: 2}",
        "optim: {batch: {choice: [8, 16]}, micro_batch: {choice: [2, 4, 8]}}",
    ],
)
def test_a_space_without_a_bad_corner_is_valid(text: str) -> None:
    assert not faults_in(text)


def test_two_weights_may_both_range_from_zero() -> None:
    parse_experiment("rewards: {a: {weight: {float: [0, 1]}}, b: {weight: {float: [0, 1]}}}")


def test_two_weights_must_not_both_choose_zero() -> None:
    with pytest.raises(ExperimentError, match=r"rewards\.a\.weight\.choice\[1\]: no reward has a positive weight"):
        parse_experiment("rewards: {a: {weight: {choice: [1, 0]}}, b: {weight: {choice: [1, 0]}}}")


def test_what_only_two_distributions_together_break_is_found() -> None:
    (fault,) = faults_in("sampler: {steps: {choice: [30, 12]}}\nestimator: {k: {int: [1, 20]}}")
    assert fault.startswith(
        "x.yaml:3 estimator.k.int[1]: K must not exceed the 12 sampling steps (sampler.steps), got 20"
    )


def test_two_distributions_that_break_a_rule_at_several_corners_are_one_fault() -> None:
    (fault,) = faults_in("sampler: {steps: {choice: [30, 12, 10]}}\nestimator: {k: {int: [1, 20]}}")
    assert "got 20" in fault


def test_a_fixed_value_can_break_an_option_of_a_distribution() -> None:
    (fault,) = faults_in("sampler: {steps: {choice: [30, 12, 20]}}\nestimator: {k: 20}")
    assert fault.startswith("x.yaml:2 sampler.steps.choice[1]: K must not exceed the 12 sampling steps")


def test_a_value_between_the_ends_is_tried() -> None:
    (fault,) = faults_in("optim: {batch: 8, micro_batch: {int: [1, 4]}}")
    assert fault.startswith(
        "x.yaml:2 optim.micro_batch.int: must divide a worker's share of the batch, 8 / 1 = 8 images"
    )
    assert "got 3" in fault


def test_a_long_range_that_is_not_all_multiples_is_found() -> None:
    (fault,) = faults_in("optim: {batch: {int: [2, 2000]}}\nresources: {workers: 2}")
    assert "must be a multiple of the 2 workers (resources.workers), got 3" in fault


def test_both_ends_at_fault_are_both_named_once() -> None:
    faults = faults_in("sampler: {steps: 4}\nestimator: {k: {int: [5, 9]}}\nmodel: {lora: {rank: {choice: [1, 2]}}}")
    assert [fault.split(": ")[0] for fault in faults] == ["x.yaml:3 estimator.k.int[0]", "x.yaml:3 estimator.k.int[1]"]


def test_a_fault_of_a_fixed_value_is_named_once_however_large_the_space() -> None:
    faults = faults_in(
        "seed: -1\nestimator: {k: {int: [1, 9]}}\nmodel: {lora: {rank: {choice: [1, 2]}}}\noptim: {batch: 0}"
    )
    assert [fault.split(": ")[0] for fault in faults] == ["x.yaml:2 seed", "x.yaml:5 optim.batch"]


def test_a_broken_distribution_does_not_hide_the_others() -> None:
    faults = faults_in("optim: {betas: [{float: [2]}, {float: [0.9, 3]}], lr: {float: [0.1, 5]}, steps: 0}")
    assert [fault.split(": ")[0] for fault in faults] == [
        "x.yaml:2 optim.betas[0].float",
        "x.yaml:2 optim.steps",
        "x.yaml:2 optim.lr.float[1]",
    ]
