"""What a run is built from: an estimator with its settings, room for activations, the name of the base model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rltune.config.experiment import RunConfig
from rltune.diffusion.families.base import Conditioning
from rltune.diffusion.families.stable_diffusion import StableDiffusion
from rltune.diffusion.lora import lora_parameters
from rltune.errors import UserError
from rltune.estimators.alignprop import AlignProp
from rltune.estimators.drtune import DRTune
from rltune.training import setup
from rltune.training.setup import base_key, check_options, make_estimator
from rltune.training.streams import prompt_indices
from tests.training.runs import Make, adapted_run, train

NONE: dict[str, Any] = {"k": None, "draw": None}

# ---- the estimator


def test_what_is_left_out_is_the_estimators_own_default(make_config: Make) -> None:
    assert make_estimator(make_config(estimator=NONE)) == AlignProp()
    assert make_estimator(make_config(estimator={"name": "drtune", **NONE})) == DRTune()


def test_an_estimator_is_built_from_its_section_and_its_options(make_config: Make) -> None:
    section = {"name": "alignprop", "k": 3, "draw": "gaussian", "std": 1.5}
    assert make_estimator(make_config(estimator=section)) == AlignProp(k=3, draw="gaussian", std=1.5)
    section = {"name": "drtune", "k": 2, "draw": None, "options": {"early_stop": 0.25}}
    assert make_estimator(make_config(estimator=section)) == DRTune(k=2, early_stop=0.25)


@pytest.mark.parametrize(
    ("section", "sampler", "message"),
    [
        ({"name": "drtun"}, {}, "estimator 'drtun' is unknown; did you mean 'drtune'"),
        ({"name": "full", "k": 2}, {}, "estimator 'full': option 'k' is unknown; it takes none"),
        ({"name": "drtune", "options": {"stride": 2}}, {}, "option 'stride' is unknown; known: k, early_stop"),
        ({"name": "drtune", "k": 8}, {"steps": 12}, None),
        ({"name": "drtune", "k": 9}, {"steps": 12}, r"^estimator: drtune: k must be in \[1, 8\], got 9"),
        (
            {"name": "drtune", "k": 8},
            {"steps": 12, "base_steps": 2},
            r"^estimator: drtune: k must be in \[1, 7\], got 8",
        ),
        (
            {"options": {"k": 10}, **NONE},
            {"steps": 12, "base_steps": 3},
            r"^estimator: alignprop: k must be in \[1, 9\]",
        ),
        ({"name": "ddpo", "options": {"min_count": 64}}, {}, r"^estimator: ddpo: buffer must be in \[64, "),
        ({"name": "draft_lv", "options": {"n": "two"}}, {}, "^estimator: draft_lv: "),
        ({"name": "dpok", "options": {"clip": [1]}}, {}, "^estimator: dpok: "),
    ],
)
def test_a_setting_that_an_estimator_does_not_bear_is_named(
    make_config: Make, section: dict[str, Any], sampler: dict[str, Any], message: str | None
) -> None:
    config = make_config(estimator={**NONE, **section}, sampler={"steps": 4, **sampler})
    if message is None:
        check_options(config)
        return
    with pytest.raises(UserError, match=message):
        check_options(config)


# ---- the prompts


@pytest.mark.slow
def test_a_run_embeds_the_groups_that_it_draws_from(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    """Four images of 10,000 prompts: at most four groups of 64, those of calibration and evaluation, and no more."""
    embedded: list[str] = []
    encode = StableDiffusion.encode_prompts

    def spy(model: StableDiffusion, prompts: Sequence[str]) -> list[Conditioning]:
        embedded.extend(prompts)
        return encode(model, prompts)

    many = [f"prompt {number}" for number in range(10_000)]
    config = make_config(prompts={"train": many}, optim={"steps": 1, "batch": 4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion, "encode_prompts", spy)
        train(config, tmp_path, base_dir=base_dir)
    assert len(embedded) == len(set(embedded)) <= 6 * 64
    drawn = [many[i] for i in prompt_indices(config.seed, 0, 4, len(many))]
    assert set(drawn) <= set(embedded)


# ---- the sampler


@pytest.mark.slow
def test_what_shapes_the_chain_reaches_the_sampler(make_config: Make) -> None:
    config = make_config(
        sampler={"steps": 5, "base_steps": 2, "guidance": 3.5, "eta": 0.5, "negative": "blurry"},
        estimator={"guidance_gradient": "text_rescaled"},
        resources={"prefix_precision": "bf16"},
    )
    sampler = setup.build_run(config).sampler
    assert (sampler.table.num_steps, sampler.num_base_steps, sampler.num_steps) == (5, 2, 3)
    assert (sampler.guidance_scale, sampler.guidance_gradient) == (3.5, "text_rescaled")
    assert (sampler.negative_prompt, setup.build_run(make_config()).sampler.negative_prompt) == ("blurry", "")
    assert not sampler.table.is_deterministic
    assert sampler.use_bf16_prefix
    assert not setup.build_run(make_config()).sampler.use_bf16_prefix


def test_a_schedule_without_such_steps_is_refused_in_one_message(make_config: Make) -> None:
    config = make_config(sampler={"steps": 1000}, estimator={"k": 1})
    with pytest.raises(
        UserError, match=r"^sampler: '.*': 1000 steps begin at timestep 1000 of a schedule .*take fewer$"
    ):
        setup.build_run(config)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_first_steps_are_the_base_models_whatever_the_adapters_are(make_config: Make, eta: float) -> None:
    run = adapted_run(make_config(sampler={"eta": eta}))
    generator = torch.Generator().manual_seed(1)
    x_BCHW = torch.randn(2, *run.latent_shape, generator=generator)
    noise = torch.randn(4, 2, *run.latent_shape, generator=generator)
    prompts = ["a cat", "a dog"]

    def states(num_base_steps: int) -> list[torch.Tensor]:
        chain = replace(run.sampler, num_base_steps=num_base_steps).open(prompts, x_BCHW, lambda k: noise[k])
        return [chain.x_BCHW, chain.run()]

    base = states(4)[0]  # adapters that start at 0 change no bit, but those steps do not even see them
    own = states(0)[1]
    torch.testing.assert_close(own, base, rtol=1e-4, atol=1e-5)  # float32 weights, merged with an update of 0
    before = states(3)[0]
    for parameter in lora_parameters(run.model.network):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    assert torch.equal(states(4)[0], base)
    assert torch.equal(states(3)[0], before)
    apart = [(states(steps)[1] - base).abs().max().item() for steps in (3, 0)]
    assert 0 < apart[0] < apart[1]


# ---- shares of a batch


def shares(config: RunConfig, count: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    run = setup.build_run(config)
    found = []
    for rank in range(count):
        monkeypatch.setattr(run.workers, "rank", rank)
        monkeypatch.setattr(run.workers, "count", count)
        found.append(list(run.local_images))
        assert run.micro_batch == min(2, len(found[-1]))
    return found


@pytest.mark.slow
def test_every_image_is_one_workers_and_their_shares_differ_by_one(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(optim={"batch": 8, "micro_batch": 2})
    assert shares(config, 1, monkeypatch) == [[*range(8)]]
    assert shares(config, 3, monkeypatch) == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert [len(share) for share in shares(config, 5, monkeypatch)] == [1, 2, 1, 2, 2]
    assert shares(config, 8, monkeypatch) == [[image] for image in range(8)]


@pytest.mark.parametrize(("weight", "expected"), [(1, [[0, 1], [2, 3, 4, 5]]), (0, [[0, 1, 2], [3, 4, 5]])])
def test_images_that_are_compared_stay_together(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, weight: float, expected: list[list[int]]
) -> None:
    config = make_config(
        rewards={"diversity_pixels": {"weight": weight}, "brightness": {}},
        prompts={"images_per_prompt": 2},
        optim={"batch": 6, "micro_batch": 2},
    )
    assert shares(config, 2, monkeypatch) == expected


@pytest.mark.parametrize(("gpus", "expected"), [("auto", []), (0, []), (1, []), (2, []), (0.25, [(0.25, "cuda")])])
def test_a_worker_that_shares_a_gpu_is_told_its_part_of_the_memory(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, gpus: Any, expected: list[Any]
) -> None:
    told: list[tuple[float, str]] = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: told.append((fraction, device.type))
    )

    class OnGpu(setup.Workers):
        def limit_memory(self, fraction: float) -> None:
            self.device = torch.device("cuda")
            super().limit_memory(fraction)
            self.device = torch.device("cpu")

    setup.build_run(make_config(resources={"gpus_per_worker": gpus}))
    assert told == []  # there is none here
    monkeypatch.setattr(setup, "Workers", OnGpu)
    setup.build_run(make_config(resources={"gpus_per_worker": gpus}))
    assert told == expected


# ---- the name of the base model's measurements


@pytest.mark.parametrize(
    "sections",
    [
        {"sampler": {"base_steps": 2}},
        {"prompts": {"images_per_prompt": 2}},
        {"estimator": {"k": 1, "checkpoint": "never", "guidance_gradient": "text"}},
        {"optim": {"lr": 0.5, "ema": 0.9, "queries": 7}},
        {"regularize": {"drift": 1.0}},
        {"evaluate": {"every": 3}},
        {"resources": {"compile": True, "workers": 2}},
        {"rewards": {"brightness": {"weight": 3, "loss": "hinge", "target": 1}, "smoothness": {}}},
        {"seed": 9},
    ],
)
def test_what_does_not_change_the_base_model_shares_its_measurements(
    make_config: Make, sections: dict[str, Any]
) -> None:
    assert base_key(make_config(**sections)) == base_key(make_config())


@pytest.mark.parametrize(
    "sections",
    [
        {"resources": {"prefix_precision": "bf16"}},
        {"resources": {"precision": "bf16"}},
        {"sampler": {"steps": 5}},
        {"sampler": {"eta": 1.0}},
        {"sampler": {"guidance": 3.0}},
        {"prompts": {"train": ["a cat"]}},
        {"prompts": {"eval": ["a snail", "an ant", "a bee"]}},
        {"evaluate": {"prompts": 2}},
        {"evaluate": {"judges": ["drift"]}},
        {"rewards": {"brightness": {}}},
        {"rewards": {"brightness": {"options": {"x": 1}}, "smoothness": {}}},
        {"model": {"base": "other"}},
        {"model": {"quantise": "nf4"}},
    ],
)
def test_what_changes_the_base_model_has_measurements_of_its_own(make_config: Make, sections: dict[str, Any]) -> None:
    assert base_key(make_config(**sections)) != base_key(make_config())
