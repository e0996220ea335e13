"""Gradient through every family's chain: against plain autograd and finite differences, in both precisions."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rltune.diffusion.chain import GradientPlan
from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.diffusion.outline import load_outline
from rltune.diffusion.sampler import Sampler, guided_denoiser
from tests.tiny_families import FEW, PIPELINES, family_of, fresh, made, own_eta, shared_out
from tests.toys import fill

PROMPTS = ["a cat", "two red birds on a blue branch"]
CPU = torch.device("cpu")
T = 3
SIDE = 16


def embeddings_of(name: str) -> PromptEmbeddings:
    return PromptEmbeddings(family_of(made(PIPELINES[name])))


def adapted(model: ModelFamily, targets: str = "attention") -> list[nn.Parameter]:
    add_lora(model.network, rank=2, alpha=2, targets=model.lora_layers(targets), seed=0)
    fill(model.network, 0.05)
    return lora_parameters(model.network)


def sampler_of(model: ModelFamily, embeddings: PromptEmbeddings, *, eta: float) -> Sampler:
    shape = model.latent_shape(SIDE, SIDE)
    return Sampler(model, embeddings, model.read_table(num_steps=T, eta=eta, shape=shape), 2.0)


def drawn(model: ModelFamily, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    """x_T, the noise of each step, and a weight for each pixel."""
    generator = torch.Generator().manual_seed(1)
    x, *noises = torch.randn(T + 1, 2, *model.latent_shape(SIDE, SIDE), generator=generator, dtype=torch.float64).to(
        dtype
    )
    return x, noises, torch.randn(2, 3, SIDE, SIDE, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.long
@pytest.mark.parametrize("name", shared_out(PIPELINES, PIPELINES.keys() - set(FEW)))
def test_the_gradient_is_that_of_finite_differences_and_of_plain_autograd(name: str) -> None:
    """In float64 along a direction of random numbers with the gradient's signs, so that the slope is far from rounding.

    K = T, so that nothing is cut.
    """
    model = family_of(fresh(PIPELINES[name]))
    for part in (model.network, model.decoder):
        part.double()
    parameters = adapted(model)
    for parameter in parameters:
        parameter.data = parameter.data.double()
    sampler = sampler_of(model, embeddings_of(name), eta=own_eta(model))
    x, noises, weight = drawn(model, torch.float64)

    def value() -> Tensor:
        chain = sampler.open(PROMPTS, x, noises.__getitem__)
        return (weight * sampler.decode(chain.run(GradientPlan.last(T, T)))).sum()

    def plainly() -> Tensor:
        """The chain written out, without a plan or a checkpoint."""
        rows, negative = sampler.embeddings.rows(PROMPTS), sampler.embeddings.negative("")
        denoise = guided_denoiser(model, rows, negative, CPU, guidance_scale=2.0)
        state, table = x * sampler.table.init_scale, sampler.table
        for k in range(T):
            f = denoise(state, table.timesteps_T[k])
            state = table.a_T[k] * state + table.b_T[k] * f + table.s_T[k] * noises[k]
        return (weight * model.decode(state)).sum()

    ours, plain = (torch.autograd.grad(v(), parameters, allow_unused=True) for v in (value, plainly))
    # a last block's text stream is unused
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in ours) > len(parameters) // 2
    for g, h in zip(ours, plain, strict=True):
        assert (g is None) == (h is None)
        if g is not None and h is not None:
            torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-9)
    generator = torch.Generator().manual_seed(2)
    lengths = [torch.rand(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    signs = [1.0 if g is None else torch.where(g < 0, -1.0, 1.0) for g in ours]
    directions = [length * sign for length, sign in zip(lengths, signs, strict=True)]
    slope = sum(float((g * d).sum()) for g, d in zip(ours, directions, strict=True) if g is not None)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(sign * 1e-4 * direction)
            ends.append(float(value()))
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(sign * 1e-4 * direction)
    # some of them compute norms, places or attention in float32 whatever they are given
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=0.02)


@pytest.mark.long
@pytest.mark.parametrize("name", shared_out(PIPELINES, PIPELINES.keys() - set(FEW)))
def test_a_folder_of_it_loads_samples_and_carries_gradient_in_both_precisions(name: str, tmp_path: Path) -> None:
    made(PIPELINES[name]).save_pretrained(tmp_path / "model")
    outline = load_outline(tmp_path / "model", base="model")
    images, gradients = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(str(tmp_path / "model"), dtype=dtype)
        assert type(outline) is type(model)
        assert (outline.size_px, outline.latent_shape(32, 16)) == (model.size_px, model.latent_shape(32, 16))
        assert not any(parameter.requires_grad for parameter in model.network.parameters())
        parameters = adapted(model)
        sampler = sampler_of(model, PromptEmbeddings(model), eta=own_eta(model))
        table = outline.read_table(num_steps=T, eta=own_eta(model), shape=model.latent_shape(SIDE, SIDE))
        assert torch.equal(table.b_T, sampler.table.b_T)
        x, noises, _ = drawn(model, torch.float32)
        image = sampler.decode(sampler.latents(PROMPTS, x, plan=GradientPlan.last(1, T), noise=noises.__getitem__))
        assert image.dtype == torch.float32
        assert image.shape == (2, 3, SIDE, SIDE)
        image.square().mean().backward()
        images[dtype] = image.detach()
        gradients[dtype] = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).float()
        assert bool(gradients[dtype].isfinite().all())
    full, half = images[torch.float32], images[torch.bfloat16]
    assert 0 < float((half - full).abs().mean()) < 0.1  # eight bits, through T random networks with guidance
    assert float(torch.cosine_similarity(gradients[torch.float32], gradients[torch.bfloat16], dim=0)) > 0.8


LAYERS = {
    "stable_diffusion": ({"to_q", "to_out.0"}, {"ff.net.2", "conv1", "conv_shortcut", "proj_out"}),
    "sdxl": ({"to_q", "to_k", "to_v", "to_out.0"}, {"ff.net.2", "conv1", "conv_shortcut", "proj_out"}),
    "sd3": ({"attn.add_q_proj", "attn.to_add_out", "attn2.to_q"}, {"ff_context.net.2"}),
    "flux": ({"attn.add_k_proj", "attn.to_out.0"}, {"ff.net.0.proj", "proj_mlp"}),
    "flux2_klein": (
        {"attn.add_v_proj", "attn.to_qkv_mlp_proj", "single_transformer_blocks.1.attn.to_out"},
        {"ff_context.linear_out"},
    ),
    "flux2_dev": ({"attn.add_v_proj", "single_transformer_blocks.0.attn.to_out"}, {"ff.linear_in"}),
    "qwen_image": ({"attn.to_add_out", "attn.to_out.0"}, {"txt_mlp.net.2", "img_mlp.net.0.proj"}),
    "z_image": ({"to_q", "to_out.0"}, {"feed_forward.w3"}),
    "chroma": ({"attn.add_k_proj", "attn.to_out.0"}, {"ff.net.0.proj", "proj_mlp"}),
    "sana": ({"to_q", "to_out.0"}, {"ff.conv_inverted", "ff.conv_point"}),
    "sana_sprint": ({"to_k", "to_v"}, {"ff.conv_point"}),
    "lumina2": ({"to_q", "to_out.0"}, {"feed_forward.linear_2"}),
    "aura_flow": ({"attn.add_q_proj", "attn.to_out.0"}, {"ff.linear_1", "ff_context.out_projection"}),
}
"""Some of ``attention``, and some that ``all`` adds, by diffusers' own training scripts where there are any."""


@pytest.mark.slow
@pytest.mark.parametrize("name", shared_out(PIPELINES, PIPELINES.keys() - set(FEW)))
def test_presets_of_layers_are_layers_and_carry_gradient(name: str) -> None:
    attention, more = LAYERS[name]
    rows = embeddings_of(name).rows(PROMPTS)
    for preset, expected in (("attention", attention), ("all", attention | more)):
        model = family_of(fresh(PIPELINES[name]))
        layers = model.lora_layers(preset)
        assert expected <= set(layers)
        assert (preset == "all") == (more <= set(layers))
        adapted(model, preset)
        shape = model.latent_shape(SIDE, SIDE)
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
        t = torch.tensor(0.9 if name == "sana_sprint" else 500.0)
        model.predict(x, t, model.collate(rows, CPU)).square().mean().backward()
        moved = {
            layer
            for layer in layers
            for key, parameter in model.network.named_parameters()
            if f"{layer}.lora_B" in key and parameter.grad is not None and bool(parameter.grad.any())
        }
        assert moved == set(layers)
    assert model.lora_layers(["to_q"]) == ["to_q"]
