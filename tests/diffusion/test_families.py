"""Every family against the pipeline of diffusers itself: the same image from the same noise, on tiny random pipelines.

A number that is small says little if it would be small for anything: each case is also drawn with what a family may get
wrong, and must be a thousand times further off.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch import Tensor

from rltune.diffusion.chain import GradientPlan
from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import FAMILIES, ModelFamily
from rltune.diffusion.families.pipeline import pack, unpack
from rltune.diffusion.loading import load_model
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.diffusion.outline import load_outline
from rltune.diffusion.sampler import Sampler
from tests import tiny_families
from tests.tiny_families import PIPELINES, SDXL_SCHEDULE, lively
from tests.toys import fill

PROMPTS = ["a cat", "two red birds on a blue branch"]
CPU = torch.device("cpu")
T = 4


@dataclass(frozen=True)
class Case:
    """A pipeline, how it is called for an image, and what that call is here."""

    make: Callable[[], Any]
    call: dict[str, Any]
    guidance: float = 1.0
    negative: str = ""
    eta: float = 0.0
    is_packed: bool = False
    """Whether the pipeline takes its noise in tokens."""
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (16, 32))


def euler(spacing: str) -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**SDXL_SCHEDULE, timestep_spacing=spacing)


NEGATIVE = {"negative_prompt": ["a dog"] * 2}
CASES = {
    "sdxl": Case(tiny_families.sdxl, {"guidance_scale": 5.0}, 5.0),
    "sdxl negative": Case(tiny_families.sdxl, {"guidance_scale": 5.0, **NEGATIVE}, 5.0, "a dog"),
    "sdxl no guidance": Case(tiny_families.sdxl, {"guidance_scale": 1.0}),
    "sdxl ddim": Case(
        lambda: tiny_families.sdxl(DDIMScheduler(**SDXL_SCHEDULE, clip_sample=False, set_alpha_to_one=False)),
        {"guidance_scale": 5.0},
        5.0,
    ),
    "sdxl-turbo": Case(
        lambda: tiny_families.sdxl(
            EulerAncestralDiscreteScheduler(**SDXL_SCHEDULE, timestep_spacing="trailing"), force_zeros=False
        ),
        {"guidance_scale": 0.0},
        eta=1.0,
    ),
    "sdxl trailing": Case(
        lambda: tiny_families.sdxl(euler("trailing"), force_zeros=False), {"guidance_scale": 3.0}, 3.0
    ),
    "sd3": Case(tiny_families.sd3, {"guidance_scale": 7.0}, 7.0),
    "sd3 negative": Case(tiny_families.sd3, {"guidance_scale": 7.0, **NEGATIVE}, 7.0, "a dog"),
    "sd3 without t5": Case(lambda: tiny_families.sd3(has_t5=False), {"guidance_scale": 7.0}, 7.0),
    "flux dev": Case(tiny_families.flux, {"guidance_scale": 3.5}, is_packed=True),
    "flux dev true guidance": Case(
        tiny_families.flux, {"guidance_scale": 3.5, "true_cfg_scale": 4.0, **NEGATIVE}, 4.0, "a dog", is_packed=True
    ),
    "flux schnell": Case(
        lambda: tiny_families.flux(is_dev=False), {"guidance_scale": 0.0, "max_sequence_length": 512}, is_packed=True
    ),
    "flux2 klein": Case(tiny_families.flux2_klein, {"guidance_scale": 4.0}, 4.0),
    "qwen-image": Case(tiny_families.qwen_image, {"true_cfg_scale": 4.0, **NEGATIVE}, 4.0, "a dog", is_packed=True),
    "z-image-turbo": Case(tiny_families.z_image, {"guidance_scale": 0.0}),
    "z-image": Case(tiny_families.z_image, {"guidance_scale": 3.0}, 4.0),
}


def family_of(pipeline: Any) -> ModelFamily:
    return FAMILIES.get(type(pipeline).__name__)(pipeline)


@contextmanager
def drawing(scheduler: Any, noises: list[Tensor]) -> Iterator[None]:
    """Hand prepared noises to a scheduler that draws its own."""
    module = __import__(type(scheduler).__module__, fromlist=["x"])
    queue = list(noises)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda *_, **__: queue.pop(0))
        yield


def sampler_of(model: ModelFamily, case: Case, shape: tuple[int, int, int], **changed: Any) -> Sampler:
    return Sampler(
        model,
        PromptEmbeddings(model),
        model.read_table(num_steps=T, eta=case.eta, shape=shape),
        changed.get("guidance", case.guidance),
        negative_prompt=case.negative,
    )


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_images_are_the_pipelines_own(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    pipeline = lively(case.make())
    model = family_of(pipeline)
    for height, width in case.sizes:
        shape = model.latent_shape(height, width)
        generator = torch.Generator().manual_seed(1)
        x, *noises = torch.randn(T + 1, 2, *shape, generator=generator).unbind(0)
        with drawing(pipeline.scheduler, noises):
            theirs = pipeline(
                prompt=list(PROMPTS),
                height=height,
                width=width,
                num_inference_steps=T,
                latents=pack(x) if case.is_packed else x.clone(),
                output_type="pt",
                **case.call,
            ).images

        def draw(sampler: Sampler, prompts: list[str], x: Tensor = x, noises: list[Tensor] = noises) -> Tensor:
            return sampler.decode(sampler.open(prompts, x, lambda k: noises[k]).run())

        sampler = sampler_of(model, case, shape)
        assert float(theirs.std()) > 1e-3
        torch.testing.assert_close(draw(sampler, PROMPTS), theirs, rtol=0, atol=2e-5)
        ours = float((draw(sampler, PROMPTS) - theirs).abs().mean())
        wrong = {
            "prompts": draw(sampler, PROMPTS[::-1]),
            "sign": draw(altered(sampler, lambda f: -f), PROMPTS),
            "time": draw(altered(sampler, time=0.9), PROMPTS),
        }
        if case.guidance != 1:
            wrong["guidance"] = draw(sampler_of(model, case, shape, guidance=1.3 * case.guidance), PROMPTS)
        for what, image in wrong.items():
            assert float((image - theirs).abs().mean()) > 1000 * max(ours, 1e-9), what


def altered(sampler: Sampler, change: Callable[[Tensor], Tensor] = lambda f: f, *, time: float = 1.0) -> Sampler:
    """The same sampler with a network that is told or says something else."""
    model: Any = sampler.model
    other = SimpleNamespace(
        **{name: getattr(model, name) for name in dir(model) if not name.startswith("_") and name != "predict"}
    )
    other.predict = lambda x, t, text: change(model.predict(x, t * time, text))
    return Sampler(other, sampler.embeddings, sampler.table, sampler.guidance_scale, sampler.negative_prompt)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_prompt_s_image_does_not_depend_on_the_prompts_beside_it(name: str) -> None:
    torch.manual_seed(0)
    model = family_of(lively(PIPELINES[name]()))
    shape = model.latent_shape(32, 32)
    sampler = sampler_of(model, Case(PIPELINES[name], {}, guidance=2.0), shape)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        both = sampler.open(PROMPTS, x, None).run()
        alone = torch.cat([sampler.open([PROMPTS[i]], x[i : i + 1], None).run() for i in range(2)])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_gradient_of_the_last_steps_is_that_of_finite_differences(name: str) -> None:
    """In float64 along a random direction of the adapters; K = T, so that nothing is cut."""
    torch.manual_seed(0)
    pipeline = lively(PIPELINES[name]())
    model = family_of(pipeline)
    for part in (model.network, model.decoder):
        part.double()
    add_lora(model.network, rank=2, alpha=2, targets=model.lora_layers("attention"), seed=0)
    parameters = lora_parameters(model.network)
    fill(model.network, 0.05)
    for parameter in parameters:
        parameter.data = parameter.data.double()
    shape = model.latent_shape(16, 16)
    sampler = sampler_of(model, Case(PIPELINES[name], {}, guidance=2.0), shape)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def value() -> Tensor:
        plan = GradientPlan.last(2, 2)
        table = sampler.table.part(T - 2, T)
        chain = Sampler(model, sampler.embeddings, table, 2.0).open(PROMPTS, x, None)
        return (weight * sampler.decode(chain.run(plan))).sum()

    gradients = torch.autograd.grad(value(), parameters, allow_unused=True)  # a last block's text stream is unused
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in gradients) > len(parameters) // 2
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_folder_of_it_loads_samples_and_carries_gradient(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lively(PIPELINES[name]()).save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), dtype=dtype)
    outline = load_outline(tmp_path / "model", base="model")
    assert type(outline) is type(model)
    assert (outline.size_px, outline.latent_shape(32, 16)) == (model.size_px, model.latent_shape(32, 16))
    shape = model.latent_shape(16, 16)
    assert torch.equal(
        outline.read_table(num_steps=3, eta=0.0, shape=shape).b_T,
        model.read_table(num_steps=3, eta=0.0, shape=shape).b_T,
    )
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    add_lora(model.network, rank=2, alpha=2, targets=model.lora_layers("attention"), seed=0)
    fill(model.network, 0.05)
    sampler = sampler_of(model, Case(PIPELINES[name], {}, guidance=2.0), shape)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    image = sampler.decode(sampler.latents(PROMPTS, x, plan=GradientPlan.last(1, T), noise=None))
    assert image.dtype == torch.float32
    assert image.shape == (2, 3, 16, 16)
    image.mean().backward()
    gradients = [parameter.grad for parameter in lora_parameters(model.network) if parameter.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert any(bool(gradient.abs().sum() > 0) for gradient in gradients)


LAYERS = {
    "sdxl": ({"to_q", "to_k", "to_v", "to_out.0"}, {"ff.net.2", "conv1", "conv_shortcut", "proj_out"}),
    "sd3": ({"attn.add_q_proj", "attn.to_add_out", "attn2.to_q"}, {"ff_context.net.2"}),
    "flux": ({"attn.add_k_proj", "attn.to_out.0"}, {"ff.net.0.proj", "proj_mlp"}),
    "flux2_klein": (
        {"attn.add_v_proj", "attn.to_qkv_mlp_proj", "single_transformer_blocks.1.attn.to_out"},
        {"ff_context.linear_out"},
    ),
    "qwen_image": ({"attn.to_add_out", "attn.to_out.0"}, {"txt_mlp.net.2", "img_mlp.net.0.proj"}),
    "z_image": ({"to_q", "to_out.0"}, {"feed_forward.w3"}),
}
"""Some of ``attention``, and some that ``all`` adds; families.md of the reference, section 7.1."""


@pytest.mark.parametrize("name", PIPELINES)
def test_presets_of_layers_are_layers_and_carry_gradient(name: str) -> None:
    torch.manual_seed(0)
    attention, more = LAYERS[name]
    for preset, expected in (("attention", attention), ("all", attention | more)):
        model = family_of(lively(PIPELINES[name]()))
        layers = model.lora_layers(preset)
        assert expected <= set(layers)
        assert (preset == "all") == (more <= set(layers))
        add_lora(model.network, rank=2, alpha=2, targets=layers, seed=0)
        fill(model.network, 0.05)
        shape = model.latent_shape(16, 16)
        text = model.collate(model.encode_prompts(PROMPTS), CPU)
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
        model.predict(x, torch.tensor(500.0), text).square().mean().backward()
        moved = {
            layer
            for layer in layers
            for key, parameter in model.network.named_parameters()
            if f"{layer}.lora_B" in key and parameter.grad is not None and bool(parameter.grad.any())
        }
        assert moved == set(layers)
    assert model.lora_layers(["to_q"]) == ["to_q"]


@pytest.mark.parametrize("name", PIPELINES)
def test_sides_that_do_not_divide_are_refused(name: str) -> None:
    model = family_of(PIPELINES[name]())
    with pytest.raises(ValueError, match=r"image sides must be multiples of \d+ px, got 33 x 32"):
        model.latent_shape(33, 32)


def test_sides_beyond_the_places_that_a_network_knows_are_refused() -> None:
    model = family_of(tiny_families.sd3())
    with pytest.raises(ValueError, match=r"image sides must be at most 96 px, got 32 x 128"):
        model.latent_shape(32, 128)


def test_what_is_too_long_is_told_with_its_end() -> None:
    model = family_of(tiny_families.z_image())
    cut = model.cut_off(["short", "x" * 600])
    assert list(cut) == ["x" * 600]
    assert cut["x" * 600] == "x" * (600 - 512)


def test_tokens_are_latents_again() -> None:
    x = torch.randn(2, 16, 6, 8)
    assert torch.equal(unpack(pack(x), 6, 8), x)
