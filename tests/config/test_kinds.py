"""Kinds of adapters are searched like any setting, and what each of them does not go with is said."""

from typing import Any

import pytest

from rltune.config.load import Experiment, parse_experiment
from rltune.config.rules import Known
from rltune.errors import ExperimentError
from rltune.runs.record import settings_of

KNOWN = Known(adapters=("basis", "conditioning", "lora", "prompt"), policy_estimators=("ddpo",))
LORA, PROMPT = {"model.adapter.kind": "lora"}, {"model.adapter.kind": "prompt"}
TEMPLATE = "{prompt}, {light}"


def asked(kinds: tuple[str, ...] = ("lora", "prompt"), model: dict[str, Any] | None = None, **more: Any) -> Experiment:
    given = {
        "adapter": {"kind": {"choice": list(kinds)}},
        "lora": {"rank": {"choice": [2, 16], "when": LORA}},
        "prompt": {"template": TEMPLATE, "words": {"light": {"choice": ["dim", "warm"], "when": PROMPT}}},
    }
    raw = {"model": {**given, **(model or {})}, "rewards": {"aesthetic": {}, "alignment": {}}, **more}
    return parse_experiment(raw, "x.yaml", known=KNOWN)


def faults(*arguments: Any, **more: Any) -> list[str]:
    with pytest.raises(ExperimentError) as error:
        asked(*arguments, **more)
    return [str(fault) for fault in error.value.faults]


def test_what_belongs_to_a_kind_is_searched_with_it() -> None:
    experiment = asked()
    assert [kind.model.adapter.kind for kind in experiment.kinds] == ["lora", "prompt"]
    assert [kind.num_rounds for kind in experiment.kinds] == [100, 0]
    words = {"model.adapter.kind": "prompt", "model.prompt.words.light": "warm"}
    assert experiment.active_paths({"model.adapter.kind": "prompt"}) == set(words)
    assert experiment.concrete(words).model.lora.rank == 4  # its default
    lora = experiment.concrete({"model.adapter.kind": "lora", "model.lora.rank": 16})
    assert lora.model.prompt.words == {}
    assert [one.model.adapter.kind for one in parse_experiment({"rewards": {"aesthetic": {}}}).kinds] == ["lora"]


@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        (
            {"lora": {"rank": {"choice": [4, 16]}}},
            {},
            "model.lora.rank: model.adapter.kind 'prompt' does not read it, for which it is searched too; add when: "
            "{model.adapter.kind: lora}",
        ),
        (
            {"prompt": {"template": TEMPLATE, "words": {"light": {"choice": ["dim", ""]}}}},
            {},
            "model.prompt.words.light: model.adapter.kind 'lora' does not read it, for which it is searched too; add "
            "when: {model.adapter.kind: prompt}",
        ),
        (
            {},
            {"optim": {"lr": {"log_float": [1e-4, 1e-2], "when": {"model.adapter.kind": ["lora", "prompt"]}}}},
            "optim.lr: model.adapter.kind 'prompt' does not read it, for which it is searched too; add when: "
            "{model.adapter.kind: lora}",
        ),
        (
            {},
            {"sampler": {"base_steps": {"choice": [0, 2]}}},
            "sampler.base_steps.choice[1]: words are for all steps where model.adapter.kind is prompt, got "
            "sampler.base_steps 2; delete sampler.base_steps",
        ),
        (
            {"prompt": {"template": {"choice": [TEMPLATE, "{prompt}"], "when": PROMPT}, "words": {"light": "dim"}}},
            {},
            "model.prompt.template.choice[1]: stands nowhere in model.prompt.template, '{prompt}', got 'dim'; write "
            "{light} there, or delete it",
        ),
    ],
)
def test_what_one_of_the_kinds_does_not_go_with_is_said(model: dict[str, Any], more: dict[str, Any], said: str) -> None:
    (fault,) = faults(("lora", "prompt"), model, **more)
    assert said in fault


def test_what_is_fixed_for_one_kind_is_left_out_of_the_others() -> None:
    fixed = {"rank": {"choice": [2, 16], "when": LORA}, "alpha": 8, "targets": ["to_q"]}
    experiment = asked(
        ("prompt", "lora", "conditioning"), {"lora": fixed, "conditioning": {"styled": "{prompt}, vivid"}}
    )
    prompt, lora, conditioning = experiment.kinds
    assert (lora.model.lora.alpha, lora.model.lora.targets) == (8, ("to_q",))
    assert prompt.model.lora == conditioning.model.lora == experiment.shared.model.lora == type(lora.model.lora)()
    assert experiment.lora == lora.model.lora
    assert settings_of(experiment)["model"]["lora"]["targets"] == ["to_q"]
    assert settings_of(experiment)["model"]["prompt"]["template"] == TEMPLATE


def test_conditions_of_conditions_are_followed() -> None:
    chained = {
        "light": {"choice": ["dim", "warm"], "when": PROMPT},
        "hue": {"choice": ["red", "blue"], "when": {"model.prompt.words.light": "dim"}},
    }
    experiment = asked(model={"prompt": {"template": "{prompt}, {light}{hue}", "words": chained | {"hue": "x"}}})
    assert experiment.kinds
    with pytest.raises(ExperimentError) as error:
        asked(model={"prompt": {"template": "{prompt}, {light}{hue}", "words": chained}})
    (fault,) = map(str, error.value.faults)  # where it is bright there is no hue, which the template names
    assert "names hue, for which model.prompt.words has nothing" in fault


@pytest.mark.parametrize("kinds", [("prompt", "lora"), ("lora", "prompt")])
def test_loras_beside_words_may_be_stopped_early(kinds: tuple[str, ...]) -> None:
    experiment = asked(kinds, search={"prune": True})
    assert {kind.num_rounds for kind in experiment.kinds} == {0, 100}
    (fault,) = faults(kinds, search={"prune": True}, evaluate={"every": 100})
    assert fault.startswith(f"model.adapter.kind.choice[{kinds.index('lora')}]: a trial has ended at step 100, before")
    assert fault.endswith("got evaluate.every 100; lower evaluate.every, or set search.prune: false")


def test_a_kind_of_one_s_own_is_taken_to_read_everything() -> None:
    raw = {"adapter": {"kind": {"choice": ["lora", "mine"]}}, "lora": {"rank": {"choice": [2, 16]}}}
    experiment = parse_experiment({"model": raw, "rewards": {"aesthetic": {}}})
    assert experiment.concrete({"model.adapter.kind": "mine", "model.lora.rank": 16}).model.lora.rank == 16


def test_a_basis_among_them_needs_what_a_basis_needs() -> None:
    (fault,) = faults(
        ("lora", "basis"), {"prompt": {}}, estimator={"name": {"choice": ["alignprop", "ddpo"]}}, sampler={"eta": 1.0}
    )
    assert (
        "model.adapter.kind.choice[1]: a basis weighs the rewards of every image in a gradient, which ddpo does"
        in fault
    )
    rewards = {"aesthetic": {}, "alignment": {"weight": {"choice": [1.0, 0.0]}}}
    (fault,) = faults(("lora", "basis"), {"prompt": {}, "lora": {}}, rewards=rewards)
    assert "has a LoRA for each reward of positive weight, and aesthetic is the only one, got basis" in fault
    assert asked(("lora", "basis"), {"prompt": {}, "lora": {}}).kinds[1].lora_rank == 8


def test_an_unknown_kind_among_them_is_named() -> None:
    (fault,) = faults(("lora", "loar", "prompt"))
    assert "model.adapter.kind.choice[1]: unknown adapter, got 'loar'; did you mean 'lora'?" in fault
