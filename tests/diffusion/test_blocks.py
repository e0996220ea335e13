"""Checkpoints around blocks, and blocks that are compiled: the same gradient, and far less that is stored for it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rltune.diffusion.blocks import blocks_of, checkpoint_blocks, compile_blocks
from rltune.diffusion.chain import GradientPlan
from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import FAMILIES, ModelFamily
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.diffusion.memory import measure_call, stored_bytes
from rltune.diffusion.sampler import Sampler
from tests.tiny_families import FEW, PIPELINES, lively, own_eta, shared_out
from tests.toys import fill, unet_toy

PROMPTS = ["a cat", "two red birds on a branch"]
T = 2
TYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]


@cache
def adapted(name: str, dtype: torch.dtype) -> ModelFamily:
    torch.manual_seed(0)
    pipeline = lively(PIPELINES[name]())
    model = FAMILIES.get(type(pipeline).__name__)(pipeline)
    for module in (model.network, model.decoder):
        module.to(dtype)
    add_lora(model.network, rank=2, alpha=2, targets=model.lora_layers("attention"), seed=0)
    fill(model.network, 0.1)
    return model


def sampler_of(model: ModelFamily, shape: tuple[int, int, int], **settings: Any) -> Sampler:
    table = model.read_table(num_steps=T, eta=own_eta(model), shape=shape)
    return Sampler(model, PromptEmbeddings(model, PROMPTS), table, **{"guidance_scale": 1.0, **settings})


def latents(model: ModelFamily, shape: tuple[int, int, int]) -> Tensor:
    return torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(1))


def gradient(sampler: Sampler, x_BCHW: Tensor, weight: Callable[[Tensor], Tensor] = torch.square) -> list[Tensor]:
    parameters = lora_parameters(sampler.model.network)
    plan = GradientPlan.last(2, T)
    x_0 = sampler.latents(PROMPTS, x_BCHW, plan=plan, noise=lambda _: torch.zeros_like(x_BCHW))
    found = torch.autograd.grad(weight(sampler.decode(x_0)).sum(), parameters, allow_unused=True)
    return [torch.zeros(()) if part is None else part for part in found]


@pytest.mark.long
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", shared_out(PIPELINES, PIPELINES.keys() - set(FEW)))
def test_the_gradient_is_the_same_and_less_is_stored(name: str, dtype: torch.dtype) -> None:
    model = adapted(name, dtype)
    shape = model.latent_shape(16, 16)
    x_BCHW = latents(model, shape)
    sampler = sampler_of(model, shape)
    chain = sampler.open(PROMPTS, x_BCHW.requires_grad_(), None)

    def call() -> Tensor:
        return chain.predict(1, x_BCHW)

    expected, plain = gradient(sampler, x_BCHW), stored_bytes(call, model.network)
    measured = measure_call(call, model.network)
    assert measured.plain == plain
    checkpoint_blocks(model.network, enabled=True)
    try:
        inside = stored_bytes(call, model.network)
        found = [gradient(replace(sampler, num_kept=num_kept), x_BCHW) for num_kept in (0, T)]
    finally:
        checkpoint_blocks(model.network, enabled=False)
    assert stored_bytes(call, model.network) == plain
    assert inside == pytest.approx(measured.outside, rel=0.01)
    assert inside < 0.25 * plain
    assert 0 < measured.largest < plain
    for gradients in found:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients, expected, strict=True))


@pytest.mark.slow
def test_a_branch_without_gradient_is_run_again_without_gradient() -> None:
    """Within a step's own checkpoint, as the chain has it."""
    model = adapted("sdxl", torch.float32)
    shape = model.latent_shape(16, 16)
    sampler = sampler_of(model, shape, guidance_scale=3.0, guidance_gradient="text")
    expected = gradient(sampler, latents(model, shape))
    checkpoint_blocks(model.network, enabled=True)
    try:
        found = gradient(sampler, latents(model, shape))
    finally:
        checkpoint_blocks(model.network, enabled=False)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_a_unet_s_levels_are_not_its_blocks() -> None:
    unet = unet_toy().network
    kinds = {type(block).__name__ for block in blocks_of(unet)}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D"}
    assert len(blocks_of(unet)) == sum(type(module).__name__ in kinds for module in unet.modules())


def test_a_network_that_names_none_is_left_alone() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    checkpoint_blocks(network, enabled=True)
    assert blocks_of(network) == []
    x = torch.ones(1, 2)
    stored = measure_call(lambda: network(x), network)
    assert (stored.plain, stored.outside, stored.largest) == (8, 8, 0)


# ---- compiled


# tracing looks at every input's .grad, which PyTorch warns of where the input is no leaf
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_blocks_are_compiled_whole_inside_their_checkpoints_and_give_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Traced forwards and backwards, but not translated, which would take minutes on a CPU."""
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda part: compile_(part, backend="aot_eager", fullgraph=True))
    torch.manual_seed(0)
    model = adapted.__wrapped__("sdxl", torch.float32)  # of its own: it stays compiled
    shape = model.latent_shape(16, 16)
    sampler, x_BCHW = sampler_of(model, shape, num_kept=T), latents(model, shape)
    expected = gradient(sampler, x_BCHW)
    checkpoint_blocks(model.network, enabled=True)
    assert compile_blocks(model.network)
    found = gradient(sampler, x_BCHW)
    assert any(part.abs().max() > 0 for part in found)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("flux", {"FluxTransformerBlock", "FluxSingleTransformerBlock"}), ("sd3", {"SD3Transformer2DModel"})],
)
def test_a_network_without_repeated_blocks_is_compiled_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, name: str, kinds: set[str]
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda part: compiled.append(type(part).__name__))
    assert compile_blocks(adapted(name, torch.float32).network) == (name == "flux")
    assert set(compiled) == kinds
