"""Inpainting against diffusers' own pipelines, and its gradient against finite differences."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from rltune.canvas import Canvas
from rltune.diffusion.chain import GradientPlan
from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import FAMILIES
from rltune.diffusion.inpaint import Blend, Given, blend_of, check_encodes, given_of
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.diffusion.outline import load_outline
from rltune.diffusion.sampler import Sampler
from rltune.errors import UserError
from tests.tiny_families import PIPELINES, SDXL_SCHEDULE, lively
from tests.tiny_inpaint import Noise, canvases, sd_inpaint, sdxl_inpaint, sharp
from tests.toys import fill

PROMPTS = ["a cat", "two red birds on a blue branch"]
CPU = torch.device("cpu")
T = 4
SIZE = (32, 16)
CASES: dict[str, tuple[Callable[[], Any], float]] = {
    "sd of nine channels": (sd_inpaint, 5.0),
    "sd of nine channels, no guidance": (sd_inpaint, 1.0),
    "sd of nine channels, euler": (lambda: sd_inpaint(9, EulerDiscreteScheduler(**SDXL_SCHEDULE)), 5.0),
    "sd of four channels": (lambda: sd_inpaint(4), 5.0),
    "sd of four channels, euler": (lambda: sd_inpaint(4, EulerDiscreteScheduler(**SDXL_SCHEDULE)), 5.0),
    "sdxl of nine channels": (sdxl_inpaint, 5.0),
    "sdxl of four channels": (lambda: sdxl_inpaint(4), 5.0),
}


def sampler_of(pipeline: Any, guidance: float = 5.0, eta: float = 0.0) -> Sampler:
    model = FAMILIES.get(type(pipeline).__name__)(pipeline)
    table = model.read_table(num_steps=T, eta=eta, shape=model.latent_shape(*SIZE))
    return Sampler(model, PromptEmbeddings(model), table, guidance, size_px=SIZE)


def start(sampler: Sampler, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = sampler.model.latent_shape(*SIZE)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_images_are_the_pipelines_own(name: str) -> None:
    make, guidance = CASES[name]
    torch.manual_seed(0)
    pipeline = sharp(make())
    sampler = sampler_of(pipeline, guidance)
    x, asked = start(sampler), canvases(PROMPTS)
    given = given_of(asked, SIZE, CPU)
    assert given is not None
    theirs = pipeline(
        prompt=list(PROMPTS),
        image=given.image_B3HW,
        mask_image=given.mask_B1HW,
        height=SIZE[0],
        width=SIZE[1],
        strength=1.0,
        num_inference_steps=T,
        guidance_scale=guidance,
        latents=x.clone(),
        output_type="pt",
    ).images

    def draw(prompts: list[str]) -> Tensor:
        return sampler.decode(sampler.open(prompts, x, None).run())

    ours = draw(asked)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    off = float((ours - theirs).abs().mean())
    others = {
        "prompts": [Canvas(text, canvas.source) for text, canvas in zip(PROMPTS[::-1], asked, strict=True)],
        "masks": [Canvas(text, replace(canvas.source, top=0.5)) for text, canvas in zip(PROMPTS, asked, strict=True)],
        "images": [Canvas(text, replace(canvas.source, seed=7)) for text, canvas in zip(PROMPTS, asked, strict=True)],
    }
    for what, prompts in others.items():
        assert float((draw(prompts) - theirs).abs().mean()) > 300 * max(off, 1e-9), what


@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, 9])
def test_the_gradient_is_that_of_finite_differences(channels: int) -> None:
    """In float64 along a random direction of the adapters, K = T."""
    torch.manual_seed(0)
    sampler = sampler_of(sharp(sd_inpaint(channels)), 2.0)
    model = sampler.model
    for part in (model.network, model.decoder):
        part.double()
    add_lora(model.network, rank=2, alpha=2, targets="attention", seed=0)
    fill(model.network, 0.05)
    parameters = lora_parameters(model.network)
    for parameter in parameters:
        parameter.data = parameter.data.double()
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(2, 3, *SIZE, generator=generator, dtype=torch.float64)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    x = start(sampler, torch.float64)

    def value() -> Tensor:
        chain = sampler.open(canvases(PROMPTS), x, None)
        return (weight * sampler.decode(chain.run(GradientPlan.last(T, T)))).sum()

    gradients = torch.autograd.grad(value(), parameters)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(sign * 1e-4 * direction)
            ends.append(float(value()))
    # pictures are float32 before they are encoded, and timestep embeddings too: the same on both sides
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-5)


def test_what_is_given_of_latents_is_given_at_the_end_whatever_the_adapters_do() -> None:
    torch.manual_seed(0)
    sampler = sampler_of(sharp(sd_inpaint(4)), eta=1.0)
    asked, x = canvases(PROMPTS), start(sampler)
    given = given_of(asked, SIZE, CPU)
    assert given is not None
    noise = torch.randn(T, *x.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        left = sampler.open(asked, x, lambda k: noise[k]).run()
        clean = sampler.open(asked, x, lambda k: noise[k]).run(GradientPlan(frozenset(), scored=1))
        latents = sampler.model.encode(given.image_B3HW)
    is_given = (given.mask_at(*x.shape[-2:]) == 0).expand_as(x)
    for result in (left, clean):
        assert torch.equal(result[is_given], latents[is_given])
        assert not torch.isclose(result[~is_given], latents[~is_given]).any()


def test_steps_in_between_hold_the_given_part_at_their_own_level_with_one_noise() -> None:
    torch.manual_seed(0)
    sampler = replace(sampler_of(sharp(sd_inpaint(4))), num_base_steps=1)
    add_lora(sampler.model.network, rank=2, alpha=2, targets="attention", seed=0)
    asked, x = canvases(PROMPTS), start(sampler)
    given, states = given_of(asked, SIZE, CPU), list[Tensor]()
    assert given is not None
    with torch.no_grad():
        sampler.open(asked, x, None).run(observe=lambda _, x, f: states.append(x))
        latents = sampler.model.encode(given.image_B3HW)
    is_given = (given.mask_at(*x.shape[-2:]) == 0).expand_as(x)
    assert len(states) == T - 1
    for k, state in enumerate(states, start=1):  # the states that steps 1, 2, .. start from
        signal, level = float(sampler.table.signal_U[k]), float(sampler.table.noise_U[k])
        torch.testing.assert_close(state[is_given], (signal * latents + level * x)[is_given], rtol=1e-6, atol=1e-6)


def test_probabilities_count_the_latents_that_are_drawn() -> None:
    """Against torch's own normal distribution, element by element."""
    sampler = sampler_of(sharp(sd_inpaint(4)), eta=1.0)
    table, generator = sampler.table, torch.Generator().manual_seed(0)
    x, f, after = torch.randn(3, 2, 4, 16, 8, generator=generator, dtype=torch.float64).unbind(0)
    mask = torch.zeros(2, 1, 16, 8, dtype=torch.float64)
    mask[0, :, 4:8, 2:5], mask[1, :, 3:] = 1, 1
    density = torch.distributions.Normal(table.a_T[1] * x + table.b_T[1] * f, table.s_T[1]).log_prob(after)
    expected = [float(density[i][mask[i].expand(4, -1, -1) == 1].mean()) for i in range(2)]
    assert table.log_prob(1, x, f, after, mask).tolist() == pytest.approx(expected, rel=1e-12)
    whole = torch.ones_like(mask)
    assert torch.allclose(table.log_prob(1, x, f, after, whole), table.log_prob(1, x, f, after), rtol=1e-12)
    assert torch.allclose(table.log_prob_back(1, x, after, whole), table.log_prob_back(1, x, after), rtol=1e-12)
    other = torch.where(mask == 1, x, torch.randn(x.shape, generator=generator, dtype=torch.float64))
    assert torch.equal(table.log_prob_back(1, x, after, mask), table.log_prob_back(1, other, after, mask))


@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_encodes_what_it_decodes(name: str) -> None:
    """A decoder that undoes its encoder would give the image back; of a random one the units alone can be held to it:
    what ``decode`` hands to the autoencoder is what the autoencoder made of the image."""
    torch.manual_seed(0)
    pipeline = lively(PIPELINES[name]())
    model: Any = FAMILIES.get(type(pipeline).__name__)(pipeline)
    check_encodes(model)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    latents = model.encode(image)
    assert latents.shape[1:] == model.latent_shape(32, 32)
    handed: list[Tensor] = []
    vae = pipeline.vae

    def decode(z: Tensor, **_: Any) -> tuple[Tensor]:
        handed.append(z)
        return (torch.zeros(1, 3, *([1] if z.ndim == 5 else []), 32, 32),)

    vae.decode = decode
    model.decode(latents)
    pixels = 2 * image - 1
    encoded = vae.encode(pixels[:, :, None] if handed[0].ndim == 5 else pixels)
    made = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    torch.testing.assert_close(handed[0], made, rtol=1e-5, atol=1e-6)  # scaled and back in float32


def test_a_model_whose_images_cannot_be_encoded_is_refused() -> None:
    class Blank:
        pipeline = None

    with pytest.raises(UserError, match=r"task: inpaint needs a base model whose images can be encoded"):
        check_encodes(Blank())
    given = Given(torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 8))
    with pytest.raises(UserError, match=r"task: inpaint"):
        blend_of(Blank(), given, torch.zeros(1, 4, 4, 4), sampler_of(sd_inpaint(4)).table)


def test_a_mask_that_no_latent_is_left_of_is_refused() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3, :] = 1  # between the places that are looked at
    with pytest.raises(UserError, match=r"so thin that nothing of it is left at the 8 x 8 places of a latent"):
        Given(torch.zeros(1, 3, 16, 16), mask).mask_at(8, 8)


def test_a_later_start_keeps_the_levels_of_its_steps() -> None:
    one = torch.ones(1)
    blend = Blend(0 * one, one, 10 * one, ((0.25, 0.5), (0.5, 0.25), (1.0, 0.0)))
    assert blend.starting(1).after(0, one).item() == 3.0
    assert blend.starting(2).after(0, one).item() == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [sd_inpaint, sdxl_inpaint])
def test_a_folder_of_it_loads_draws_and_carries_gradient(
    make: Callable[[], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sharp(make()).save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), dtype=dtype)
    outline = load_outline(tmp_path / "model", base="model")
    assert (outline.size_px, outline.latent_shape(*SIZE)) == (model.size_px, model.latent_shape(*SIZE))
    assert outline.latent_shape(*SIZE)[0] == 4
    add_lora(model.network, rank=2, alpha=2, targets=model.lora_layers("attention"), seed=0)
    fill(model.network, 0.05)
    table = model.read_table(num_steps=T, eta=0.0, shape=model.latent_shape(*SIZE))
    sampler = Sampler(model, PromptEmbeddings(model), table, 2.0, size_px=SIZE)
    latents = sampler.latents(canvases(PROMPTS), start(sampler), plan=GradientPlan.last(1, T), noise=None)
    image = sampler.decode(latents)
    assert image.dtype == torch.float32
    image.mean().backward()
    gradients = [p.grad for p in lora_parameters(model.network) if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert any(bool(g.any()) for g in gradients)


def test_canvases_are_text_and_picture() -> None:
    first, same, other = Canvas("a", Noise(0)), Canvas("a", Noise(0)), Canvas("a", Noise(1))
    assert first == same
    assert hash(first) == hash(same)
    assert len({first, same, other, "a"}) == 3
    assert first != other
    assert first != "a"
    assert f"{first} b" == "a b"
    again = pickle.loads(pickle.dumps(first))
    assert isinstance(again, Canvas)
    assert again == first
