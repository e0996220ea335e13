"""Numbers that mix prompts: gradients in closed form and by differences, whose step is whose, and in every family."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rltune.diffusion.chain import NO_GRADIENT, GradientPlan
from rltune.diffusion.conditioning import PromptMix, attach_mix, attached_mix, styled
from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.loading import load_model
from rltune.diffusion.sampler import GuidanceGradient, Sampler
from rltune.diffusion.switches import LORA_SWITCHES, detach, set_strength
from rltune.errors import UserError
from tests.tiny_families import AGAIN, PIPELINES, family_of, fresh, made, own_eta, shared_out
from tests.tiny_inpaint import canvases, sd_inpaint, sharp
from tests.toys import Adaptable, Toy, make_table
from tests.toys import make_sampler as toy_sampler

PROMPTS = ["a cat", "two red birds"]
TEMPLATE = "{prompt}, in warm light"
STYLED = [styled(TEMPLATE, prompt) for prompt in PROMPTS]
SLOPE, TEXT, T = 0.2, 0.7, 5
CPU = torch.device("cpu")


class Sum(Adaptable):
    """f(x, t) = w x + v m, m the mean of the prompt's embedding: x_0 is linear in m at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(SLOPE, dtype=torch.float64), requires_grad=False)

    def forward(self, x_BCHW: Tensor, t: Tensor, text_BLD: Tensor) -> Tensor:
        return self.w * x_BCHW + TEXT * text_BLD.mean((1, 2)).view(-1, 1, 1, 1)


def mixed_toy(lambda_T: Tensor | None = None, guidance: float = 1.0) -> tuple[Sampler, PromptMix]:
    toy = Toy(Sum(), (3, 2, 2), (2, 4))
    toy.has_fixed_text = True  # type: ignore[attr-defined]
    sampler = toy_sampler(toy, make_table(T), guidance=guidance)
    mix = PromptMix(TEMPLATE, sampler.table.timesteps_T, lambda_T).double()
    attach_mix(sampler.model, mix)
    return sampler, mix


def means(sampler: Sampler, prompts: list[str]) -> Tensor:
    return torch.stack([row["text"].mean() for row in sampler.embeddings.rows(prompts)])


def influence(sampler: Sampler, guidance: float) -> Tensor:
    """d x_0 / d m_k of every step: b_k v, times a_j + b_j w of those behind it; guidance scales what differs."""
    a, b = sampler.table.a_T, sampler.table.b_T
    later = [(a + b * SLOPE)[k + 1 :].prod() for k in range(T)]
    return guidance * b * TEXT * torch.stack(later)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_the_gradient_is_that_of_the_closed_form(guidance: float) -> None:
    """d x_0 / d lambda_k = d x_0 / d m_k (m1 - m0), whatever the numbers are, and of the text's half alone."""
    values_T = torch.linspace(-0.5, 1.5, T)
    sampler, mix = mixed_toy(values_T, guidance)
    x = torch.ones(2, 3, 2, 2, dtype=torch.float64)
    weight_B = torch.tensor([1.0, -0.3], dtype=torch.float64)
    drawn = sampler.latents(PROMPTS, x, plan=GradientPlan.last(T, T), noise=None)
    (weight_B * drawn.mean((1, 2, 3))).sum().backward()
    apart_B = means(sampler, STYLED) - means(sampler, PROMPTS)
    expected_T = influence(sampler, guidance) * (weight_B * apart_B).sum()
    torch.testing.assert_close(mix.lambda_T.grad, expected_T, rtol=1e-10, atol=0)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("step", range(T))
def test_at_each_step_its_own_number_acts(step: int, guidance: float) -> None:
    sampler, mix = mixed_toy(guidance=guidance)
    x = torch.ones(2, 3, 2, 2, dtype=torch.float64)
    base = sampler.latents(PROMPTS, x, plan=NO_GRADIENT, noise=None)
    with torch.no_grad():
        mix.lambda_T[step] = 0.4
    moved = (sampler.latents(PROMPTS, x, plan=NO_GRADIENT, noise=None) - base).mean((1, 2, 3))
    apart_B = means(sampler, STYLED) - means(sampler, PROMPTS)
    torch.testing.assert_close(moved, 0.4 * influence(sampler, guidance)[step] * apart_B, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gradient", ["both", "text", "text_rescaled"])
def test_the_gradient_of_guidance_is_what_its_mode_promises(gradient: GuidanceGradient) -> None:
    """Only the text's branch depends on the numbers: g df_text, and without g where that is rescaled."""
    sampler, mix = mixed_toy(guidance=3.5)
    x = torch.ones(2, 3, 2, 2, dtype=torch.float64)
    own = Sampler(sampler.model, sampler.embeddings, sampler.table, 3.5, guidance_gradient=gradient)
    plan = GradientPlan(frozenset((T - 1,)), is_through_latent=False)
    own.latents(PROMPTS, x, plan=plan, noise=None).mean((1, 2, 3)).sum().backward()
    scale = 1.0 if gradient == "text_rescaled" else 3.5
    apart = (means(sampler, STYLED) - means(sampler, PROMPTS)).sum()
    expected_T = torch.zeros(T, dtype=torch.float64)
    expected_T[-1] = scale * sampler.table.b_T[-1] * TEXT * apart
    torch.testing.assert_close(mix.lambda_T.grad, expected_T, rtol=1e-10, atol=0)


def test_other_timesteps_are_interpolated_as_numpy_does() -> None:
    timesteps = torch.tensor([914.0, 700.5, 333.25, 1.0], dtype=torch.float32)
    mix = PromptMix(TEMPLATE, timesteps, torch.tensor([0.1, -0.7, 1.3, 0.4]))
    for t in [*torch.linspace(-5, 1000, 41), torch.tensor(700), torch.tensor(334)]:
        own = np.interp(float(t), timesteps.flip(0).numpy(), mix.lambda_T.detach().flip(0).numpy())
        assert float(mix.at(t).detach()) == pytest.approx(own, rel=1e-6, abs=1e-7)  # float32
    assert [float(mix.at(t).detach()) for t in timesteps] == mix.lambda_T.tolist()  # to the bit
    mix.at(torch.tensor(850)).backward()
    share = (850 - 700.5) / (914 - 700.5)
    assert mix.lambda_T.grad is not None
    assert mix.lambda_T.grad.tolist() == pytest.approx([share, 1 - share, 0, 0])
    alone = PromptMix(TEMPLATE, torch.tensor([999]), torch.tensor([0.5]))
    assert [float(alone.at(torch.tensor(t)).detach()) for t in (0, 999, 1000)] == [0.5] * 3


def sampler_of(model: ModelFamily, steps: int = 4, side: int = 16, guidance: float = 2.0) -> Sampler:
    shape = model.latent_shape(side, side)
    table = model.read_table(num_steps=steps, eta=own_eta(model), shape=shape)
    return Sampler(model, PromptEmbeddings(model), table, guidance)


def attached(sampler: Sampler, seed: int = 3) -> PromptMix:
    values = torch.randn(sampler.table.num_steps, generator=torch.Generator().manual_seed(seed))
    attach_mix(sampler.model, PromptMix(TEMPLATE, sampler.table.timesteps_T, values))
    mix = attached_mix(sampler.model.network)
    assert mix is not None
    return mix


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_gradient_is_that_of_finite_differences(guidance: float) -> None:
    """Of every number, in float64, through guidance, chain and decoder, kept or computed again."""
    model = family_of(fresh(PIPELINES["stable_diffusion"]))
    for part in (model.network, model.decoder, model.pipeline.text_encoder):
        part.double()
    sampler = sampler_of(model, guidance=guidance)
    mix = attached(sampler).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *model.latent_shape(16, 16), generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)

    def value(num_kept: int = 0) -> Tensor:
        own = Sampler(model, sampler.embeddings, sampler.table, guidance, num_kept=num_kept)
        return (weight * own.decode(own.latents(PROMPTS, x, plan=GradientPlan.last(4, 4), noise=None))).sum()

    (slope_T,) = torch.autograd.grad(value(), [mix.lambda_T])
    (kept_T,) = torch.autograd.grad(value(num_kept=4), [mix.lambda_T])
    torch.testing.assert_close(kept_T, slope_T, rtol=1e-12, atol=0)
    for k in range(4):
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                own = mix.lambda_T.clone()
                mix.lambda_T[k] += step
                ends.append(float(value()))
                mix.lambda_T.copy_(own)
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(slope_T[k]), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_removed_and_at_zero_it_is_the_base_model_to_the_bit(tiny_pipeline: Path, dtype: torch.dtype) -> None:
    model = load_model(str(tiny_pipeline), dtype=dtype)
    sampler = sampler_of(model)
    x = torch.randn(2, *model.latent_shape(16, 16), generator=torch.Generator().manual_seed(1))

    def run() -> Tensor:
        return sampler.latents(PROMPTS, x, plan=NO_GRADIENT, noise=None)

    base = run()
    mix = attached(sampler)
    changed = run()
    assert not torch.equal(changed, base)
    with LORA_SWITCHES.off(model.network):
        assert torch.equal(run(), base)
    set_strength(model.network, 0.0)
    assert torch.equal(run(), base)
    set_strength(model.network, 1.0)
    assert torch.equal(run(), changed)
    with torch.no_grad():
        mix.lambda_T.zero_()
    assert torch.equal(run(), base)
    detach(model.network)
    assert attached_mix(model.network) is None
    assert torch.equal(run(), base)


@pytest.mark.slow
def test_the_base_models_steps_are_without_it_and_give_no_gradient(tiny_pipeline: Path) -> None:
    model = load_model(str(tiny_pipeline))
    sampler = sampler_of(model)
    mix = attached(sampler)
    x = torch.randn(2, *model.latent_shape(16, 16), generator=torch.Generator().manual_seed(1))
    own = Sampler(model, sampler.embeddings, sampler.table, 2.0, num_base_steps=2)
    drawn = own.latents(PROMPTS, x, plan=GradientPlan.last(2, 2), noise=None)
    drawn.square().sum().backward()
    assert mix.lambda_T.grad is not None
    assert mix.lambda_T.grad[:2].tolist() == [0, 0]
    assert mix.lambda_T.grad[2:].all()
    with torch.no_grad():
        mix.lambda_T[:2] = 0
    torch.testing.assert_close(sampler.latents(PROMPTS, x, plan=NO_GRADIENT, noise=None), drawn)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", shared_out(PIPELINES, AGAIN))
def test_a_family_either_draws_between_two_prompts_or_refuses(name: str) -> None:
    model = family_of(fresh(PIPELINES[name]))
    sampler = sampler_of(model, steps=2, side=32)
    rows = sampler.embeddings.rows([*PROMPTS, *STYLED, "a"])
    shapes = {tuple((key, tuple(value.shape)) for key, value in row.items()) for row in rows}
    assert model.has_fixed_text == (len(shapes) == 1 and "mask" not in rows[0])
    mix = PromptMix(TEMPLATE, sampler.table.timesteps_T)
    if not model.has_fixed_text:
        with pytest.raises(UserError, match=r"model\.adapter\.kind: prompts of \w+Pipeline .* StableDiffusionPipeline"):
            attach_mix(model, mix)
        return
    x = torch.randn(2, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(1))

    def run(prompts: list[str]) -> Tensor:
        return sampler.latents(prompts, x, plan=NO_GRADIENT, noise=lambda k: x.flip(0))

    plain, other = run(PROMPTS), run(STYLED)
    attach_mix(model, mix)
    mix.lambda_T.fill_(1.0)
    torch.testing.assert_close(run(PROMPTS), other, rtol=0, atol=1e-5)  # embedded in another batch
    mix.lambda_T.fill_(0.5)
    between = run(PROMPTS)
    least = 1e-2 * float((plain - other).abs().max())
    assert least > 1e-5
    assert min(float((between - end).abs().max()) for end in (plain, other)) > least


def test_texts_that_differ_in_length_or_mask_are_refused() -> None:
    model = family_of(made(PIPELINES["stable_diffusion"]))
    mix = PromptMix(TEMPLATE, torch.tensor([1]))
    text, mask = torch.zeros(3, 4), torch.tensor([1, 1, 0])
    for other in ({"text": text[:2], "mask": mask}, {"text": text, "mask": mask.flip(0)}):
        with pytest.raises(UserError, match="differ in length, or in a mask"):
            mix.over(model, [{"text": text, "mask": mask}], [other], CPU)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_given_of_an_image_is_not_mixed() -> None:
    torch.manual_seed(0)
    model = family_of(sharp(sd_inpaint()))
    shape = model.latent_shape(32, 16)
    table = model.read_table(num_steps=3, eta=0.0, shape=shape)
    sampler = Sampler(model, PromptEmbeddings(model), table, 2.0, size_px=(32, 16))
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    expected = sampler.latents(canvases(STYLED), x, plan=NO_GRADIENT, noise=None)
    attach_mix(model, PromptMix(TEMPLATE, table.timesteps_T, torch.ones(3)))
    found = sampler.latents(canvases(PROMPTS), x, plan=NO_GRADIENT, noise=None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_is_announced_beside_prompts_changes_no_embedding_of_theirs() -> None:
    asked: list[list[str]] = []

    class Noted(Toy):
        def encode_prompts(self, prompts):  # type: ignore[no-untyped-def]
            asked.append(list(prompts))
            return super().encode_prompts(prompts)

    embeddings = PromptEmbeddings(Noted(Sum(), (3, 2, 2), (2, 4)), PROMPTS)  # type: ignore[arg-type]
    embeddings.announce(STYLED)
    embeddings.rows([STYLED[0]])
    embeddings.rows([PROMPTS[1]])
    assert asked == [STYLED, PROMPTS]
