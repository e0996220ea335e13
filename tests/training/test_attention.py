"""Runs whose cross-attention is edited, and whose LoRA learns from its maps, on the tiny pipeline."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rltune.diffusion.chain import NO_GRADIENT, GradientPlan
from rltune.errors import UserError
from rltune.training.setup import base_key, build_run
from tests.training.runs import Make, adapted_run, adapters, metrics, train, train_in_processes

EDIT: dict[str, Any] = {"attention": {"strength": 1.0, "iterations": 3}}
BOTH: dict[str, Any] = {"sampler": EDIT, "regularize": {"attention": 5.0}}
SMOOTH = {"eps": 1.0, "lr": 0.5, "steps": 2, "micro_batch": 1}
"""With a large eps Adam's step is nearly linear in the gradient, so that rounding does not become a whole lr."""
PROMPTS = ("a cat", "two red birds")


def drawn(config: Any) -> torch.Tensor:
    run = build_run(config)
    x_BCHW = torch.randn(len(PROMPTS), *run.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return run.sampler.latents(PROMPTS, x_BCHW, plan=NO_GRADIENT, noise=None)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_edit_of_nothing_gives_the_plain_image_bit_for_bit(make_config: Make, precision: str) -> None:
    resources = {"precision": precision}
    plain = drawn(make_config(resources=resources))
    for nothing in ({"strength": 0.0}, {"iterations": 0, "strength": 1.0}, {"steps": 0.0, "strength": 1.0}):
        assert torch.equal(drawn(make_config(resources=resources, sampler={"attention": nothing})), plain)
    edited = drawn(make_config(resources=resources, sampler=EDIT))
    assert edited.isfinite().all()
    assert not torch.equal(edited, plain)
    if precision == "bf16":
        exact = drawn(make_config(sampler=EDIT))
        assert (edited - exact).abs().max() < 0.1 * exact.abs().max()  # 8 bits, over a few steps


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_loss_has_a_gradient_in_every_precision(make_config: Make, precision: str) -> None:
    run = adapted_run(make_config(resources={"precision": precision}, **BOTH))
    x_BCHW = torch.randn(len(PROMPTS), *run.latent_shape, generator=torch.Generator().manual_seed(1))
    chain = replace(run.sampler, num_kept=99).open(PROMPTS, x_BCHW, None)
    chain.run(GradientPlan.last(1, chain.table.num_steps))
    assert chain.attended is not None
    loss_B = chain.attended.loss_B()
    assert loss_B.shape == (2,)
    assert loss_B.dtype == torch.float32
    assert (loss_B > 0).all()
    loss_B.sum().backward()
    slopes = [parameter.grad for parameter in run.adapter.parameters(run.model.network)]
    assert max(float(slope.abs().max()) for slope in slopes if slope is not None) > 0


def test_edited_base_images_have_measurements_of_their_own(make_config: Make) -> None:
    plain = base_key(make_config())
    assert base_key(make_config(sampler={"attention": {}})) == plain
    assert base_key(make_config(regularize={"attention": 1.0})) == plain
    assert base_key(make_config(sampler=EDIT)) != plain


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        (
            {"resources": {"compile": True}, "sampler": EDIT},
            "resources.compile: sampler.attention.strength reads maps of attention",
        ),
        (
            {"resources": {"compile": True}, "regularize": {"attention": 1.0}},
            "resources.compile: regularize.attention reads maps of attention",
        ),
        (
            {"sampler": {"steps": 4, "attention": {"strength": 1.0, "steps": 0.1}}},
            "sampler.attention.steps: leaves none of the 4 steps",
        ),
    ],
)
def test_what_it_does_not_go_together_with(make_config: Make, sections: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_config(**sections)


@pytest.mark.slow
def test_a_layer_that_the_model_lacks_is_named(make_config: Make) -> None:
    section = {"attention": {"strength": 1.0, "layers": ["up_blocks.9"]}}
    with pytest.raises(UserError, match=r"sampler\.attention\.layers: .*got 'up_blocks\.9'; there is down_blocks\.0"):
        build_run(make_config(sampler=section))


@pytest.mark.long
def test_a_run_learns_from_it_and_goes_on_bit_for_bit(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    sections = {"optim": {"steps": 2}, "evaluate": {"every": 1, "images_per_prompt": 1}}
    config = make_config(**sections, **BOTH)
    train(config, tmp_path / "whole", base_dir=base_dir)
    train(make_config(**sections, sampler=EDIT), tmp_path / "without", base_dir=base_dir)
    whole, without = adapters(tmp_path / "whole", 2), adapters(tmp_path / "without", 2)
    assert any(not torch.equal(whole[name], without[name]) for name in whole)
    half = tmp_path / "whole" / "checkpoints" / "step-000001"
    train(config, tmp_path / "resumed", base_dir=base_dir, resume_from=half)
    resumed = adapters(tmp_path / "resumed", 2)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_workers_take_the_steps_of_one(make_config: Make, tmp_path: Path, base_dir: Path, precision: str) -> None:
    config = make_config(
        optim=SMOOTH, evaluate={"every": 2, "images_per_prompt": 1}, resources={"precision": precision}, **BOTH
    )
    train(config, tmp_path / "1" / "run", base_dir=base_dir)
    train_in_processes({"run": config}, tmp_path / "2", 2)
    one, two = adapters(tmp_path / "1" / "run", 2), adapters(tmp_path / "2" / "run", 2)
    largest = max(values.abs().max() for name, values in one.items() if ".lora_B." in name)
    assert largest > 0
    for name, values in one.items():  # as of other regularisers: float32, added up in another order
        assert (values - two[name]).abs().max() < 2e-4 * largest, name
    assert metrics(tmp_path / "2" / "run")[-1]["workers"] == 2
