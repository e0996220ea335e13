"""The chain against a closed form, and its gradient against plain autograd through diffusers' own sampler."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from rltune.diffusion.chain import GradientPlan, run_chain
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.diffusion.memory import stored_bytes
from rltune.diffusion.table import ChainTable, read_ddim_table
from tests.tiny import SD15_SCHEDULE, tiny_unet

T = 5
GUIDANCE = 3.0


class Linear:
    """f(x, t) = w x, so that x_0 is a polynomial in w: x_0 = x_T prod_k (a_k + b_k w)."""

    def __init__(self, w: float) -> None:
        self.w = torch.tensor(w, dtype=torch.float64, requires_grad=True)
        self.grad_calls: list[int] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.grad_calls.append(int(t))
        return self.w * x


@pytest.fixture
def table() -> ChainTable:
    return read_ddim_table(DDIMScheduler(**SD15_SCHEDULE, clip_sample=False), num_steps=T, eta=0.0)


@pytest.mark.parametrize("k", range(T + 1))
@pytest.mark.parametrize("is_through_latent", [True, False])
def test_gradient_flows_through_exactly_the_last_k_steps(table: ChainTable, k: int, is_through_latent: bool) -> None:
    model = Linear(0.3)
    x_T = torch.tensor([1.5, -0.5], dtype=torch.float64)
    plan = GradientPlan(GradientPlan.last(k, T).active, is_through_latent)
    x_0 = run_chain(model, x_T, table, plan=plan, num_kept=T)
    factors = table.a_T + table.b_T * 0.3
    torch.testing.assert_close(x_0, x_T * factors.prod(), rtol=1e-12, atol=0)
    assert model.grad_calls == table.timesteps_T[T - k :].tolist()
    if k == 0:
        assert not x_0.requires_grad
        return
    x_0.sum().backward()
    expected = 0.0
    for i in range(T - k, T):
        # d/dw of factor i, carried on by the later steps: by a + b w each, or by a alone where the network's input
        # is detached
        later = factors[i + 1 :] if is_through_latent else table.a_T[i + 1 :]
        expected += float(table.b_T[i] * factors[:i].prod() * (later.prod() if len(later) else 1.0)) * float(x_T.sum())
    assert model.w.grad is not None
    assert model.w.grad.item() == pytest.approx(expected, rel=1e-12)


def guided(unet: UNet2DConditionModel, text: Tensor, negative: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        both = unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([negative, text])).sample
        f_negative, f_text = both.chunk(2)
        return f_negative + GUIDANCE * (f_text - f_negative)

    return denoise


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """Float64, with a LoRA whose B is not zero, so that both factors get gradient."""
    torch.manual_seed(1)
    network = tiny_unet().requires_grad_(False).double()
    add_lora(network, rank=2, alpha=2, targets="attention", seed=0)
    for parameter in lora_parameters(network):
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.1
    return network


def gradient_of(unet: UNet2DConditionModel, x_0: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, x_0.numel(), dtype=x_0.dtype).view_as(x_0)
    parts = torch.autograd.grad((weight * x_0.tanh()).sum(), lora_parameters(unet))
    return torch.cat([part.flatten() for part in parts])


def reference(
    unet: UNet2DConditionModel, x: Tensor, text: Tensor, negative: Tensor, *, k: int, eta: float, noise: Tensor
) -> Tensor:
    """Plain autograd through diffusers' own scheduler; the early network calls run with gradient and are detached."""
    scheduler = DDIMScheduler(**SD15_SCHEDULE, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(T)
    denoise = guided(unet, text, negative)
    for i, t in enumerate(scheduler.timesteps):
        f = denoise(x, t)
        if i < T - k:
            f = f.detach()
        extra = {"variance_noise": noise[i]} if eta > 0 else {}
        x = scheduler.step(f, t, x, eta=eta, **extra).prev_sample
    return x


# every K, with and without noise: tests/estimators/test_backprop.py
@pytest.mark.slow
@pytest.mark.parametrize(("k", "eta", "use_checkpoint"), [(3, 1.0, True), (T, 0.0, False)])
def test_gradient_is_that_of_plain_autograd_through_the_unrolled_sampler(
    unet: UNet2DConditionModel, k: int, eta: float, use_checkpoint: bool
) -> None:
    torch.manual_seed(2)
    x, text, negative = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 4, 8, 8), (2, 6, 32), (2, 6, 32)))
    noise = torch.randn(T, *x.shape, dtype=torch.float64)
    table = read_ddim_table(DDIMScheduler(**SD15_SCHEDULE, clip_sample=False), num_steps=T, eta=eta)
    x_0 = run_chain(
        guided(unet, text, negative),
        x,
        table,
        plan=GradientPlan.last(k, T),
        noise=lambda step: noise[step],
        num_kept=0 if use_checkpoint else T,
    )
    expected_x_0 = reference(unet, x, text, negative, k=k, eta=eta, noise=noise)
    torch.testing.assert_close(x_0, expected_x_0, rtol=1e-10, atol=1e-10)
    gradient, expected = gradient_of(unet, x_0), gradient_of(unet, expected_x_0)
    assert gradient.norm() > 0
    # float64: what is left is the order of a few thousand additions
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10 * float(expected.norm()))


@pytest.mark.slow
def test_checkpointing_changes_no_bit(unet: UNet2DConditionModel) -> None:
    torch.manual_seed(3)
    x, text, negative = (torch.randn(shape, dtype=torch.float64) for shape in ((1, 4, 8, 8), (1, 6, 32), (1, 6, 32)))
    table = read_ddim_table(DDIMScheduler(**SD15_SCHEDULE, clip_sample=False), num_steps=T, eta=0.0)
    gradients = [
        gradient_of(
            unet,
            run_chain(guided(unet, text, negative), x, table, plan=GradientPlan.last(3, T), num_kept=0 if flag else T),
        )
        for flag in (True, False)
    ]
    assert torch.equal(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize("use_checkpoint", [True, False])
def test_stored_memory_grows_by_one_latent_a_step_with_checkpointing(
    unet: UNet2DConditionModel, use_checkpoint: bool
) -> None:
    """Counts the bytes that autograd keeps for backward."""
    x, text = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 6, 32, dtype=torch.float64)
    table = read_ddim_table(DDIMScheduler(**SD15_SCHEDULE, clip_sample=False), num_steps=T, eta=0.0)

    def kept_bytes(k: int) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            x_0 = run_chain(
                guided(unet, text, text), x, table, plan=GradientPlan.last(k, T), num_kept=0 if use_checkpoint else T
            )
        assert x_0.requires_grad
        return sum(kept.values())

    growth = (kept_bytes(5) - kept_bytes(2)) / 3
    latent = x.numel() * x.element_size()
    if use_checkpoint:
        assert growth <= latent + table.timesteps_T.untyped_storage().nbytes()  # the latent and its timestep
    else:
        assert growth > 20 * latent


def test_stochastic_chain_needs_noise(table: ChainTable) -> None:
    stochastic = read_ddim_table(DDIMScheduler(**SD15_SCHEDULE, clip_sample=False), num_steps=T, eta=1.0)
    with pytest.raises(ValueError, match="needs step noise"):
        run_chain(Linear(0.1), torch.ones(2), stochastic)


@pytest.mark.parametrize("k", [-1, 6])
def test_k_outside_the_chain_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"\[0, 5\], got {k}"):
        GradientPlan.last(k, T)


@pytest.mark.parametrize("scored", range(T))
@pytest.mark.parametrize("is_through_latent", [True, False])
def test_a_scored_step_ends_the_chain_with_its_clean_prediction(
    table: ChainTable, scored: int, is_through_latent: bool
) -> None:
    """(d + e w) x_s, of which the derivative in w is e x_s where that step alone is active."""
    model = Linear(0.3)
    x_T = torch.tensor([1.5, -0.5], dtype=torch.float64)
    plan = GradientPlan(frozenset({scored}), is_through_latent, scored)
    clean = run_chain(model, x_T, table, plan=plan, num_kept=T)
    x_s = x_T * (table.a_T + table.b_T * 0.3)[:scored].prod()
    torch.testing.assert_close(clean, (table.d_T[scored] + table.e_T[scored] * 0.3) * x_s, rtol=1e-12, atol=0)
    assert model.grad_calls == [int(table.timesteps_T[scored])]
    clean.sum().backward()
    assert model.w.grad is not None
    assert model.w.grad.item() == pytest.approx(float(table.e_T[scored] * x_s.sum()), rel=1e-12)


def test_no_network_runs_after_the_scored_step(table: ChainTable) -> None:
    model, steps = Linear(0.3), []
    run_chain(
        model,
        torch.ones(2, dtype=torch.float64),
        table,
        plan=GradientPlan(frozenset({0, 1}), False, 2),
        observe=lambda step, x, f: steps.append(step),
    )
    assert steps == [0, 1, 2]
    assert model.grad_calls == table.timesteps_T[:2].tolist()


@pytest.mark.parametrize("is_through_latent", [True, False])
def test_an_observer_sees_every_step_s_input_and_output(table: ChainTable, is_through_latent: bool) -> None:
    model, active = Linear(0.3), {1, 3}
    seen: list[tuple[int, Tensor, Tensor]] = []
    x = torch.tensor([1.5, -0.5], dtype=torch.float64)
    plan = GradientPlan(frozenset(active), is_through_latent)
    run_chain(model, x, table, plan=plan, observe=lambda *step: seen.append(step))
    assert [step for step, _, _ in seen] == list(range(T))
    for k, (_, input_, f) in enumerate(seen):
        torch.testing.assert_close(input_.detach(), x, rtol=1e-12, atol=0)
        torch.testing.assert_close(f.detach(), 0.3 * x, rtol=1e-12, atol=0)
        assert input_.requires_grad == (is_through_latent and k > min(active))
        assert f.requires_grad == (k in active)
        x = (table.a_T[k] + table.b_T[k] * 0.3) * x


@pytest.mark.parametrize("num_kept", range(5))
def test_the_last_active_steps_are_kept_and_the_others_run_again(table: ChainTable, num_kept: int) -> None:
    model = Linear(0.3)
    active = [0, 2, 4]
    plan = GradientPlan(frozenset(active))
    x_0 = run_chain(model, torch.ones(2, dtype=torch.float64), table, plan=plan, num_kept=num_kept)
    assert model.grad_calls == table.timesteps_T[active].tolist()
    x_0.sum().backward()
    again = active[: max(0, 3 - num_kept)]
    # backward comes from the end
    assert model.grad_calls[3:] == table.timesteps_T[again].tolist()[::-1]


@pytest.mark.long
def test_keeping_some_changes_no_bit_and_stores_a_step_s_activations_each(unet: UNet2DConditionModel) -> None:
    torch.manual_seed(3)
    x, text, negative = (torch.randn(shape, dtype=torch.float64) for shape in ((1, 4, 8, 8), (1, 6, 32), (1, 6, 32)))
    table = read_ddim_table(DDIMScheduler(**SD15_SCHEDULE, clip_sample=False), num_steps=T, eta=0.0)
    denoise = guided(unet, text, negative)

    def run(num_kept: int) -> Tensor:
        return run_chain(denoise, x, table, plan=GradientPlan.last(4, T), num_kept=num_kept)

    gradients = [gradient_of(unet, run(num_kept)) for num_kept in (0, 2, 9)]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])
    stored = [stored_bytes(partial(run, num_kept), unet) for num_kept in range(5)]
    growth = [after - before for before, after in pairwise(stored)]
    first, later = (
        stored_bytes(lambda latent=latent: denoise(latent, table.timesteps_T[0]), unet)  # type: ignore[misc]
        for latent in (x, x.clone().requires_grad_())
    )
    # the first active step's input has no gradient; a latent, 1 % of it, is stored either way
    assert growth == pytest.approx([later, later, later, first], rel=0.01)


def test_the_frozen_network_takes_the_steps_without_gradient(table: ChainTable) -> None:
    model, frozen = Linear(0.3), Linear(0.3)
    calls: list[tuple[int, bool]] = []

    def denoise_frozen(x: Tensor, t: Tensor) -> Tensor:
        calls.append((int(t), torch.is_grad_enabled()))
        return frozen(x, t)

    x_T, plan = torch.ones(2, dtype=torch.float64), GradientPlan(frozenset({1, 3}))
    timesteps = table.timesteps_T.tolist()
    for num_kept in (0, 2):
        calls.clear()
        model.grad_calls.clear()
        x_0 = run_chain(model, x_T, table, plan=plan, num_kept=num_kept, denoise_frozen=denoise_frozen)
        assert calls == [(timesteps[k], False) for k in (0, 2, 4)]
        assert model.grad_calls == [timesteps[k] for k in (1, 3)]
        x_0.sum().backward()
        assert len(calls) == 3
    assert frozen.w.grad is None
    assert model.w.grad is not None
    calls.clear()
    with torch.no_grad():
        again = run_chain(model, x_T, table, plan=plan, denoise_frozen=denoise_frozen)
    assert [t for t, _ in calls] == timesteps
    assert torch.equal(again, x_0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_noise_is_asked_for_by_step_and_only_where_it_counts(eta: float) -> None:
    scheduler = DDIMScheduler(**{**SD15_SCHEDULE, "set_alpha_to_one": True}, clip_sample=False)
    table = read_ddim_table(scheduler, num_steps=T, eta=eta)
    asked: list[int] = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return torch.full((2,), float(step), dtype=torch.float64)

    x = torch.ones(2, dtype=torch.float64)
    x_0 = run_chain(Linear(0.3), x, table, noise=noise)
    assert asked == (list(range(T - 1)) if eta > 0 else [])  # the last step of this schedule adds none
    for k in range(T):
        x = (table.a_T[k] + table.b_T[k] * 0.3) * x + table.s_T[k] * k
    torch.testing.assert_close(x_0, x, rtol=1e-12, atol=0)
