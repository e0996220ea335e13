"""Every family against the pipeline of diffusers itself: the same image from the same noise, on tiny random pipelines.

A number that is small says little if it would be small for anything: each case is also drawn with what a family may get
wrong, and must be a thousand times further off.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.families.pipeline import pack, unpack
from rltune.diffusion.sampler import Sampler
from tests.family_calls import AGAIN, CASES, PROMPTS, Case, pipeline_of, theirs
from tests.tiny_families import PIPELINES, family_of, made, own_eta, shared_out


def sampler_of(model: ModelFamily, case: Case, shape: tuple[int, int, int]) -> Sampler:
    table = model.read_table(num_steps=case.steps, eta=case.eta, shape=shape)
    return Sampler(model, PromptEmbeddings(model), table, case.guidance, negative_prompt=case.negative)


@torch.no_grad()
def draw(sampler: Sampler, prompts: list[str], x_BCHW: Tensor, noises: list[Tensor]) -> Tensor:
    return sampler.decode(sampler.open(prompts, x_BCHW, lambda k: noises[k]).run())


@pytest.mark.slow
@pytest.mark.parametrize("name", shared_out(CASES, AGAIN))
def test_images_are_the_pipelines_own(name: str) -> None:
    case = CASES[name]
    pipeline = pipeline_of(case)
    model = family_of(pipeline)
    for size in case.sizes:
        shape = model.latent_shape(*size)
        generator = torch.Generator().manual_seed(1)
        x, *noises = torch.randn(case.steps + 1, 2, *shape, generator=generator).unbind(0)
        expected = theirs(pipeline, case, size, x, noises)
        sampler = sampler_of(model, case, shape)
        image = draw(sampler, PROMPTS, x, noises)
        assert float(expected.std()) > 1e-3
        torch.testing.assert_close(image, expected, rtol=0, atol=2e-5)
    ours = float((image - expected).abs().mean())
    wrong = {
        "prompts": draw(sampler, PROMPTS[::-1], x, noises),
        "sign": draw(altered(sampler, lambda f: -f), PROMPTS, x, noises),
        "time": draw(altered(sampler, time=0.9), PROMPTS, x, noises),
    }
    if case.guidance != 1:
        stronger = copy.copy(sampler)
        object.__setattr__(stronger, "guidance_scale", 1.3 * case.guidance)
        wrong["guidance"] = draw(stronger, PROMPTS, x, noises)
    for what, image in wrong.items():
        assert float((image - expected).abs().mean()) > 1000 * max(ours, 1e-9), what


def altered(sampler: Sampler, change: Callable[[Tensor], Tensor] = lambda f: f, *, time: float = 1.0) -> Sampler:
    """The same sampler with a network that is told or says something else."""
    model: Any = sampler.model
    other = SimpleNamespace(
        **{name: getattr(model, name) for name in dir(model) if not name.startswith("_") and name != "predict"}
    )
    other.predict = lambda x, t, text: change(model.predict(x, t * time, text))
    return Sampler(other, sampler.embeddings, sampler.table, sampler.guidance_scale, sampler.negative_prompt)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux dev", "flux2 dev", "sana-sprint"])
def test_a_network_is_told_the_guidance_that_is_asked_for(name: str) -> None:
    case = replace(CASES[name], call={**CASES[name].call, "guidance_scale": 2.0})
    pipeline = pipeline_of(case)
    model, size = family_of(pipeline), case.sizes[0]
    shape = model.latent_shape(*size)
    x, *noises = torch.randn(case.steps + 1, 2, *shape, generator=torch.Generator().manual_seed(1)).unbind(0)
    expected, own = theirs(pipeline, case, size, x, noises), sampler_of(model, case, shape)
    torch.testing.assert_close(
        draw(replace(own, embedded_guidance=2.0), PROMPTS, x, noises), expected, rtol=0, atol=2e-5
    )
    assert float((draw(own, PROMPTS, x, noises) - expected).abs().max()) > 1e-3
    said = model.defaults("").embedded_guidance
    assert torch.equal(draw(replace(own, embedded_guidance=said), PROMPTS, x, noises), draw(own, PROMPTS, x, noises))


@pytest.mark.parametrize("name", shared_out(PIPELINES))
def test_a_prompt_s_image_does_not_depend_on_the_prompts_beside_it(name: str) -> None:
    model = family_of(made(PIPELINES[name]))
    shape = model.latent_shape(16, 16)
    case = Case(PIPELINES[name], {}, guidance=2.0, eta=own_eta(model), steps=2)
    sampler = sampler_of(model, case, shape)
    x, noise = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(1)).unbind(0)
    both = sampler.open(PROMPTS, x, lambda _: noise)
    alone = [sampler.open([PROMPTS[i]], x[i : i + 1], lambda _, i=i: noise[i : i + 1]) for i in range(2)]
    with torch.no_grad():
        torch.testing.assert_close(both.run(), torch.cat([chain.run() for chain in alone]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PIPELINES)
def test_sides_that_do_not_divide_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"image sides must be multiples of \d+ px, got 33 x 32"):
        family_of(made(PIPELINES[name])).latent_shape(33, 32)


@pytest.mark.parametrize("name", ["sd3", "aura_flow"])
def test_sides_beyond_the_places_that_a_network_knows_are_refused(name: str) -> None:
    model = family_of(made(PIPELINES[name]))
    assert model.latent_shape(32, 96)[2] == 48
    with pytest.raises(ValueError, match=r"image sides must be at most 96 px, got 32 x 128"):
        model.latent_shape(32, 128)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("z_image", 506),
        ("flux2_klein", 506),
        ("chroma", 510),
        ("aura_flow", 254),
        ("sana", 298),
        ("lumina2", 91),
        ("flux2_dev", 297),
    ],
)
def test_what_is_too_long_is_told_with_its_end(name: str, read: int) -> None:
    """Templates, system prompts and special tokens take their part of what the encoder reads."""
    model = family_of(made(PIPELINES[name]))
    cut = model.cut_off(["short", "x" * 600])
    assert cut == {"x" * 600: "x" * (600 - read)}


@pytest.mark.parametrize("name", ["sana", "lumina2", "flux2_dev", "flux2_klein", "z_image", "qwen_image"])
def test_what_is_read_of_a_prompt_is_what_is_told(name: str) -> None:
    """The last token that is not told as cut off changes the embedding, and the first that is does not."""
    model, length = family_of(made(PIPELINES[name])), 1100 if name == "qwen_image" else 600
    read = length - len(model.cut_off(["x" * length])["x" * length])
    texts = ["x" * length, "x" * (read - 1) + "y" + "x" * (length - read), "x" * read + "y" + "x" * (length - read - 1)]
    whole, inside, outside = (row["text"] for row in model.encode_prompts(texts))
    assert not torch.equal(whole, inside)
    assert torch.equal(whole, outside)


def test_tokens_are_latents_again() -> None:
    x = torch.randn(2, 16, 6, 8)
    assert torch.equal(unpack(pack(x), 6, 8), x)
