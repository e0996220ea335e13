"""Numbers that mix prompts in training: what is lost by a kill or two workers, what is refused, what is checked."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rltune.config.distributions import Choice
from rltune.config.experiment import RunConfig
from rltune.config.load import parse_experiment
from rltune.diffusion.chain import NO_GRADIENT
from rltune.diffusion.conditioning import attached_mix
from rltune.errors import UserError
from rltune.training.adapters.base import adapter_of
from rltune.training.setup import build_run
from tests.tiny_families import PIPELINES, family_of, made
from tests.training.runs import Make, adapters, metrics, train, train_in_processes

STYLED = "{prompt}, in warm light"
MIX: dict[str, Any] = {"adapter": {"kind": "conditioning"}, "lora": {}, "conditioning": {"styled": STYLED}}
RESULTS = ("train/reward", "train/brightness", "train/smoothness", "grad_norm", "queries", "calls")
ALL = {"name": "alignprop", "k": 4, "draw": "fixed"}
"""Of all four steps."""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("estimator", "eta"),
    [
        ({"name": "alignprop"}, 0.0),
        *(pytest.param({"name": name}, 0.0, marks=pytest.mark.long) for name in ("draft_lv", "drtune", "refl")),
        *(pytest.param({"name": name}, 1.0, marks=pytest.mark.long) for name in ("ddpo", "dpok")),
    ],
)
def test_killed_numbers_go_on_bitwise(
    make_config: Make, tmp_path: Path, precision: str, estimator: dict[str, Any], eta: float
) -> None:
    alone = {"k": None, "draw": None, **estimator}
    sections = {"resources": {"precision": precision}, "sampler": {"eta": eta}, "optim": {"lr": 0.05}}
    config = make_config(model=MIX, estimator=alone, **sections)
    whole = train(config, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000002"
    torch.manual_seed(99)
    resumed = train(config, tmp_path / "half", base_dir=tmp_path / "whole" / "base", resume_from=checkpoint)
    assert resumed.reports[-1] == whole.reports[-1]
    first, second = adapters(tmp_path / "whole", 4), adapters(tmp_path / "half", 4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name: (len(tensor), tensor.dtype) for name, tensor in first.items()} == {
        "lambda_T": (4, torch.float32),
        "timesteps_T": (4, torch.float64),
    }
    assert first["lambda_T"].any()


@pytest.mark.long
def test_two_workers_train_what_one_trains(make_config: Make, tmp_path: Path) -> None:
    config = make_config(model=MIX, estimator=ALL, optim={"steps": 2, "lr": 0.05}, evaluate={"every": 2})
    train(config, tmp_path / "alone" / "run", base_dir=tmp_path / "alone" / "base")
    train_in_processes({"run": config}, tmp_path / "two", 2)
    alone, two = (adapters(tmp_path / at / "run", 2) for at in ("alone", "two"))
    torch.testing.assert_close(two["lambda_T"], alone["lambda_T"], rtol=1e-3, atol=1e-5)  # sums in another order
    for one, other in zip(metrics(tmp_path / "alone" / "run"), metrics(tmp_path / "two" / "run"), strict=True):
        assert {name: other[name] for name in RESULTS} == pytest.approx({name: one[name] for name in RESULTS}, rel=1e-4)


@pytest.mark.slow
def test_training_raises_the_reward_and_leaves_the_base_models_steps_at_zero(make_config: Make, tmp_path: Path) -> None:
    config = make_config(
        model=MIX,
        sampler={"base_steps": 2},
        estimator={"k": 2, "draw": "fixed"},
        rewards={"brightness": {}},
        optim={"lr": 1.0, "steps": 6},
        evaluate={"every": 6},
    )
    reports = train(config, tmp_path).reports
    assert reports[-1]["gain/brightness"] > 0
    lambda_T = adapters(tmp_path, 6)["lambda_T"]
    assert lambda_T[:2].tolist() == [0, 0]
    assert lambda_T[2:].all()


@pytest.mark.slow
def test_activations_that_are_kept_or_computed_again_train_the_same_numbers(make_config: Make, tmp_path: Path) -> None:
    ends = []
    for mode in ("never", "always"):
        config = make_config(
            model=MIX, estimator={**ALL, "checkpoint": mode}, optim={"steps": 1}, evaluate={"every": 1}
        )
        train(config, tmp_path / mode, base_dir=tmp_path / "base")
        ends.append(adapters(tmp_path / mode, 1)["lambda_T"])
    assert torch.equal(*ends)


@pytest.mark.slow
def test_styled_prompts_are_embedded_with_the_prompts_and_apart_from_them(make_config: Make) -> None:
    run, plain = build_run(make_config(model=MIX)), build_run(make_config())
    prompts = [*run.train_prompts, *run.eval_images.prompts]
    for one, other in zip(run.sampler.embeddings.rows(prompts), plain.sampler.embeddings.rows(prompts), strict=True):
        assert torch.equal(one["text"], other["text"])
    groups = run.sampler.embeddings._groups
    assert groups == [(*prompts, ""), tuple(STYLED.replace("{prompt}", prompt) for prompt in prompts)]


@pytest.mark.slow
def test_what_was_trained_is_drawn_with_in_other_numbers_of_steps(make_config: Make) -> None:
    run = build_run(make_config(model=MIX))
    run.adapter.start(run.model, seed=0)
    with torch.no_grad():
        run.adapter.parameters(run.model.network)[0].copy_(torch.tensor([0.5, 0.5, 0.5, 0.5]))
    state = run.adapter.state(run.model.network)
    longer = build_run(make_config(model=MIX, sampler={"steps": 6}))
    longer.adapter.restore(longer.model, state)
    mix = attached_mix(longer.model.network)
    assert mix is not None
    assert [float(mix.at(t).detach()) for t in longer.sampler.table.timesteps_T] == [0.5] * 6
    x = torch.randn(1, *longer.latent_shape, generator=torch.Generator().manual_seed(1))
    assert longer.sampler.latents(["a cat"], x, plan=NO_GRADIENT, noise=None).isfinite().all()
    fresh = build_run(longer.config)
    fresh.adapter.start(fresh.model, seed=0)
    with pytest.raises(ValueError, match="numbers of other timesteps"):
        fresh.adapter.load_state(fresh.model.network, state)


def test_a_family_whose_prompts_cannot_be_mixed_is_refused_before_anything_starts() -> None:
    config = RunConfig.model_validate({"model": MIX, "rewards": {"brightness": {}}})
    adapter_of(config).check(family_of(made(PIPELINES["stable_diffusion"])))
    with pytest.raises(UserError, match=r"prompts of Lumina2Pipeline .* got conditioning; take lora, or a .* Aura"):
        adapter_of(config).check(family_of(made(PIPELINES["lumina2"])))


@pytest.mark.parametrize(
    ("styled", "is_right"),
    [
        ("in warm light", False),
        ("{prompt}", False),
        (" {prompt} ", False),
        ("{prompt}, {prompt}", False),
        ("{promt}, vivid", False),
        ("vivid {prompt}", True),
        ("{prompt} {in braces}", True),
    ],
)
def test_the_template_holds_the_prompt_once(styled: str, is_right: bool) -> None:
    sections = {"model": {**MIX, "conditioning": {"styled": styled}}, "rewards": {"brightness": {}}}
    if is_right:
        RunConfig.model_validate(sections)
        return
    with pytest.raises(ValueError, match=r"model\.conditioning\.styled: must hold \{prompt\} once.*, got ") as caught:
        RunConfig.model_validate(sections)
    assert repr(styled) in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"lora": {"dora": True}},
            r"model\.lora\.dora: no LoRA is trained .* got True; delete it",
        ),
        ({"lora": {"rank": 8}}, r"model\.lora\.rank: no LoRA is trained .* got 8; delete it"),
        (
            {"lora": {"start": "other"}},
            r"model\.lora\.start: no LoRA is trained .* got 'other'; delete it",
        ),
    ],
)
def test_settings_of_loras_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate({"model": {**MIX, **changed}, "rewards": {"brightness": {}}})


def test_soups_are_refused() -> None:
    sections = {"model": MIX, "rewards": {"brightness": {}}, "sweep": {"soup": True}}
    with pytest.raises(ValueError, match=r"sweep\.soup: soups are sums of LoRAs, and none is trained"):
        RunConfig.model_validate(sections)


@pytest.mark.parametrize("section", [{"sampler": {"attention": {"strength": 0.5}}}, {"regularize": {"attention": 0.1}}])
def test_words_before_the_prompt_are_refused_where_its_words_are_looked_for(section: dict[str, Any]) -> None:
    def made_with(styled: str) -> RunConfig:
        mix = {**MIX, "conditioning": {"styled": styled}}
        return RunConfig.model_validate({"model": mix, "rewards": {"brightness": {}}, **section})

    made_with("{prompt}, vivid")
    with pytest.raises(ValueError, match=r"model\.conditioning\.styled: .* begin with \{prompt\}, or set"):
        made_with("vivid {prompt}")


def test_templates_can_be_searched() -> None:
    styled = {"choice": ["{prompt}, vivid", "{prompt}, muted"]}
    raw = {"model": {**MIX, "conditioning": {"styled": styled}}, "rewards": {"brightness": {}}}
    experiment = parse_experiment({"name": "words", **raw})
    found = experiment.space["model.conditioning.styled"]
    assert isinstance(found, Choice)
    assert found.options == ("{prompt}, vivid", "{prompt}, muted")
