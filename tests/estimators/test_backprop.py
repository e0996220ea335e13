"""Gradients through the chain: in closed form on f = w m x, and by plain autograd through diffusers' own sampler."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rltune.diffusion.chain import GradientPlan
from rltune.diffusion.table import ChainTable
from rltune.estimators.alignprop import AlignProp
from rltune.estimators.backprop import follow
from rltune.estimators.base import Estimator, Regularisers
from rltune.estimators.draft import DRaFT, DRaFTLV
from rltune.estimators.drtune import DRTune
from rltune.estimators.full import FullBackprop
from rltune.estimators.refl import ReFL
from tests.toys import (
    Recorder,
    Toy,
    ToyMixture,
    double_scheduler,
    draw,
    flat_gradient,
    gradients_of,
    guided,
    line_toy,
    make_round,
    make_table,
    perceptron_toy,
    slope_of,
    toy_reward,
    unet_toy,
)

T = 5
N = 2
GUIDANCE = 3.0
SEED = 11
BASE_W = 0.25
ALPHA = 2.0


class Known:
    """The chain of f = v x, v = (w_0 + alpha B A) m for guided prompt means m, and what can be said of it by hand.

    An image is given as its latents and their derivative in v, so that ``gradient`` is what is left to write.
    """

    def __init__(self, toy: Toy, guidance: float = GUIDANCE) -> None:
        self.table: ChainTable = make_table(T)
        self.prompts = make_round(toy, FullBackprop(), num_images=N).batches[0].prompts
        texts, negative = toy.texts(self.prompts), toy.texts([""])
        means_N = negative.mean() + guidance * (texts.mean((1, 2)) - negative.mean())
        self.m = means_N.view(-1, 1, 1, 1)
        self.a_rank, self.b_rank = (parameter.item() for parameter in toy.parameters)
        self.w = BASE_W + ALPHA * self.a_rank * self.b_rank
        self.v = self.w * self.m
        self.x = [draw(toy, range(N), 0)]
        for k in range(T):
            self.x.append((self.table.a_T[k] + self.table.b_T[k] * self.v) * self.x[-1])

    def end(self, active: set[int], *, is_through_latent: bool = True) -> tuple[Tensor, Tensor]:
        """x_T = x prod_k (a_k + b_k v): an active factor i gives b_i x_i, carried on by the later factors' sum."""
        slope = torch.zeros_like(self.x[0])
        for i in active:
            carried = self.table.b_T[i] * self.x[i]
            for j in range(i + 1, T):
                # only an active step's network passes on a change of its input, and only if it is not detached
                passes_on = is_through_latent and j in active
                carried = (self.table.a_T[j] + (self.table.b_T[j] * self.v if passes_on else 0)) * carried
            slope = slope + carried
        return self.x[T], slope

    def clean(self, scored: int, active: set[int]) -> tuple[Tensor, Tensor]:
        """(d_s + e_s v) x_s, where x_s moves with the detached active steps before it."""
        d, e = self.table.d_T[scored], self.table.e_T[scored]
        slope = e * self.x[scored] if scored in active else torch.zeros_like(self.x[0])
        for i in active - {scored}:
            slope = slope + d * self.table.b_T[i] * self.table.a_T[i + 1 : scored].prod() * self.x[i]
        return (d + e * self.v) * self.x[scored], slope

    def gradient(self, images: tuple[Tensor, Tensor]) -> Tensor:
        """Of -mean r in the adapters A, B."""
        x, slope = images
        reward_slope = slope_of(x, self.prompts) - x / 20
        return self.of_w(-(reward_slope * slope * self.m).sum() / N)

    def of_w(self, slope_in_w: Tensor) -> Tensor:
        """Of a loss whose derivative in w is known."""
        return slope_in_w * ALPHA * torch.tensor([self.b_rank, self.a_rank], dtype=torch.float64)


def close(gradient: Tensor, expected: Tensor, rtol: float = 1e-11) -> None:
    assert float(expected.norm()) > 0
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=rtol * float(expected.norm()))


def line_gradient(estimator: Estimator, **settings: Any) -> Tensor:
    toy = line_toy(BASE_W, alpha=ALPHA)
    (gradient,) = gradients_of(
        estimator, make_round(toy, estimator, num_steps=T, num_images=N, guidance=GUIDANCE, **settings)
    )
    return gradient


@pytest.mark.parametrize(
    ("estimator", "k"),
    [
        (FullBackprop(), T),
        (AlignProp(k=2, draw="fixed"), 2),
        (AlignProp(k=T, draw="fixed"), T),
        (DRaFT(), 1),
        (DRaFT(k=3), 3),
    ],
    ids=repr,
)
def test_truncated_backpropagation_in_closed_form(estimator: Estimator, k: int) -> None:
    known = Known(line_toy(BASE_W, alpha=ALPHA))
    close(line_gradient(estimator), known.gradient(known.end(set(range(T - k, T)))))


def test_full_backpropagation_is_the_derivative_of_the_product() -> None:
    """x_0 = x_T prod_k (a_k + b_k v), differentiated by the product rule."""
    known = Known(line_toy(BASE_W, alpha=ALPHA))
    factors = [known.table.a_T[k] + known.table.b_T[k] * known.v for k in range(T)]
    slope = torch.zeros_like(known.x[0])
    for i in range(T):
        others = torch.stack([factors[j] for j in range(T) if j != i]).prod(0)
        slope = slope + known.table.b_T[i] * others * known.x[0]
    close(line_gradient(FullBackprop()), known.gradient((known.x[T], slope)))


@pytest.mark.parametrize("active", [{0, 3}, {1, 2, 4}])
@pytest.mark.parametrize("is_through_latent", [True, False])
def test_steps_with_gaps_in_closed_form(active: set[int], is_through_latent: bool) -> None:
    toy = line_toy(BASE_W, alpha=ALPHA)
    round = make_round(toy, FullBackprop(), num_steps=T, num_images=N, guidance=GUIDANCE)
    follow(round, GradientPlan(frozenset(active), is_through_latent))
    known = Known(toy)
    assert isinstance(round.update, Recorder)
    close(round.update.gradients[0], known.gradient(known.end(active, is_through_latent=is_through_latent)))


@pytest.mark.parametrize("is_serial", [False, True])
@pytest.mark.parametrize("num_copies", [0, 1, 3])
def test_draft_lv_in_closed_form(num_copies: int, is_serial: bool) -> None:
    """The mean over the image and its copies: x' = sqrt(abar) x_0 + sqrt(1 - abar) eps at the last step's level."""
    toy = line_toy(BASE_W, alpha=ALPHA)
    known, last = Known(toy), T - 1
    alpha_bar = double_scheduler(T).alphas_cumprod[int(known.table.timesteps_T[last])]
    parts = [known.gradient(known.end({last}))]
    for copy in range(num_copies):
        noised = alpha_bar.sqrt() * known.x[T] + (1 - alpha_bar).sqrt() * draw(toy, range(N), 2, copy)
        d, e = known.table.d_T[last], known.table.e_T[last]
        parts.append(known.gradient(((d + e * known.v) * noised, e * noised)))
    close(line_gradient(DRaFTLV(n=num_copies), is_serial=is_serial), torch.stack(parts).mean(0))


@pytest.mark.parametrize("is_serial", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_refl_in_closed_form(seed: int, is_serial: bool) -> None:
    known, estimator = Known(line_toy(BASE_W, alpha=ALPHA)), ReFL(window=1.0)
    scored = estimator.plan(T, np.random.default_rng(seed)).scored
    assert scored is not None
    expected = known.gradient(known.clean(scored, {scored}))
    close(line_gradient(estimator, seed=seed, is_serial=is_serial), expected)


@pytest.mark.parametrize("is_serial", [False, True])
@pytest.mark.parametrize("early_stop", [0.0, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_drtune_in_closed_form(seed: int, early_stop: float, is_serial: bool) -> None:
    known, estimator = Known(line_toy(BASE_W, alpha=ALPHA)), DRTune(k=2, early_stop=early_stop)
    plan = estimator.plan(T, np.random.default_rng(seed))
    active = set(plan.active)
    assert len(active) == 2
    if early_stop == 0:
        assert plan.scored is None
        images = known.end(active, is_through_latent=False)
    else:
        assert plan.scored is not None
        images = known.clean(plan.scored, active)
    close(line_gradient(estimator, seed=seed, is_serial=is_serial), known.gradient(images))


# ---- plain autograd through diffusers' scheduler: every step written out as the paper's own code has it


Score = Callable[[Tensor], Tensor]


class Unrolled:
    """Diffusers' sampler in float64 on the tiny UNet with guidance, network calls with gradient unless detached."""

    def __init__(self, toy: Toy, eta: float) -> None:
        self.toy, self.eta = toy, eta
        self.scheduler = double_scheduler(T)
        self.prompts = make_round(toy, FullBackprop(), num_images=N).batches[0].prompts
        self.denoise = guided(toy, self.prompts, GUIDANCE)

    def step(self, k: int, f: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        noise = {"variance_noise": draw(self.toy, range(N), 1, k)} if self.eta > 0 else {}
        out = self.scheduler.step(f, self.scheduler.timesteps[k], x, eta=self.eta, **noise)
        return out.prev_sample, out.pred_original_sample

    def truncated(self, active: set[int]) -> Tensor:
        """AlignProp: the prediction of the other steps is detached, the latent is not."""
        x = draw(self.toy, range(N), 0)
        for k, t in enumerate(self.scheduler.timesteps):
            f = self.denoise(x, t)
            x, _ = self.step(k, f if k in active else f.detach(), x)
        return x

    def input_detached(self, active: set[int], scored: int | None) -> Tensor:
        """DRTune, and with one step ReFL: the network's input is detached at every step."""
        x = draw(self.toy, range(N), 0)
        for k, t in enumerate(self.scheduler.timesteps):
            f = self.denoise(x.detach(), t)
            x, clean = self.step(k, f if k in active else f.detach(), x)
            if k == scored:
                return clean
        return x

    def copies(self, x_0: Tensor, count: int) -> list[Tensor]:
        """DRaFT-LV: noise again to the last timestep, predict the clean image."""
        t = self.scheduler.timesteps[-1]
        images = []
        for copy in range(count):
            noise = draw(self.toy, range(N), 2, copy)
            # add_noise has its square roots in the schedule's own precision
            noised = self.scheduler.add_noise(x_0.detach(), noise, t.view(1))
            images.append(self.step(T - 1, self.denoise(noised, t), noised)[1])
        return images

    def gradient(self, *images: Tensor) -> Tensor:
        rewards = [toy_reward(self.toy.decode(x), self.prompts).mean() for x in images]
        return flat_gradient(-sum(rewards, torch.zeros(())) / len(images), self.toy.parameters)


def expected_gradient(estimator: Estimator, unrolled: Unrolled) -> Tensor:
    rng = np.random.default_rng(SEED)
    match estimator:
        case FullBackprop():
            return unrolled.gradient(unrolled.truncated(set(range(T))))
        case DRaFT(k=k):
            return unrolled.gradient(unrolled.truncated(set(range(T - k, T))))
        case AlignProp():
            return unrolled.gradient(unrolled.truncated(set(estimator.plan(T, rng).active)))
        case ReFL() | DRTune():
            plan = estimator.plan(T, rng)
            return unrolled.gradient(unrolled.input_detached(set(plan.active), plan.scored))
        case DRaFTLV(n=n):
            x_0 = unrolled.truncated({T - 1})
            return unrolled.gradient(x_0, *unrolled.copies(x_0, n))
    raise AssertionError(estimator)


UNROLLED: list[Estimator] = [
    FullBackprop(),
    AlignProp(k=3, draw="fixed"),
    AlignProp(draw="per_step"),
    DRaFT(),
    DRaFT(k=2),
    DRaFTLV(),
    ReFL(window=0.6),
    DRTune(k=2),
    DRTune(k=2, early_stop=0.0),
]


# without noise each is known in closed form, above
@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "eta"), [(FullBackprop(), 0.0), *((estimator, 1.0) for estimator in UNROLLED)], ids=repr
)
def test_gradient_is_that_of_plain_autograd_through_the_unrolled_sampler(estimator: Estimator, eta: float) -> None:
    toy = unet_toy()
    expected = expected_gradient(estimator, Unrolled(toy, eta))
    for is_serial in (False, True) if estimator.has_serial_mode else (False,):
        settings = {"num_steps": T, "num_images": N, "guidance": GUIDANCE, "eta": eta, "seed": SEED}
        round = make_round(toy, estimator, is_serial=is_serial, num_kept=1, **settings)
        (gradient,) = gradients_of(estimator, round)
        close(gradient, expected, 1e-8)  # float64: what is left is the order of a few thousand additions


def test_a_per_step_draw_here_has_gaps() -> None:
    """Or the test above would say nothing that ``fixed`` does not."""
    active = sorted(AlignProp(draw="per_step").plan(T, np.random.default_rng(SEED)).active)
    assert active != list(range(T - len(active), T))
    assert len(active) > 1


# ---- regularisers


@pytest.mark.parametrize("is_serial", [False, True])
@pytest.mark.parametrize("early_stop", [0.0, 0.6])
def test_drift_in_closed_form(early_stop: float, is_serial: bool) -> None:
    """mean((w - w_0) m x_k)^2, the mean over images, active steps and elements, inputs held fixed."""
    estimator, drift = DRTune(k=2, early_stop=early_stop), 0.7
    known = Known(line_toy(BASE_W, alpha=ALPHA))
    plan = estimator.plan(T, np.random.default_rng(0))
    slope = sum(2 * (known.w - BASE_W) * (known.m * known.x[k]).square().mean() for k in plan.active) / 2
    with_drift, without = (
        line_gradient(estimator, is_serial=is_serial, regularisers=Regularisers(drift=weight))
        for weight in (drift, 0.0)
    )
    close(with_drift - without, known.of_w(drift * torch.as_tensor(slope)), 1e-9)


@pytest.mark.parametrize("is_serial", [False, True])
def test_drift_of_copies_is_averaged_as_their_rewards_are(is_serial: bool) -> None:
    toy, drift, num_copies = line_toy(BASE_W, alpha=ALPHA), 0.7, 2
    known, last = Known(toy), T - 1
    alpha_bar = double_scheduler(T).alphas_cumprod[int(known.table.timesteps_T[last])]
    inputs = [known.x[last]]
    for copy in range(num_copies):
        inputs.append(alpha_bar.sqrt() * known.x[T] + (1 - alpha_bar).sqrt() * draw(toy, range(N), 2, copy))
    slope = torch.stack([2 * (known.w - BASE_W) * (known.m * x).square().mean() for x in inputs]).mean()
    with_drift, without = (
        line_gradient(DRaFTLV(num_copies), is_serial=is_serial, regularisers=Regularisers(drift=weight))
        for weight in (drift, 0.0)
    )
    close(with_drift - without, known.of_w(drift * slope), 1e-9)


def test_drift_through_the_latent_is_the_derivative_of_the_penalty() -> None:
    """Of mean(w m x_k(w) - c_k)^2, c_k = w_0 m x_k of the base model a constant, by central differences."""
    toy, drift = line_toy(BASE_W, alpha=ALPHA), 0.7
    start = Known(toy)
    base = [(BASE_W * start.m * start.x[k]).detach() for k in range(T)]

    def penalty() -> float:
        known = Known(toy)
        terms = [(known.w * known.m * known.x[k] - base[k]).square().mean() for k in range(T)]
        return drift * float(torch.stack(terms).mean())

    expected, width = [], 1e-5
    for parameter in toy.parameters:
        ends = []
        for sign in (1, -1):
            parameter.data += sign * width
            ends.append(penalty())
            parameter.data -= sign * width
        expected.append((ends[0] - ends[1]) / (2 * width))
    with_drift, without = (
        line_gradient(FullBackprop(), regularisers=Regularisers(drift=weight)) for weight in (drift, 0.0)
    )
    close(with_drift - without, torch.tensor(expected, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("rho", [0.1, 1.0])
@pytest.mark.parametrize("estimator", [FullBackprop(), DRaFT(k=2)], ids=repr)
def test_flatness_weights_takes_the_gradient_uphill(estimator: Estimator, rho: float) -> None:
    """At theta + rho g / |g|, applied at theta, whose values are back to the bit."""
    toy = line_toy(BASE_W, alpha=ALPHA)
    settings = {"num_steps": T, "num_images": N, "guidance": GUIDANCE}
    active = set(range(T)) if isinstance(estimator, FullBackprop) else {T - 2, T - 1}

    def closed_form(values: Tensor) -> Tensor:
        moved = line_toy(BASE_W, alpha=ALPHA)
        for parameter, value in zip(moved.parameters, values, strict=True):
            parameter.data = value.view_as(parameter)
        known = Known(moved)
        return known.gradient(known.end(active))

    theta = torch.cat([parameter.detach().flatten() for parameter in toy.parameters])
    uphill = closed_form(theta)
    expected = closed_form(theta + rho * uphill / uphill.norm())
    assert float((expected - uphill).norm()) > 1e-3 * float(uphill.norm())
    before = [parameter.detach().clone() for parameter in toy.parameters]
    round = make_round(toy, estimator, regularisers=Regularisers(flatness_weights=rho), **settings)
    (gradient,) = gradients_of(estimator, round)
    close(gradient, expected)
    assert all(torch.equal(*pair) for pair in zip(before, toy.parameters, strict=True))


@pytest.mark.parametrize("micro_batch", [N, 1])
def test_flatness_image_scores_after_a_step_against_the_reward(micro_batch: int) -> None:
    """dr/dx is taken at x - rho s / |s|, s the image's own slope, and carried to the adapters as it is."""
    rho = 0.5
    known = Known(line_toy(BASE_W, alpha=ALPHA))
    x, slope = known.end({T - 1})
    s = slope_of(x, known.prompts) - x / 20
    moved = x - rho * s / s.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    expected = known.gradient((moved, slope))
    assert float((expected - known.gradient((x, slope))).norm()) > 1e-3 * float(expected.norm())
    close(line_gradient(DRaFT(), regularisers=Regularisers(flatness_image=rho), micro_batch=micro_batch), expected)


@pytest.mark.parametrize(
    ("estimator", "regularisers", "num_queries", "num_calls"),
    [
        # of T = 5 steps forward; an active one again, and backward
        (FullBackprop(), Regularisers(), 1, 5 + 5 + 5),
        (DRaFT(k=2), Regularisers(), 1, 5 + 2 + 2),
        (DRaFT(k=2), Regularisers(flatness_weights=0.1), 2, 2 * (5 + 2 + 2)),
        (DRaFT(k=2), Regularisers(flatness_image=0.1), 2, 5 + 2 + 2),
        (DRaFT(k=2), Regularisers(flatness_image=0.1, flatness_weights=0.1), 4, 2 * (5 + 2 + 2)),
        (DRaFT(k=2), Regularisers(drift=0.1), 1, 5 + 2 + 2 + 2),
        (DRaFTLV(n=2), Regularisers(), 3, 5 + 1 + 1 + 2 * (1 + 1 + 1)),
        (DRTune(k=2, early_stop=0.0), Regularisers(), 1, 5 + 2 + 2),
        (ReFL(window=0.2), Regularisers(), 1, 5 + 1 + 1),
    ],
    ids=repr,
)
def test_what_an_image_costs(
    estimator: Estimator, regularisers: Regularisers, num_queries: int, num_calls: int
) -> None:
    round = make_round(line_toy(), estimator, num_steps=T, num_images=3, regularisers=regularisers)
    estimator.train(round)
    assert (round.tally.num_queries, round.tally.num_calls) == (3 * num_queries, 3 * num_calls)


def test_noted_scores_are_those_of_the_images() -> None:
    toy = line_toy(BASE_W, alpha=ALPHA)
    known = Known(toy)
    expected = float(toy_reward(known.x[T], known.prompts).sum())
    for estimator in (FullBackprop(), DRaFTLV(), DRaFT()):
        round = make_round(toy, estimator, num_steps=T, num_images=N, guidance=GUIDANCE, micro_batch=1)
        round = replace(round, regularisers=Regularisers(flatness_weights=0.5), mixture=ToyMixture())  # type: ignore[arg-type]
        estimator.train(round)
        assert round.tally.totals.tolist() == pytest.approx([expected] * 3, rel=1e-12)


def test_scores_are_noted_of_the_images_that_were_drawn() -> None:
    """Not of those that flatness_image moved."""
    totals = []
    for rho in (0.0, 0.5):
        estimator = DRaFT()
        round = make_round(perceptron_toy(), estimator, num_images=N, regularisers=Regularisers(flatness_image=rho))
        estimator.train(round)
        totals.append(round.tally.totals)
    torch.testing.assert_close(*totals, rtol=1e-12, atol=0)


def test_serial_mode_is_refused_where_inputs_are_not_detached() -> None:
    estimator = FullBackprop()
    with pytest.raises(ValueError, match="serial mode needs a plan whose inputs are detached"):
        estimator.train(make_round(perceptron_toy(), estimator, is_serial=True))
