"""Corners of a space: what one distribution breaks alone, what two break only together, and what none breaks."""

from collections.abc import Mapping
from typing import Any

import pytest

from rltune.config.load import parse_experiment
from rltune.config.rules import Known
from rltune.errors import ExperimentError

METHODS = Known(
    rewards=("a", "b", "opaque"),
    estimators=("alignprop", "cut", "policy"),
    rewards_without_gradient=("opaque",),
    policy_estimators=("policy",),
    serial_estimators=("cut",),
)


def faults_in(
    text: str, *, rewards: str = "{a: {}, b: {}}", known: Known | None = None, defaults: Mapping[str, Any] | None = None
) -> list[str]:
    try:
        experiment = parse_experiment(f"rewards: {rewards}\n" + text, "x.yaml", known=known)
        if defaults is not None:
            experiment.settled(defaults, known)
    except ExperimentError as error:
        return [str(fault) for fault in error.faults]
    return []


@pytest.mark.parametrize(
    "text",
    [
        "sampler: {steps: {choice: [30, 12]}}\nestimator: {k: {int: [1, 12]}}",
        "optim: {batch: {int: [2, 2000], step: 2}}\nprompts: {images_per_prompt: 2}",
        "optim: {batch: {choice: [8, 16]}, micro_batch: {choice: [2, 4, 8]}}",
        "optim: {batch: {choice: [8, 12]}}\nprompts: {images_per_prompt: {choice: [1, 2, 4]}}",
        "sampler: {steps: {choice: [30, 12]}, base_steps: {int: [0, 4]}}\nestimator: {k: {int: [1, 8]}}",
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


def test_what_only_three_distributions_together_break_is_found() -> None:
    steps = "sampler: {steps: {choice: [20, 10]}, base_steps: {choice: [0, 5]}}"
    (fault,) = faults_in(steps + "\nestimator: {name: draft, k: {choice: [1, 10]}}")
    rule = "K must not exceed the 10 sampling steps (sampler.steps) minus 5 base steps, got 10"
    assert fault.startswith(f"x.yaml:3 estimator.k.choice[1]: {rule}")


def test_an_option_and_the_end_of_a_range_of_numbers_are_tried_together() -> None:
    text = "estimator: {name: {choice: [cut, policy]}}\nsampler: {eta: {float: [0, 1]}}"
    assert only_fault(text).startswith("x.yaml:3 sampler.eta.float[0]: policy learns from the noise of sampling, got")
    rewards = "{a: {weight: {choice: [1, 0]}}, b: {weight: {float: [0, 1]}}}"
    (fault,) = faults_in("seed: 1", rewards=rewards)
    assert fault.startswith("x.yaml:1 rewards.a.weight.choice[1]: no reward has a positive weight")


def test_a_setting_that_is_left_out_under_a_condition_is_tried_with_the_others() -> None:
    """Left out, T is the model's own 20: too few for K = 16 after 5 base steps."""
    own = {"sampler.steps": 20}
    text = "estimator: {name: {choice: [cut, alignprop]}, k: {choice: [1, 16]}}\n"
    text += "sampler: {steps: {choice: [30, 40], when: {estimator.name: cut}}, base_steps: {choice: [0, 5]}}"
    assert not faults_in(text)
    (fault,) = faults_in(text, defaults=own)
    assert "K must not exceed the 20 sampling steps (sampler.steps) minus 5 base steps, got 16" in fault
    assert not faults_in(text.replace("[1, 16]", "[1, 15]"), defaults=own)


@pytest.mark.parametrize(
    ("text", "own", "message"),
    [
        ("estimator: {k: 5}", {"sampler.steps": 4}, "x.yaml:2 estimator.k: K must not exceed the 4 sampling steps"),
        ("estimator: {k: {int: [1, 5]}}", {"sampler.steps": 4}, "x.yaml:2 estimator.k.int[1]: K must not exceed the 4"),
        ("sampler: {steps: null}\nestimator: {k: 5}", {"sampler.steps": 4}, "x.yaml:3 estimator.k: K must not exceed"),
        ("estimator: {name: policy}", {"sampler.eta": 0.0}, "sampler.eta: policy learns from the noise of sampling"),
        ("sampler: {negative: blurry}", {"sampler.guidance": 1.0}, "x.yaml:2 sampler.negative: no negative prompt is"),
        ("sampler: {rule: flow_grpo}", {"sampler.eta": 0.0}, "x.yaml:2 sampler.eta: rule: flow_grpo says how noise is"),
    ],
)
def test_what_clashes_with_the_models_own_values_is_a_fault_at_its_line(
    text: str, own: dict[str, Any], message: str
) -> None:
    assert not faults_in(text, known=METHODS)
    (fault,) = faults_in(text, known=METHODS, defaults=own)
    assert fault.startswith(message)


def test_an_eta_above_1_needs_the_rule_that_has_a_meaning_for_it() -> None:
    assert not faults_in("sampler: {eta: 1.5, rule: flow_grpo}")
    assert only_fault("sampler: {eta: 1.5}") == (
        "x.yaml:2 sampler.eta: rule: posterior takes an eta from 0 to 1, got 1.5; lower it, or write rule: flow_grpo "
        "for a flow model"
    )
    (fault,) = faults_in("sampler: {eta: {choice: [0.7, 1.5]}, rule: {choice: [flow_grpo, posterior]}}")
    assert fault.startswith("x.yaml:2 sampler.eta.choice[1]: rule: posterior takes")
    assert "sampler.eta: must be a number from 0 to 10, got 11" in only_fault("sampler: {eta: 11, rule: flow_grpo}")


def test_dora_reads_weights_that_are_not_packed() -> None:
    assert only_fault("model: {quantise: int8, lora: {dora: true}}") == (
        "x.yaml:2 model.lora.dora: DoRA reads the norms of weights, which model.quantise: int8 packs, got true; delete "
        "one of them"
    )


def test_an_experiment_has_the_models_own_values_only_where_it_says_nothing() -> None:
    own = {"sampler.steps": 4, "sampler.guidance": 1.0, "sampler.eta": 1.0}
    experiment = parse_experiment("rewards: {a: }\nsampler: {steps: 12, eta: null}", "x.yaml")
    assert experiment.shared.sampler.eta is None
    sampler = experiment.settled(own).shared.sampler
    assert (sampler.steps, sampler.guidance, sampler.eta, sampler.embedded_guidance) == (12, 1.0, 1.0, None)
    assert parse_experiment("rewards: {a: }\nsampler: ", "x.yaml").settled(own).shared.sampler.steps == 4
    searched = parse_experiment("rewards: {a: }\nsampler: {steps: {choice: [8, 2]}}", "x.yaml").settled(own)
    assert [searched.concrete({"sampler.steps": steps}).sampler.steps for steps in (8, 2)] == [8, 2]
    assert searched.shared.sampler.guidance == 1.0


def test_many_weights_that_may_be_zero_are_tried_quickly() -> None:
    names = [f"r{i}" for i in range(12)]  # 3^12 combinations, of which one breaks the rule
    rewards = "{" + ", ".join(f"{name}: {{weight: {{choice: [1, 0.5, 0]}}}}" for name in names) + "}"
    (fault,) = faults_in("seed: 1", rewards=rewards)
    assert "no reward has a positive weight" in fault
    assert not faults_in("seed: 1", rewards=rewards.replace("r11: {weight: {choice: [1, 0.5, 0]}}", "r11: {}"))


def test_more_combinations_than_can_be_tried_are_refused() -> None:
    options = ", ".join(str(i) for i in range(64, 87))
    text = f"sampler: {{steps: {{choice: [{options}]}}, base_steps: {{choice: [{options[:82]}]}}}}"
    text += f"\nestimator: {{k: {{choice: [{options}]}}}}"
    assert any("has 11109 combinations with" in fault for fault in faults_in(text))


def test_a_long_range_of_divisors_is_found_where_its_second_value_is_one() -> None:
    (fault,) = faults_in("optim: {batch: 100}\nprompts: {images_per_prompt: {int: [1, 100]}}")
    assert "must divide optim.batch, 100 images, got 3" in fault


def test_a_point_that_no_draw_would_come_to_is_tried_too() -> None:
    weights = "{a: {weight: {float: [0, 1]}}, b: {weight: {float: [0, 1]}}}"
    points = "search: {points: [{rewards.a.weight: 0}, {rewards.a.weight: 0, rewards.b.weight: 0}]}"
    (fault,) = faults_in(points, rewards=weights)
    assert fault.startswith("x.yaml:2 search.points[1]: no reward has a positive weight")


def test_a_fixed_value_can_break_an_option_of_a_distribution() -> None:
    (fault,) = faults_in("sampler: {steps: {choice: [30, 12, 20]}}\nestimator: {k: 20}")
    assert fault.startswith("x.yaml:2 sampler.steps.choice[1]: K must not exceed the 12 sampling steps")


def test_a_value_between_the_ends_is_tried() -> None:
    (fault,) = faults_in("optim: {batch: 8}\nprompts: {images_per_prompt: {int: [1, 4]}}")
    assert fault.startswith("x.yaml:3 prompts.images_per_prompt.int: must divide optim.batch, 8 images, got 3")


def test_a_long_range_that_is_not_all_multiples_is_found() -> None:
    (fault,) = faults_in("optim: {batch: {int: [2, 2000]}}\nprompts: {images_per_prompt: 2}")
    assert "must divide optim.batch, 3 images, got 2" in fault


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


def only_fault(text: str, *, rewards: str = "{a: {}}") -> str:
    (fault,) = faults_in(text, rewards=rewards, known=METHODS)
    return fault


OPAQUE = "backpropagates rewards, and 'opaque' has no gradient; give it weight 0 to watch it only, or take an estimator"
DETACHED = "serial mode needs detached inputs, which"


@pytest.mark.parametrize(
    ("text", "rewards", "fault"),
    [
        # a reward without gradient beside an estimator that needs one
        (
            "seed: 1",
            "{a: {}, opaque: {weight: {float: [0, 1]}}}",
            "1 rewards.opaque.weight.float[1]: alignprop " + OPAQUE,
        ),
        ("seed: 1", "{a: {}, opaque: {weight: {choice: [0, 2]}}}", "1 rewards.opaque.weight.choice[1]: alignprop "),
        (
            "sampler: {eta: 1}\nestimator: {name: {choice: [policy, cut]}}",
            "{a: {}, opaque: {}}",
            "3 estimator.name.choice[1]: cut " + OPAQUE,
        ),
        (
            "sampler: {eta: 1}\nestimator: {name: {choice: [cut, policy]}}",
            "{a: {}, opaque: {}}",
            "3 estimator.name.choice[0]: cut " + OPAQUE,
        ),
        (
            "sampler: {eta: 1}\nestimator: {name: {choice: [policy, cut]}}",
            "{a: {}, opaque: {weight: {choice: [0, 1]}}}",
            "1 rewards.opaque.weight.choice[1]: cut " + OPAQUE,
        ),
        (
            "sampler: {eta: 1}\nestimator: {name: {choice: [policy, cut]}}",
            "{a: {weight: {simplex: true}}, opaque: {weight: {simplex: true}}}",
            "3 estimator.name.choice[1]: cut " + OPAQUE,
        ),
        # a policy without noise
        (
            "estimator: {name: policy}\nsampler: {eta: {float: [0, 1]}}",
            "{a: {}}",
            "3 sampler.eta.float[0]: policy learns",
        ),
        (
            "sampler: {eta: 0}\nestimator: {name: {choice: [cut, policy]}}",
            "{a: {}}",
            "3 estimator.name.choice[1]: policy learns from the noise of sampling, got eta 0; write eta: 1.0",
        ),
        (
            "estimator: {name: {choice: [cut, policy]}}\nsampler: {eta: {choice: [1, 0]}}",
            "{a: {}}",
            "3 sampler.eta.choice[1]: policy learns from the noise of sampling, got eta 0",
        ),
        # memory of one step, where steps hang together
        ("estimator: {name: alignprop, checkpoint: {choice: [auto, serial]}}", "{a: {}}", "choice[1]: " + DETACHED),
        (
            "estimator: {checkpoint: serial, name: {choice: [cut, alignprop]}}",
            "{a: {}}",
            "2 estimator.name.choice[1]: serial mode needs detached inputs, which alignprop has not",
        ),
        # nothing to be flat in
        (
            "estimator: {name: policy}\nsampler: {eta: 1}\nregularize: {flatness_image: {choice: [0, 0.5]}}",
            "{a: {}}",
            "4 regularize.flatness_image.choice[1]: policy has no gradient of the reward to be flat in, got 0.5",
        ),
        (
            "sampler: {eta: 1}\nestimator: {name: {choice: [cut, policy]}}\nregularize: {flatness_weights: 0.1}",
            "{a: {}}",
            "3 estimator.name.choice[1]: policy has no gradient of the reward to be flat in, got 0.1",
        ),
        # what a score is aimed at
        (
            "seed: 1",
            "{a: {loss: {choice: [linear, hinge]}, target: 2}}",
            "1 rewards.a.loss.choice[0]: a linear loss has no",
        ),
        ("seed: 1", "{a: {loss: {choice: [linear, hinge]}}}", "1 rewards.a.loss.choice[1]: loss: hinge needs a target"),
        ("seed: 1", "{a: {target: {choice: [2]}}}", "1 rewards.a.target.choice[0]: a linear loss has no target, got 2"),
        # steps and images
        (
            "sampler: {steps: 12, base_steps: {int: [0, 12]}}",
            "{a: {}}",
            "2 sampler.base_steps.int[1]: must leave at least",
        ),
        (
            "sampler: {steps: 12, base_steps: {choice: [0, 4]}}\nestimator: {k: {int: [1, 9]}}",
            "{a: {}}",
            "3 estimator.k.int[1]: K must not exceed the 12 sampling steps (sampler.steps) minus 4 base steps, got 9",
        ),
        (
            "prompts: {images_per_prompt: {choice: [1, 4]}}\noptim: {batch: {choice: [8, 6]}}",
            "{a: {}}",
            "2 prompts.images_per_prompt.choice[1]: must divide optim.batch, 6 images, got 4",
        ),
        (
            "prompts: {images_per_prompt: {int: [1, 4]}}",
            "{a: {}}",
            "2 prompts.images_per_prompt.int: must divide optim.batch, 8 images, got 3",
        ),
    ],
)
def test_the_end_of_a_distribution_that_a_method_does_not_bear_is_named(text: str, rewards: str, fault: str) -> None:
    assert fault in only_fault(text, rewards=rewards)


@pytest.mark.parametrize(
    ("text", "rewards"),
    [
        ("estimator: {name: policy}\nsampler: {eta: {float: [0.1, 1]}}", "{a: {}, opaque: {}}"),
        ("estimator: {name: {choice: [alignprop, policy]}}\nsampler: {eta: 1}", "{a: {}, opaque: {weight: 0}}"),
        ("estimator: {name: cut, checkpoint: {choice: [auto, always, never, serial]}}", "{a: {}}"),
        ("estimator: {name: policy}\nsampler: {eta: 1}\nregularize: {drift: {float: [0, 1]}}", "{a: {}}"),
        ("seed: 1", "{a: {loss: {choice: [hinge, target]}, target: {float: [5, 7]}}}"),
    ],
)
def test_a_space_that_its_methods_bear_is_valid(text: str, rewards: str) -> None:
    assert not faults_in(text, rewards=rewards, known=METHODS)


def test_weights_on_the_simplex_are_positive_for_a_reward_without_gradient_too() -> None:
    simplex = "{a: {weight: {simplex: true}}, opaque: {weight: {simplex: true}}}"
    assert OPAQUE in only_fault("seed: 1", rewards=simplex)
    assert not faults_in("estimator: {name: policy}\nsampler: {eta: 1}", rewards=simplex, known=METHODS)
