"""What every registered estimator must do, whatever its gradient is; a new one joins by its name."""

import copy
import math
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import Annotated, Any, get_type_hints

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rltune.config.options import node_of, options_section
from rltune.config.words import is_leaf
from rltune.estimators.base import ESTIMATORS, Estimator, Regularisers, Round, Stateful, Tally, check_settings
from rltune.registry import Within
from rltune.rewards.base import REWARDS
from rltune.rewards.mixture import Calibration, Mixture, MixtureScore
from tests.toys import (
    Recorder,
    ToyMixture,
    gradients_of,
    make_round,
    on_workers,
    perceptron_toy,
)

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "alignprop": [{"draw": "fixed", "k": 2}, {"draw": "gaussian"}, {"draw": "per_step"}],
    "dag": [{"epochs": 2, "anneal": 4, "fraction": 0.5}],
    "ddpo": [{"epochs": 2, "clip": 1e-3, "fraction": 0.5}],
    "dpok": [{"epochs": 2, "value_batch": 5, "fraction": 0.5}],
    "draft": [{"k": 3}],
    "draft_lv": [{"n": 1}],
    "drtune": [{"k": 2, "early_stop": 0.0}],
    "refl": [{"window": 1.0}],
}
"""Settings besides the defaults that run other code."""
CASES = [
    pytest.param(name, options, id="-".join([name, *(f"{key}={value}" for key, value in options.items())]))
    for name in ESTIMATORS.names()
    for options in ({}, *VARIANTS.get(name, ()))
]
SERIAL_CASES = [case for case in CASES if ESTIMATORS.get(str(case.values[0])).has_serial_mode]  # type: ignore[attr-defined]
NUMBERS = [
    (name, setting.name, kind)
    for name in ESTIMATORS.names()
    for setting in fields(ESTIMATORS.get(name))  # type: ignore[arg-type]
    if (kind := get_type_hints(ESTIMATORS.get(name))[setting.name]) in (int, float, int | None)  # without their bounds
]

every_case = pytest.mark.parametrize(("name", "options"), CASES)
both_precisions = pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float64, id="float64"), pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.long)],
)
"""Of the frozen network; around bfloat16, latents, adapters and their gradient are float32, as on a GPU by default."""


def build(name: str, options: dict[str, Any]) -> Estimator:
    return ESTIMATORS.build(name, options)


def hard_mode(estimator: Estimator) -> dict[str, Any]:
    """Return settings that bring in guidance, noise and every regulariser the estimator has."""
    flatness = {"flatness_weights": 0.1, "flatness_image": 0.05} if estimator.needs_gradient else {}
    return {"guidance": 2.0, "eta": 1.0, "lr": 0.01, "regularisers": Regularisers(drift=0.3, **flatness)}


def assert_all_close(gradients: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    assert len(gradients) == len(expected) > 0
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=rtol, atol=rtol * float(other.norm()))


def rtol_of(estimator: Estimator, dtype: torch.dtype = torch.float64) -> float:
    # a float64 chain differs by the order of additions; what an estimator learns besides is float32
    if dtype == torch.bfloat16:
        return 2**-7  # a kernel may round a row another way in another batch, by one in the last of 8 bits
    return 1e-5 if isinstance(estimator, Stateful) else 1e-11


@every_case
def test_settings_are_frozen_and_fit_a_chain_of_50(name: str, options: dict[str, Any]) -> None:
    estimator = build(name, options)
    estimator.check(50)
    assert isinstance(estimator.needs_gradient, bool)
    assert isinstance(estimator.has_serial_mode, bool)
    assert estimator == build(name, options)
    for setting in fields(estimator):  # type: ignore[arg-type]
        with pytest.raises(FrozenInstanceError):
            setattr(estimator, setting.name, None)


@pytest.mark.parametrize("value", [-1, math.nan])
@pytest.mark.parametrize(
    ("name", "setting"),
    [number[:2] for number in NUMBERS],
)
def test_a_setting_out_of_range_is_refused_by_name(name: str, setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{setting} must .*got {value}"):
        build(name, {setting: value}).check(50)


@pytest.mark.parametrize(("name", "setting"), [number[:2] for number in NUMBERS if number[2] is not float])
def test_a_count_that_is_no_whole_number_is_refused_by_name(name: str, setting: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"{setting} must "):
        build(name, {setting: 20.5}).check(50)


@both_precisions
@every_case
def test_it_updates_and_leaves_nothing_behind(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """All but the optimiser's step: weights, flags and gradients are as they were."""
    estimator, toy = build(name, options), perceptron_toy(dtype)
    before = copy.deepcopy(toy.network.state_dict())
    trainable = [parameter.requires_grad for parameter in toy.network.parameters()]
    round = make_round(toy, estimator, **hard_mode(estimator) | {"lr": 0.0})
    gradients = gradients_of(estimator, round)
    assert len(gradients) == getattr(estimator, "epochs", 1)
    assert all(bool(gradient.isfinite().all()) and float(gradient.norm()) > 0 for gradient in gradients)
    assert isinstance(round.update, Recorder)
    assert not round.update.may_vanish[0]
    for key, value in toy.network.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert [parameter.requires_grad for parameter in toy.network.parameters()] == trainable
    assert all(parameter.grad is None for parameter in toy.network.parameters())
    assert not any(module._disable_adapters for module in toy.network.modules() if isinstance(module, LoraLayer))
    assert torch.is_grad_enabled()


@both_precisions
@every_case
def test_the_round_s_generator_is_all_its_randomness(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    estimator, toy = build(name, options), perceptron_toy(dtype)
    runs = []
    for seed in (1, 2):
        own = copy.deepcopy(toy)
        round = make_round(own, estimator, **hard_mode(estimator))
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        runs.append(gradients_of(estimator, round))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@every_case
def test_float32_gives_the_same_gradient(name: str, options: dict[str, Any]) -> None:
    """The first update's: the second is taken from where that one led."""
    estimator = build(name, options)
    single, double = (
        gradients_of(estimator, make_round(perceptron_toy(dtype), estimator, **hard_mode(estimator)))[0]
        for dtype in (torch.float32, torch.float64)
    )
    assert single.dtype == torch.float32
    # 24 bits through four steps; advantages divide by the spread of the rewards, which is a tenth of their size
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4 * float(double.norm()))


@every_case
def test_bfloat16_gives_nearly_the_same_gradient(name: str, options: dict[str, Any]) -> None:
    """Of the same weights, which bfloat16 holds: what differs is how the network rounds, not what is estimated."""
    estimator, rough, exact = build(name, options), perceptron_toy(torch.bfloat16), perceptron_toy()
    exact.network.load_state_dict({key: value.double() for key, value in rough.network.state_dict().items()})
    rounded, expected = (
        gradients_of(estimator, make_round(toy, estimator, **hard_mode(estimator)))[0] for toy in (rough, exact)
    )
    assert rounded.dtype == torch.float32
    # four steps of three roundings forward and three back, 2^-9 each, if all went one way
    assert float((rounded.double() - expected).norm()) < 24 * 2**-9 * float(expected.norm())


@both_precisions
@every_case
def test_micro_batches_add_up_to_the_whole(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    estimator, toy = build(name, options), perceptron_toy(dtype)
    runs = []
    for size in (6, 4):
        round = make_round(copy.deepcopy(toy), estimator, num_images=6, micro_batch=size, **hard_mode(estimator))
        runs.append((gradients_of(estimator, round), round.tally))
    whole, tally = runs[0]
    for parts, other in runs[1:]:
        assert_all_close(parts, whole, rtol_of(estimator, dtype))
        rtol = 1e-12 if dtype == torch.float64 else 2**-7
        torch.testing.assert_close(other.totals, tally.totals, rtol=rtol, atol=0)
        assert (other.num_queries, other.num_calls, other.num_active) == (
            tally.num_queries,
            tally.num_calls,
            tally.num_active,
        )


@pytest.mark.slow
@both_precisions
@every_case
def test_workers_add_up_to_one(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Each holds its share of the images; collectives are joined by all or the barrier breaks."""
    estimator, toy = build(name, options), perceptron_toy(dtype)
    settings = hard_mode(estimator) | {"num_images": 6}
    alone = copy.deepcopy(toy)
    round = make_round(alone, estimator, micro_batch=3, **settings)
    whole = gradients_of(estimator, round)
    workers = on_workers(3, toy, estimator, micro_batch=1, **settings)
    for own, part in workers:
        assert isinstance(part.update, Recorder)
        assert_all_close(part.update.gradients, whole, rtol_of(estimator, dtype))
        for parameter, first in zip(own.parameters, workers[0][0].parameters, strict=True):
            assert torch.equal(parameter, first)  # or they would drift apart from round to round
        assert_same_state(part, workers[0][1])
    tallies = [part.tally for _, part in workers]
    torch.testing.assert_close(
        sum(tally.totals for tally in tallies), round.tally.totals, rtol=rtol_of(estimator, dtype), atol=0
    )
    assert sum(tally.num_queries for tally in tallies) == round.tally.num_queries
    assert sum(tally.num_calls for tally in tallies) == round.tally.num_calls


def assert_same_state(round: Round, other: Round) -> None:
    if round.state is None or other.state is None:
        assert round.state is other.state
        return
    torch.testing.assert_close(dict(round.state.state_dict()), dict(other.state.state_dict()), rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_case
def test_gradient_is_finite_over_50_steps(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """As a run has it: adapters in float32, guidance, a real mixture."""
    estimator, toy = build(name, options), perceptron_toy(dtype)
    rewards = {name: REWARDS.build(name, {}) for name in ("brightness", "smoothness")}
    calibration = {name: Calibration(0.0, 0.1) for name in rewards}
    mixture = Mixture(rewards, dict.fromkeys(rewards, 1.0), calibration)
    round = make_round(toy, estimator, num_steps=50, guidance=5.0, mixture=mixture)
    for gradient in gradients_of(estimator, round):
        assert gradient.dtype == torch.float32
        assert bool(gradient.isfinite().all())
        assert float(gradient.norm()) > 0


@every_case
@pytest.mark.parametrize(
    ("num_kept", "guidance", "regularisers"),
    [(0, 2.0, Regularisers()), (1, 2.0, Regularisers(0.3, 0.1, 0.1)), (9, 0.0, Regularisers(flatness_weights=0.1))],
    ids=["plain", "regularised", "kept"],
)
def test_tally_is_what_network_and_reward_saw(
    name: str, options: dict[str, Any], num_kept: int, guidance: float, regularisers: Regularisers
) -> None:
    estimator = build(name, options)
    if not estimator.needs_gradient:
        regularisers = replace(regularisers, flatness_weights=0, flatness_image=0)
    for is_serial in (False, True) if estimator.has_serial_mode else (False,):
        toy, mixture = perceptron_toy(), ToyMixture()
        round = make_round(
            toy,
            estimator,
            guidance=guidance,
            micro_batch=3,
            regularisers=regularisers,
            is_serial=is_serial,
            num_kept=num_kept,
        )
        tally = CountingTally(round.tally.names)
        round = replace(round, mixture=mixture, tally=tally)  # type: ignore[arg-type]
        estimator.train(round)
        assert tally.num_queries == mixture.num_scored
        assert tally.num_calls * (2 if guidance > 1 else 1) == toy.num_rows
        assert tally.num_noted == round.num_images  # not the copies, and not what is looked at twice
        assert tally.totals[0] == tally.totals[1] == tally.totals[2] != 0
        active = {call.t for call in toy.calls if call.has_grad}
        assert tally.num_active == len(active) > 0


class CountingTally(Tally):
    num_noted = 0

    def add(self, score: MixtureScore) -> None:
        super().add(score)
        self.num_noted += len(score.total_B) if self.is_noting else 0


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_an_experiment_file_knows_every_option_with_its_text_and_bounds(name: str) -> None:
    options = ESTIMATORS.options(name)
    section = options_section(name, options)
    nodes = node_of(section).get("properties", {})
    assert [option.name for option in options if not option.text] == []
    assert [
        key for key, node in nodes.items() if not is_leaf(node) or ("anyOf" not in node and "type" not in node)
    ] == []
    assert ESTIMATORS.build(name, section().model_dump(by_alias=True)) == ESTIMATORS.build(name, {})  # its defaults fit
    for key, node in nodes.items():
        number = next((branch for branch in node.get("anyOf", (node,)) if "minimum" in branch), None)
        assert (number is None) == (node.get("type") == "string")  # every number has bounds
        if number is None:
            continue
        section.model_validate({key: number["minimum"]})
        section.model_validate({key: number["maximum"]})
        for value in (number["minimum"] - 1, number["maximum"] + 1):
            with pytest.raises(ValueError, match=key):
                section.model_validate({key: value})
            with pytest.raises(ValueError, match=f"{key} must be in "):
                ESTIMATORS.build(name, {key: value}).check(50)


def test_a_setting_that_may_be_left_out_has_bounds_where_it_is_given() -> None:
    @dataclass(frozen=True)
    class Settings:
        depth: Annotated[int, Within(1, 5)] | None = None

    check_settings(Settings())
    check_settings(Settings(5))
    for value, message in ((6, r"depth must be in \[1, 5\], got 6"), (2.0, "depth must be a whole number, got 2.0")):
        with pytest.raises(ValueError, match=message):
            check_settings(Settings(value))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ESTIMATORS.names())
def test_tally_counts_the_base_model_s_steps(name: str) -> None:
    estimator, toy = build(name, {}), perceptron_toy()
    round = make_round(toy, estimator, num_steps=6, num_base_steps=2)
    estimator.train(round)
    assert round.tally.num_calls == toy.num_rows


@every_case
def test_the_base_model_s_steps_are_left_alone(name: str, options: dict[str, Any]) -> None:
    estimator, toy = build(name, options), perceptron_toy()
    round = make_round(toy, estimator, num_steps=6, num_base_steps=2)
    estimator.train(round)
    early = round.sampler.table.timesteps_T[:2].tolist()
    assert {call.t for call in toy.calls if call.t in early} == set(early)
    assert not any(call.has_grad for call in toy.calls if call.t in early)


@both_precisions
@pytest.mark.parametrize(("name", "options"), SERIAL_CASES)
def test_serial_mode_gives_the_same_gradient(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    estimator, toy = build(name, options), perceptron_toy(dtype)
    joint, serial = (
        gradients_of(estimator, make_round(copy.deepcopy(toy), estimator, is_serial=flag, **hard_mode(estimator)))
        for flag in (False, True)
    )
    assert_all_close(serial, joint, 1e-11 if dtype == torch.float64 else 2**-7)


@both_precisions
@every_case
def test_keeping_activations_changes_no_bit(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    estimator, toy = build(name, options), perceptron_toy(dtype)
    runs = []
    for num_kept, is_decoder_kept in ((0, False), (1, True), (9, True)):
        room = {"num_kept": num_kept, "is_decoder_kept": is_decoder_kept}
        runs.append(gradients_of(estimator, make_round(copy.deepcopy(toy), estimator, **room, **hard_mode(estimator))))
    for run in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(run, runs[0], strict=True))
