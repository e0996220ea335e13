"""Words alone: what the network is told, what rewards are told, a run without steps, and what is refused."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rltune.config.load import parse_experiment
from rltune.diffusion.adapter_files import load_adapter_file
from rltune.diffusion.chain import NO_GRADIENT
from rltune.errors import ExperimentError, RunError
from rltune.export.conditioning import ConditioningFile, Mixed
from rltune.rewards.base import REWARDS
from rltune.training.adapters.base import MixValues
from rltune.training.adapters.prompt import filled
from rltune.training.setup import Run, build_run
from tests import tiny_families
from tests.tiny_families import PIPELINES, shared_out
from tests.training.runs import Make, adapters, metrics, train, train_in_processes

PROMPTS = ("a cat", "two red birds")
WORDS = {
    "lora": {},
    "adapter": {"kind": "prompt"},
    "prompt": {"template": "{prompt}, {light}", "words": {"light": "on a branch"}},
}
FEW = {"every": 1, "prompts": 2, "images_per_prompt": 1}
SPELLED = tuple(f"{prompt}, on a branch" for prompt in PROMPTS)


@pytest.mark.parametrize(
    ("template", "words", "text"),
    [
        ("{prompt}", {}, "{prompt}"),
        ("{prompt}, {light}", {"light": "dim light"}, "{prompt}, dim light"),
        ("{prompt}, {light}", {"light": " "}, "{prompt}"),
        ("{light}, {prompt}, {style}", {"light": "", "style": "vivid"}, "{prompt}, vivid"),
        ("a {style} picture of {prompt}, {light}", {"style": "flat", "light": ""}, "a flat picture of {prompt}"),
    ],
)
def test_words_take_their_places(template: str, words: Mapping[str, str], text: str) -> None:
    assert filled(template, words) == text


def drawn(run: Run, prompts: Sequence[str]) -> Tensor:
    x_BCHW = torch.randn(len(prompts), *run.latent_shape, generator=torch.Generator().manual_seed(1))
    noise = torch.ones_like(x_BCHW)
    return run.sampler.latents(prompts, x_BCHW, plan=NO_GRADIENT, noise=lambda step: noise)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_network_is_told_of_the_words_to_the_bit(make_config: Make, precision: str) -> None:
    resources = {"resources": {"precision": precision}}
    plain = build_run(make_config(prompts={"train": list(SPELLED), "eval": list(PROMPTS)}, evaluate=FEW, **resources))
    expected = drawn(plain, SPELLED)
    run = build_run(
        make_config(model=WORDS, prompts={"train": list(PROMPTS), "eval": list(PROMPTS)}, evaluate=FEW, **resources)
    )
    before = drawn(run, PROMPTS)
    run.adapter.start(run.model, seed=0)
    assert torch.equal(drawn(run, PROMPTS), expected)
    assert not torch.equal(before, expected)
    with run.sampler.switches.off(run.model.network):
        assert torch.equal(drawn(run, PROMPTS), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", shared_out(PIPELINES, PIPELINES.keys() - {"z_image"}))
def test_in_every_family_words_are_as_if_spelled_out(name: str, make_config: Make, tmp_path: Path) -> None:
    tiny_families.made(PIPELINES[name]).save_pretrained(tmp_path / "model")
    base, sampler = {"base": str(tmp_path / "model")}, {"steps": 2, "eta": 1.0, "height": 32, "width": 32}
    plain = build_run(make_config(model=base, sampler=sampler))
    run = build_run(make_config(model={**base, **WORDS}, sampler=sampler))
    run.adapter.start(run.model, seed=0)
    found, expected, without = drawn(run, PROMPTS), drawn(plain, SPELLED), drawn(plain, PROMPTS)
    near = 1e-4 * float(expected.abs().max())  # embedded in another batch
    torch.testing.assert_close(found, expected, rtol=0, atol=near)
    assert float((without - expected).abs().max()) > 3 * near


@pytest.mark.slow
def test_a_run_has_no_steps_and_rewards_are_told_of_the_prompts_themselves(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()

    class Noted:
        value_range = (0.0, 1.0)

        def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
            seen.update(map(str, prompts))
            return images_B3HW.mean(dim=(1, 2, 3))

    monkeypatch.setitem(REWARDS._builders, "noted", Noted)
    prompts = {"train": ["a cat"], "eval": list(PROMPTS)}
    config = make_config(model=WORDS, rewards={"noted": {}}, prompts=prompts, objectives=["noted"], evaluate=FEW)
    base, last = train(config, tmp_path).reports
    assert seen == set(PROMPTS)
    assert (last["step"], last["is_final"], last["queries"]) == (0, 1, 0)
    assert last["gain/noted"] == pytest.approx(last["eval/noted"] - base["eval/noted"])
    assert last["gain/noted"] != 0
    assert metrics(tmp_path) == []
    run = build_run(config)
    run.adapter.restore(run.model, adapters(tmp_path, 0))
    spelled = build_run(
        make_config(rewards={"noted": {}}, prompts={"train": ["a cat"], "eval": list(SPELLED)}, evaluate=FEW)
    )
    torch.testing.assert_close(drawn(run, PROMPTS), drawn(spelled, SPELLED), rtol=0, atol=1e-4)
    again = train(config, tmp_path / "again", resume_from=tmp_path / "checkpoints" / "step-000000").reports
    assert again[-1]["eval/noted"] == last["eval/noted"]


@pytest.mark.long
def test_two_workers_measure_what_one_measures(make_config: Make, tmp_path: Path) -> None:
    config = make_config(model=WORDS)
    alone = train(config, tmp_path / "alone" / "run", base_dir=tmp_path / "alone" / "base").reports[-1]
    train_in_processes({"run": config}, tmp_path / "two", 2)
    at = tmp_path / "two" / "run" / "trial" / "samples" / "step-000000.json"
    values = json.loads(at.read_text())["eval"]["brightness"]
    assert sum(values) / len(values) == pytest.approx(alone["eval/brightness"], rel=1e-5)


def test_what_is_exported_comes_back(make_config: Make, tmp_path: Path) -> None:
    run = build_run(make_config(model=WORDS))
    run.adapter.start(run.model, seed=0)
    values = run.adapter.exported(run.model, run.adapter.state(run.model.network))
    assert isinstance(values, MixValues)
    (file,) = ConditioningFile().write(run.model, Mixed(values, run.config), tmp_path)
    content = json.loads(file.read_text())
    assert (content["styled"], set(content["lambdas"])) == ("{prompt}, on a branch", {1.0})
    assert len(content["lambdas"]) == len(content["timesteps"]) == content["steps"] == run.sampler.num_steps
    fresh = build_run(run.config)
    load_adapter_file(fresh.model, file)
    assert torch.equal(drawn(fresh, PROMPTS), drawn(run, PROMPTS))


def test_no_words_at_all_are_the_base_model_and_not_exported(make_config: Make) -> None:
    model = {**WORDS, "prompt": {"template": "{prompt}, {light}", "words": {"light": ""}}}
    run = build_run(make_config(model=model))
    before = drawn(run, PROMPTS)
    run.adapter.start(run.model, seed=0)
    assert torch.equal(drawn(run, PROMPTS), before)
    values = run.adapter.exported(run.model, run.adapter.state(run.model.network))
    assert isinstance(values, MixValues)
    with pytest.raises(RunError, match="adds no words to prompts"):
        Mixed(values, run.config)


@pytest.mark.parametrize(
    ("model", "faults"),
    [
        (
            {"template": "{light}", "words": {"light": "x"}},
            ["model.prompt.template: must hold {prompt} once, got '{light}'; write such as \"{prompt}, {light}\""],
        ),
        (
            {"template": "{prompt}, {light}"},
            [
                "model.prompt.template: names light, for which model.prompt.words has nothing, got "
                "'{prompt}, {light}'; add light to model.prompt.words"
            ],
        ),
        (
            {"template": "{prompt}, {light}", "words": {"light": "like {prompt}"}},
            [
                "model.prompt.words.light: is a text of its own, and names in braces belong in the template, got "
                "'like {prompt}'; move it to model.prompt.template"
            ],
        ),
        (
            {"words": {"light": "x"}},
            [
                "model.prompt.words.light: stands nowhere in model.prompt.template, '{prompt}', got 'x'; write {light} "
                "there, or delete it"
            ],
        ),
    ],
)
def test_templates_that_do_not_fit_are_refused(model: dict[str, Any], faults: list[str]) -> None:
    check_refused({"adapter": {"kind": "prompt"}, "prompt": model}, {}, faults)


def test_what_is_for_loras_or_for_steps_is_refused() -> None:
    faults = [
        "model.lora.rank: no LoRA is trained where model.adapter.kind is prompt, got 8; delete it",
        "sampler.base_steps: words are for all steps where model.adapter.kind is prompt, got sampler.base_steps 2; d",
        "sweep.soup: soups are sums of LoRAs, and none is trained where model.adapter.kind is prompt, got sweep.soup",
    ]
    check_refused({**WORDS, "lora": {"rank": 8}}, {"sampler": {"base_steps": 2}, "sweep": {"soup": True}}, faults)


def check_refused(model: dict[str, Any], sections: dict[str, Any], faults: list[str]) -> None:
    raw = {"model": model, "rewards": {"aesthetic": {}}, **sections}
    with pytest.raises(ExperimentError) as error:
        parse_experiment(json.dumps(raw), "x.yaml")
    for fault in faults:
        assert fault in str(error.value)
