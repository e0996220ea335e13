"""Kinds of adapters are searched like any setting, and what each of them does not go with is said."""

from typing import Any

import pytest

from rltune.config.load import Experiment, parse_experiment
from rltune.config.rules import Known
from rltune.errors import ExperimentError

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
            {"lora": {"alpha": 8}},
            {},
            "model.adapter.kind.choice[1]: no LoRA is trained where model.adapter.kind is prompt, got model.lora.alpha "
            "8.0; delete model.lora.alpha, or in a search over kinds give it a distribution with when: "
            "{model.adapter.kind: lora}",
        ),
        (
            {"lora": {"rank": {"choice": [4, 16]}}},  # 4 is what it is anyway
            {},
            "model.lora.rank.choice[1]: no LoRA is trained where model.adapter.kind is prompt, got model.lora.rank "
            "16; delete model.lora.rank, or in a search over kinds give it a distribution with when: "
            "{model.adapter.kind: lora}",
        ),
        (
            {},
            {"sampler": {"base_steps": {"choice": [0, 2]}}},
            "sampler.base_steps.choice[1]: words are for all steps where model.adapter.kind is prompt, got "
            "sampler.base_steps 2; delete sampler.base_steps",
        ),
        (
            {"prompt": {"template": {"choice": [TEMPLATE, "{prompt}"]}, "words": {"light": "dim"}}},
            {},
            "model.adapter.kind.choice[1]: stands nowhere in model.prompt.template, '{prompt}', got 'dim'; write "
            "{light} there, or delete it",
        ),
    ],
)
def test_what_one_of_the_kinds_does_not_go_with_is_said(model: dict[str, Any], more: dict[str, Any], said: str) -> None:
    (fault,) = faults(("lora", "prompt"), model, **more)
    assert said in fault


def test_a_basis_among_them_needs_what_a_basis_needs() -> None:
    (fault,) = faults(
        ("lora", "basis"), {"prompt": {}}, estimator={"name": {"choice": ["alignprop", "ddpo"]}}, sampler={"eta": 1.0}
    )
    assert (
        "model.adapter.kind.choice[1]: a basis weighs the rewards of every image in a gradient, which ddpo does"
        in fault
    )
    rewards = {"aesthetic": {}, "alignment": {"weight": {"choice": [1.0, 0.0]}}}
    (fault,) = faults(("lora", "basis"), {"prompt": {}}, rewards=rewards)
    assert "has a LoRA for each reward of positive weight, and aesthetic is the only one, got basis" in fault
    assert asked(("lora", "basis"), {"prompt": {}}).kinds[1].lora_rank == 8


def test_an_unknown_kind_among_them_is_named() -> None:
    (fault,) = faults(("lora", "loar", "prompt"))
    assert "model.adapter.kind.choice[1]: unknown adapter, got 'loar'; did you mean 'lora'?" in fault
