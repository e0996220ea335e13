"""Guidance and its gradients, the base model's steps, and steps without gradient in another form."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rltune.diffusion.chain import GradientPlan, run_chain
from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import Conditioning
from rltune.diffusion.sampler import frozen_denoiser, guided_denoiser
from tests.toys import CPU, PROMPTS, Toy, draw, flat_gradient, make_sampler, make_table, perceptron_toy

GUIDANCE = 3.5
B = 2
T = 5
Mode = Literal["both", "text", "text_rescaled"]


@contextmanager
def without_adapters(toy: Toy) -> Iterator[None]:
    """Zero adapters, the base model by another way than its own."""
    kept = [parameter.detach().clone() for parameter in toy.parameters]
    for parameter in toy.parameters:
        parameter.data.zero_()
    yield
    for parameter, value in zip(toy.parameters, kept, strict=True):
        parameter.data.copy_(value)


def branches(toy: Toy, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    negative = toy.run(x, t, toy.texts([""] * B))
    return negative, toy.run(x, t, toy.texts(PROMPTS[:B]))


def embedded(toy: Toy) -> tuple[list[Conditioning], Conditioning, torch.device]:
    embeddings = PromptEmbeddings(toy)  # type: ignore[arg-type]
    return embeddings.rows(PROMPTS[:B]), embeddings.negative(""), CPU


@pytest.mark.parametrize("mode", ["both", "text", "text_rescaled"])
def test_guidance_s_value_and_the_gradient_its_mode_promises(mode: Mode) -> None:
    """f_neg + g (f_text - f_neg); of its derivative all, g df_text, or df_text, in adapters and latent alike."""
    toy, t = perceptron_toy(), torch.tensor(401)
    x, weight = draw(toy, range(B), 0).requires_grad_(), draw(toy, range(B), 1)
    f = guided_denoiser(toy, *embedded(toy), guidance_scale=GUIDANCE, gradient=mode)(x, t)  # type: ignore[arg-type]
    negative, text = branches(toy, x, t)
    torch.testing.assert_close(f, negative + GUIDANCE * (text - negative), rtol=1e-12, atol=1e-13)
    promised = {
        "both": GUIDANCE * text + (1 - GUIDANCE) * negative,
        "text": GUIDANCE * text,
        "text_rescaled": text,
    }[mode]
    wanted = [x, *toy.parameters]
    gradient = flat_gradient((weight * f).sum(), wanted)  # type: ignore[arg-type]
    expected = flat_gradient((weight * promised).sum(), wanted)  # type: ignore[arg-type]
    assert float(expected.norm()) > 0
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)


def test_guidance_that_is_not_linear_has_one_value_and_the_text_s_own_gradient_if_rescaled() -> None:
    """Of every image's output the length is that of the text branch, as in Qwen-Image by token."""

    class Lengthened(Toy):
        is_guidance_linear = False

        def guide(self, text: Tensor, negative: Tensor, scale: float) -> Tensor:  # type: ignore[override]
            mixed = negative + scale * (text - negative)
            lengths = [torch.linalg.vector_norm(f, dim=(1, 2, 3), keepdim=True) for f in (text, mixed)]
            return mixed * (lengths[0] / lengths[1])

    plain, t = perceptron_toy(), torch.tensor(401)
    toy = Lengthened(plain.network, plain.latent_shape, plain.text_shape)
    x, weight = draw(toy, range(B), 0), draw(toy, range(B), 1)
    negative, text = branches(toy, x, t)
    expected = toy.guide(text, negative, GUIDANCE)
    slopes = {}
    for mode in ("both", "text", "text_rescaled"):
        f = guided_denoiser(toy, *embedded(toy), guidance_scale=GUIDANCE, gradient=mode)(x, t)  # type: ignore[arg-type]
        torch.testing.assert_close(f, expected, rtol=1e-12, atol=1e-13)
        slopes[mode] = flat_gradient((weight * f).sum(), toy.parameters)
    whole = flat_gradient((weight * expected).sum(), toy.parameters, retain_graph=True)
    half = flat_gradient(
        (weight * toy.guide(text, negative.detach(), GUIDANCE)).sum(), toy.parameters, retain_graph=True
    )
    for mode, slope in (
        ("both", whole),
        ("text", half),
        ("text_rescaled", flat_gradient((weight * text).sum(), toy.parameters)),
    ):
        torch.testing.assert_close(slopes[mode], slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["both", "text", "text_rescaled"])
def test_what_guidance_runs(mode: Mode) -> None:
    toy, t = perceptron_toy(), torch.tensor(401)
    x = draw(toy, range(B), 0)
    denoise = guided_denoiser(toy, *embedded(toy), guidance_scale=GUIDANCE, gradient=mode)  # type: ignore[arg-type]
    with torch.no_grad():
        value = denoise(x, t)
    assert [(call.num_rows, call.has_grad) for call in toy.calls] == [(2 * B, False)]
    toy.calls.clear()
    torch.testing.assert_close(denoise(x, t), value, rtol=1e-12, atol=1e-13)
    calls = [(call.num_rows, call.has_grad) for call in toy.calls]
    assert calls == ([(2 * B, True)] if mode == "both" else [(B, False), (B, True)])


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["both", "text", "text_rescaled"])
def test_without_guidance_the_negative_prompt_is_not_run(mode: Mode, guidance: float) -> None:
    toy, t = perceptron_toy(), torch.tensor(401)
    x = draw(toy, range(B), 0)
    f = guided_denoiser(toy, *embedded(toy), guidance_scale=guidance, gradient=mode)(x, t)  # type: ignore[arg-type]
    assert [call.num_rows for call in toy.calls] == [B]
    assert torch.equal(f, branches(toy, x, t)[1])


def by_hand(toy: Toy, eta: float, num_base_steps: int) -> list[Tensor]:
    """Return the states of a chain whose first steps have no adapters; the others' gradient is full."""
    table, states = make_table(T, eta), [draw(toy, range(B), 0)]
    for k, t in enumerate(table.timesteps_T):
        if k < num_base_steps:
            with torch.no_grad(), without_adapters(toy):
                negative, text = branches(toy, states[-1], t)
        else:
            negative, text = branches(toy, states[-1], t)
        f = negative + GUIDANCE * (text - negative)
        states.append(table.a_T[k] * states[-1] + table.b_T[k] * f + table.s_T[k] * draw(toy, range(B), 1, k))
    return states


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("num_base_steps", [0, 2, 4])
def test_the_first_steps_are_the_base_model_s(num_base_steps: int, eta: float) -> None:
    toy = perceptron_toy()
    sampler = make_sampler(toy, make_table(T, eta), guidance=GUIDANCE, num_base_steps=num_base_steps)
    assert sampler.num_steps == T - num_base_steps
    states = by_hand(toy, eta, num_base_steps)
    asked: list[int] = []

    def noise(k: int) -> Tensor:
        asked.append(k)
        return draw(toy, range(B), 1, k)

    chain = sampler.open(PROMPTS[:B], draw(toy, range(B), 0), noise if eta > 0 else None)
    assert asked == (list(range(num_base_steps)) if eta > 0 else [])
    assert not chain.x_BCHW.requires_grad
    assert chain.table.timesteps_T.tolist() == make_table(T).timesteps_T[num_base_steps:].tolist()
    torch.testing.assert_close(chain.x_BCHW, states[num_base_steps], rtol=1e-11, atol=1e-11)
    x_0 = chain.run(GradientPlan.last(sampler.num_steps, sampler.num_steps))
    assert asked == (list(range(T)) if eta > 0 else [])
    torch.testing.assert_close(x_0, states[-1], rtol=1e-11, atol=1e-11)
    gradient, expected = (flat_gradient(x.tanh().sum(), toy.parameters) for x in (x_0, states[-1]))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10 * float(expected.norm()))
    toy.calls.clear()
    plan = GradientPlan.last(1, sampler.num_steps)
    latents = sampler.latents(PROMPTS[:B], draw(toy, range(B), 0), plan=plan, noise=noise if eta > 0 else None)
    torch.testing.assert_close(latents, states[-1], rtol=1e-11, atol=1e-11)
    assert [call.has_grad for call in toy.calls] == [False] * (T - 1) + [True]


@pytest.mark.parametrize("use_bf16", [False, True])
def test_the_base_model_s_steps_run_in_bf16_if_the_prefix_does(use_bf16: bool) -> None:
    toy, is_bf16 = perceptron_toy(torch.float32), []
    run = toy.run

    def noted(x_BCHW: Tensor, t: Tensor, text_BLD: Tensor) -> Tensor:
        is_bf16.append(torch.is_autocast_enabled("cpu"))
        return run(x_BCHW, t, text_BLD)

    toy.run = noted  # type: ignore[method-assign]
    sampler = make_sampler(toy, make_table(T), guidance=GUIDANCE, num_base_steps=2, use_bf16_prefix=use_bf16)
    chain = sampler.open(PROMPTS[:B], draw(toy, range(B), 0), None)
    assert is_bf16 == [use_bf16] * 2
    assert chain.x_BCHW.dtype == torch.float32


def test_a_chain_may_be_started_later_more_than_once() -> None:
    """Steps are numbered from 0 again, their timesteps and noise are not."""
    toy = perceptron_toy()
    sampler = make_sampler(toy, make_table(T, 1.0), guidance=GUIDANCE)
    states = [state.detach() for state in by_hand(toy, 1.0, 0)]
    chain = sampler.open(PROMPTS[:B], states[0], lambda k: draw(toy, range(B), 1, k))
    later = chain.starting(1, states[1]).starting(2, states[3])
    torch.testing.assert_close(later.run(), states[-1], rtol=1e-11, atol=1e-11)
    t = make_table(T).timesteps_T[4]
    negative, text = branches(toy, states[4], t)
    torch.testing.assert_close(later.predict(1, states[4]), negative + GUIDANCE * (text - negative), rtol=1e-11, atol=0)


def test_the_base_model_s_output_has_no_adapters_and_no_gradient() -> None:
    toy = perceptron_toy()
    x, table = draw(toy, range(B), 0), make_table(T)
    chain = make_sampler(toy, table, guidance=GUIDANCE).open(PROMPTS[:B], x, None)
    base = chain.predict_base(3, x.clone().requires_grad_())
    with torch.no_grad(), without_adapters(toy):
        negative, text = branches(toy, x, table.timesteps_T[3])
    assert not base.requires_grad
    torch.testing.assert_close(base, negative + GUIDANCE * (text - negative), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(base, chain.predict(3, x))


def test_the_decoder_is_run_again_unless_it_is_kept() -> None:
    toy, runs, gradients = perceptron_toy(), [], []
    decode = toy.decode

    def counted(x: Tensor) -> Tensor:
        runs.append(torch.is_grad_enabled())
        return decode(x)

    toy.decode = counted  # type: ignore[method-assign]
    for is_kept in (False, True):
        runs.clear()
        x = draw(toy, range(B), 0)
        sampler = make_sampler(toy, make_table(T), is_decoder_kept=is_kept)
        sampler.decode(x)
        assert len(runs) == 1
        x.requires_grad_()
        gradients.append(torch.autograd.grad(sampler.decode(x).square().sum(), x)[0])
        assert len(runs) == (2 if is_kept else 3)
    assert torch.equal(*gradients)


class Seen(Toy):
    """Notes in what form the network runs."""

    def __init__(self, dtype: torch.dtype) -> None:
        toy = perceptron_toy(dtype)
        super().__init__(toy.network, toy.latent_shape, toy.text_shape)
        self.weights = [layer.get_base_layer().weight for layer in self.layers]
        self.own = [weight.data_ptr() for weight in self.weights]
        self.is_merged: list[bool] = []
        self.is_bf16: list[bool] = []

    @property
    def layers(self) -> list[Any]:
        return [module for module in self.network.modules() if isinstance(module, LoraLayer)]

    def run(self, x_BCHW: Tensor, t: Tensor, text_BLD: Tensor) -> Tensor:
        is_off = {layer._disable_adapters for layer in self.layers}
        is_other = {weight.data_ptr() != own for weight, own in zip(self.weights, self.own, strict=True)}
        assert is_off == is_other  # adapters are skipped where they are in the weights already
        self.is_merged.append(is_off == {True})
        self.is_bf16.append(torch.is_autocast_enabled("cpu"))
        return super().run(x_BCHW, t, text_BLD)


@pytest.mark.parametrize("use_bf16", [False, True])
def test_steps_without_gradient_run_merged_and_if_asked_in_bf16(use_bf16: bool) -> None:
    """A per-step plan, so that such steps lie between others: values and gradient are the plain chain's."""
    active, toy = [1, 3], Seen(torch.float32)
    x, plan = draw(toy, range(B), 0), GradientPlan(frozenset(active))
    plain = make_sampler(perceptron_toy(), make_table(T), guidance=GUIDANCE)
    expected = plain.latents(PROMPTS[:B], x.double(), plan=plan, noise=None).detach()
    sampler = make_sampler(toy, make_table(T), guidance=GUIDANCE, num_kept=1, use_bf16_prefix=use_bf16)
    x_0 = sampler.latents(PROMPTS[:B], x, plan=plan, noise=None)
    assert toy.is_merged == [k not in active for k in range(T)]
    assert toy.is_bf16 == [use_bf16 and k not in active for k in range(T)]
    assert x_0.dtype == torch.float32
    # 24 bits and 8 bits through five steps, some of which guidance and 1 / sqrt(abar) enlarge
    tolerance = 0.05 if use_bf16 else 1e-4
    torch.testing.assert_close(x_0.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert use_bf16 == bool(((x_0.double() - expected).abs() > 1e-4).any())
    gradient = flat_gradient(x_0.tanh().sum(), toy.parameters)
    assert gradient.dtype == torch.float32
    assert toy.is_merged[T:] == [False]  # the step that is not kept, again
    assert toy.is_bf16[T:] == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_with_merged_steps_between_is_the_plain_chain_s(dtype: torch.dtype) -> None:
    toy, plan = Seen(dtype), GradientPlan(frozenset({1, 3}))
    x = draw(toy, range(B), 0)
    chain = make_sampler(toy, make_table(T), guidance=GUIDANCE, num_kept=1).open(PROMPTS[:B], x, None)
    gradient = flat_gradient(chain.run(plan).tanh().sum(), toy.parameters)
    assert toy.is_merged == [True, False, True, False, True, False]  # the last is the step that is not kept, again
    toy.is_merged.clear()
    expected = flat_gradient(run_chain(chain.denoise, x, chain.table, plan=plan).tanh().sum(), toy.parameters)
    assert not any(toy.is_merged)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance * float(expected.norm()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_adapters_are_not_merged_into_weights_of_a_lower_precision(dtype: torch.dtype) -> None:
    """An update of 1e-4 of a weight would be rounded away in bfloat16."""
    toy = Seen(torch.float32)
    for parameter in toy.network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    weights = [weight.data_ptr() for weight in toy.weights]
    is_merged: list[bool] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        is_merged.append(all(layer._disable_adapters for layer in toy.layers))
        assert is_merged[0] == ([weight.data_ptr() for weight in toy.weights] != weights)
        return x

    frozen_denoiser(denoise, toy.network, CPU, use_bf16=False)(torch.ones(1), torch.tensor(1))
    assert is_merged == [dtype in (torch.float32, torch.float64)]


def test_a_frozen_denoiser_answers_in_the_latents_precision() -> None:
    toy = perceptron_toy(torch.float32)
    text = toy.texts(PROMPTS[:B])
    x, t = draw(toy, range(B), 0), torch.tensor(401)
    raw: list[torch.dtype] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        f: Tensor = toy.network(x, t, text)
        raw.append(f.dtype)
        return f

    with torch.no_grad():
        f = frozen_denoiser(denoise, toy.network, CPU, use_bf16=True)(x, t)
        plain = toy.run(x, t, text)
    assert raw == [torch.bfloat16]
    assert f.dtype == torch.float32
    torch.testing.assert_close(f, plain, rtol=0.02, atol=0.02)
