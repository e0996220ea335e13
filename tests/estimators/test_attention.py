"""The loss on maps of cross-attention as a regulariser: its value by maps noted apart, its gradient by differences."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rltune.diffusion.attention import AttentionPlan, attention_layers, content_tokens
from rltune.diffusion.blocks import checkpoint_blocks
from rltune.diffusion.chain import GradientPlan
from rltune.estimators.base import Estimator, Regularisers
from rltune.estimators.ddpo import DDPO
from rltune.estimators.draft import DRaFT, DRaFTLV
from rltune.estimators.drtune import DRTune
from rltune.estimators.full import FullBackprop
from tests.toys import Toy, draw, fill, gradients_of, make_round, make_sampler, make_table, on_workers, reading_toy

T, N = 2, 2
WEIGHT = 3.0
NOTED = Regularisers(attention=WEIGHT)


def plan_of(toy: Toy, *, num_edited: int = 0, is_noted: bool = True) -> AttentionPlan:
    layers = attention_layers(toy.network, "auto", where="regularize.attention", base="toy")
    return AttentionPlan(layers, num_edited, iterations=2, is_noted=is_noted)


def gradient(estimator: Estimator, regularisers: Regularisers, *, toy: Toy | None = None, **settings: Any) -> Tensor:
    toy = toy or reading_toy()
    settings = {"num_steps": T, "num_images": N, "guidance": 2.0, **settings}
    round = make_round(toy, estimator, regularisers=regularisers, attention=plan_of(toy), **settings)
    return gradients_of(estimator, round)[0]


def own_loss(toy: Toy, active: Sequence[int], *, guidance: float) -> Tensor:
    """The mean over images, active steps, layers, heads and words, from hooks on queries and keys of every layer."""
    prompts = make_round(toy, FullBackprop(), num_steps=T, num_images=N).batches[0].prompts
    places = [content_tokens(toy.pipeline.tokenizer, prompt) for prompt in prompts]
    rows: list[dict[str, Tensor]] = []
    layers = plan_of(toy).layers
    handles = [
        toy.network.get_submodule(f"{name}.{part}").register_forward_hook(
            lambda module, inputs, output, key=f"{name}.{part}": rows[-1].__setitem__(key, output)
        )
        for name in layers
        for part in ("to_q", "to_k")
    ]
    sampler = make_sampler(toy, make_table(T), guidance=guidance)
    chain = sampler.open(prompts, draw(toy, range(N), 0), None)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        rows.append({})
        return chain.denoise(x, t)

    with torch.no_grad():
        replace(chain, denoise=denoise).run(GradientPlan(frozenset()))
    for handle in handles:
        handle.remove()
    losses = []
    for step in active:
        for name in layers:
            heads = toy.network.get_submodule(name).heads
            query, key = (rows[step][f"{name}.{part}"].unflatten(2, (heads, -1)) for part in ("to_q", "to_k"))
            logits = torch.einsum("bpnd,blnd->bnpl", query, key) / query.shape[-1] ** 0.5
            for image, own in enumerate(places):
                p = logits.softmax(-1)[len(logits) - N + image][..., own]  # (heads, places, words)
                peak = (torch.quantile(p, 0.9, dim=1) - 0.9).square()
                mass = (p.mean(1) - min(1, 0.2 * len(own)) / len(own)).square()
                losses.append((peak + 80 * mass).mean())
    return torch.stack(losses).mean()


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_its_value_is_that_of_maps_noted_apart_over_the_active_steps(guidance: float) -> None:
    """Without adapters merged on either side; the base of comparison is computed image by image and word by word."""
    toy = reading_toy()
    active = [1]
    sampler = make_sampler(toy, make_table(T), guidance=guidance, attention=plan_of(toy), num_kept=T)
    prompts = make_round(toy, FullBackprop(), num_steps=T, num_images=N).batches[0].prompts
    chain = sampler.open(prompts, draw(toy, range(N), 0), None)
    found: list[Tensor] = []

    def observe(step: int, x: Tensor, f: Tensor) -> None:
        if step in active:
            assert chain.attended is not None
            found.append(chain.attended.loss_B().mean())

    chain.run(GradientPlan(frozenset(active)), observe=observe)
    expected = own_loss(toy, active, guidance=guidance)
    torch.testing.assert_close(torch.stack(found).mean().detach(), expected, rtol=1e-6, atol=0)  # 0.2 in float32


@pytest.mark.slow
def test_its_gradient_in_the_adapters_is_that_of_finite_differences() -> None:
    """All steps active, so that nothing is truncated; along two random directions and one factor."""
    toy = reading_toy()
    with_it, without = gradient(FullBackprop(), NOTED), gradient(FullBackprop(), Regularisers())
    found = (with_it - without) / WEIGHT
    assert float(found.norm()) > 1e-3
    generator, step = torch.Generator().manual_seed(2), 1e-5
    for _ in range(2):
        directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in toy.parameters]
        values = []
        for sign in (1, -1):
            for parameter, direction in zip(toy.parameters, directions, strict=True):
                parameter.data.add_(direction, alpha=sign * step)
            values.append(own_loss(toy, range(T), guidance=2.0))
            for parameter, direction in zip(toy.parameters, directions, strict=True):
                parameter.data.add_(direction, alpha=-sign * step)
        expected = (values[0] - values[1]) / (2 * step)
        along = found @ torch.cat([direction.flatten() for direction in directions])
        torch.testing.assert_close(along, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [FullBackprop(), DRaFT(k=1), DRaFTLV(n=2), DRTune(k=2)], ids=repr)
def test_however_activations_are_kept_it_counts_once(estimator: Estimator) -> None:
    kept = gradient(estimator, NOTED, num_kept=T)
    torch.testing.assert_close(gradient(estimator, NOTED), kept, rtol=1e-10, atol=1e-12)
    toy = reading_toy()
    checkpoint_blocks(toy.network, enabled=True, is_told=True)
    torch.testing.assert_close(gradient(estimator, NOTED, toy=toy), kept, rtol=1e-10, atol=1e-12)
    if estimator.has_serial_mode:
        serial = gradient(estimator, NOTED, is_serial=True)
        torch.testing.assert_close(serial, kept, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_it_adds_to_drift() -> None:
    none, noted = gradient(FullBackprop(), Regularisers()), gradient(FullBackprop(), NOTED)
    drift, both = (
        gradient(FullBackprop(), Regularisers(drift=0.5)),
        gradient(FullBackprop(), Regularisers(attention=WEIGHT, drift=0.5)),
    )
    torch.testing.assert_close(both - none, (noted - none) + (drift - none), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [FullBackprop(), DDPO()], ids=repr)
def test_micro_batches_and_workers_add_up(estimator: Estimator) -> None:
    settings = {"num_steps": T, "num_images": 4, "guidance": 2.0, "regularisers": NOTED}
    toy = reading_toy()
    whole = gradient(estimator, NOTED, num_images=4)
    assert float((whole - gradient(estimator, Regularisers(), num_images=4)).norm()) > 1e-3
    torch.testing.assert_close(gradient(estimator, NOTED, num_images=4, micro_batch=1), whole, rtol=1e-9, atol=1e-11)
    for _, round in on_workers(2, toy, estimator, attention=plan_of(toy), **settings):
        torch.testing.assert_close(round.update.gradients[0], whole, rtol=1e-9, atol=1e-11)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_noting_changes_no_image() -> None:
    toy = reading_toy()
    fill(toy.network, 0.1)
    images = []
    for plan in (None, plan_of(toy)):
        sampler = make_sampler(toy, make_table(T), guidance=2.0, attention=plan, num_kept=T)
        x = sampler.latents(("a cat", "one fox"), draw(toy, range(N), 0), plan=GradientPlan.last(1, T), noise=None)
        images.append(x.detach())
    assert torch.equal(*images)
