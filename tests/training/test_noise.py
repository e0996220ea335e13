"""The noise as what is optimised: gradients against finite differences and closed forms, and what is kept of it."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.diffusion.chain import NO_GRADIENT, StepNoise
from rltune.diffusion.sampler import Sampler
from rltune.errors import NonFiniteError, UserError
from rltune.training.model_cache import load_base_model
from rltune.training.noise import Ascent, gradient_plan, optimise_noise
from rltune.training.sampling import make_sampler as sampler_of
from tests.toys import CPU, PROMPTS, Toy, draw, line_toy, make_sampler, make_table, perceptron_toy, toy_reward

Make = Callable[..., RunConfig]


def start(toy: Toy, num_images: int = 3) -> tuple[Sequence[str], Tensor]:
    return PROMPTS[:num_images], draw(toy, range(num_images), 0)


def norms(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.flatten(1).norm(dim=1)


def value(sampler: Sampler, prompts: Sequence[str], x_BCHW: Tensor, noise: StepNoise | None = None) -> Tensor:
    """The toy reward of a chain with gradient, since others merge adapters into the weights, which bfloat16 rounds."""
    x0_BCHW = sampler.latents(prompts, x_BCHW, plan=gradient_plan(sampler, None), noise=noise)
    return toy_reward(sampler.decode(x0_BCHW), prompts).detach()


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The gradients that the ascent is given, which moves nothing."""
    seen: list[Tensor] = []

    def step(self: Ascent, x_BCHW: Tensor, slope_BCHW: Tensor) -> Tensor:
        seen.append(slope_BCHW)
        return x_BCHW

    monkeypatch.setattr(Ascent, "step", step)
    return seen


@pytest.mark.long
def test_the_gradient_is_the_slope_of_a_whole_pipeline(make_config: Make, gradients: list[Tensor]) -> None:
    """Text encoder, network with guidance, scheduler, decoder and reward: in float64 along random directions."""
    config = make_config(sampler={"steps": 3, "guidance": 3.0})
    model = load_base_model(config, CPU, dtype=torch.float64)
    sampler = sampler_of(config, model)
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    prompts = ["a cat", "two red birds"]
    weight_B3HW = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)

    def reward(images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return (weight_B3HW * images_B3HW.square()).flatten(1).sum(1)

    optimise_noise(sampler, prompts, x_BCHW, reward, num_steps=1)
    (slope_BCHW,) = gradients

    def total(x_BCHW: Tensor) -> float:
        with torch.no_grad():
            x0_BCHW = sampler.latents(prompts, x_BCHW, plan=NO_GRADIENT, noise=None)
            return float(reward(sampler.decode(x0_BCHW), prompts).sum())

    assert slope_BCHW.dtype == torch.float64
    for _ in range(3):
        direction_BCHW = torch.randn(x_BCHW.shape, generator=generator, dtype=torch.float64)
        step_BCHW = 1e-5 * direction_BCHW
        rise = (total(x_BCHW + step_BCHW) - total(x_BCHW - step_BCHW)) / 2e-5
        # truncation is of the order of (1e-5)^2, rounding of 1e-15 / 1e-5
        assert rise == pytest.approx(float((slope_BCHW * direction_BCHW).sum()), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("k", [None, 4, 3, 1])
def test_the_gradient_of_the_last_k_steps_passes_the_others_by_their_linear_terms(
    gradients: list[Tensor], k: int | None
) -> None:
    """x_0 = prod (a_k + b_k w m) x_T; of a step without gradient a_k alone is left."""
    toy, table = line_toy(), make_table(4)
    prompts, x_BCHW = start(toy)
    optimise_noise(make_sampler(toy, table), prompts, x_BCHW, lambda x, p: x.flatten(1).sum(1), num_steps=1, k=k)
    with torch.no_grad():
        ones_BCHW = torch.ones_like(x_BCHW)
        f_BCHW = toy.run(ones_BCHW, table.timesteps_T[0], toy.texts(prompts))
    factor_BCHW = torch.ones_like(x_BCHW)
    for step in range(4):
        is_active = step >= 4 - (k or 4)
        factor_BCHW *= float(table.a_T[step]) + (float(table.b_T[step]) * f_BCHW if is_active else 0)
    torch.testing.assert_close(gradients[0], factor_BCHW, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_the_noise_climbs_to_the_best_of_its_norm() -> None:
    """On a linear network the objective is <g, x_T>: on a sphere at most |g| |x_T|, where x_T is along g."""
    toy, table = line_toy(), make_table(4)
    sampler = make_sampler(toy, table)
    prompts, x_BCHW = start(toy)
    slope_3HW = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 2, 2)

    def reward(images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return (slope_3HW * images_B3HW).flatten(1).sum(1)

    found = optimise_noise(sampler, prompts, x_BCHW, reward, num_steps=80, lr=0.1)
    with torch.no_grad():
        factor_B = reward(sampler.latents(prompts, x_BCHW, plan=NO_GRADIENT, noise=None), prompts) / reward(x_BCHW, ())
    # all gradients are along g, and so is their mean
    radius_B111 = norms(x_BCHW).view(-1, 1, 1, 1)
    uphill_B3HW = factor_B.sign().view(-1, 1, 1, 1) * slope_3HW / slope_3HW.norm()
    expected_BCHW, rows = x_BCHW, []
    for _ in range(81):
        rows.append(factor_B * reward(expected_BCHW, ()))
        expected_BCHW = expected_BCHW + 0.1 * radius_B111 * uphill_B3HW
        expected_BCHW = expected_BCHW * radius_B111 / norms(expected_BCHW).view(-1, 1, 1, 1)
    torch.testing.assert_close(found.objective_SB, torch.stack(rows), rtol=1e-10, atol=1e-10)
    most_B = factor_B.abs() * slope_3HW.norm() * norms(x_BCHW)
    torch.testing.assert_close(found.objective_SB[-1], most_B, rtol=1e-6, atol=0)  # the angle shrinks by 0.9 a step
    assert (found.objective_SB.diff(dim=0) > -1e-12).all()
    torch.testing.assert_close(norms(found.x_BCHW), norms(x_BCHW), rtol=1e-12, atol=0)


def test_a_step_is_along_the_mean_direction_of_the_gradients_whatever_their_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BCHW, *slopes = torch.randn(4, 2, 3, 2, 2, generator=generator, dtype=torch.float64)
    radius_B111 = norms(x_BCHW).view(-1, 1, 1, 1)
    ascent, scaled = (Ascent(radius_B111, 0.2, momentum=0.5) for _ in range(2))
    units = [slope_BCHW / norms(slope_BCHW).view(-1, 1, 1, 1) for slope_BCHW in slopes]
    means = [units[0], (units[0] + 2 * units[1]) / 3, (units[0] + 2 * units[1] + 4 * units[2]) / 7]
    other_BCHW = x_BCHW
    for slope_BCHW, mean_BCHW, length in zip(slopes, means, (1.0, 1e12, 1e-12), strict=True):
        expected_BCHW = x_BCHW + 0.2 * radius_B111 * mean_BCHW
        expected_BCHW = expected_BCHW / norms(expected_BCHW).view(-1, 1, 1, 1) * radius_B111
        x_BCHW = ascent.step(x_BCHW, slope_BCHW)
        other_BCHW = scaled.step(other_BCHW, length * slope_BCHW)
        torch.testing.assert_close(x_BCHW, expected_BCHW, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other_BCHW, expected_BCHW, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_noise_keeps_its_norm_in_float32_and_its_best_iterate_is_returned(dtype: torch.dtype, eta: float) -> None:
    """Of an objective that goes up and down at such a rate."""
    toy = perceptron_toy(dtype)

    def reward(images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return (40 * toy_reward(images_B3HW, prompts)).sin()

    sampler = make_sampler(toy, make_table(4, eta), guidance=2.0)
    prompts, x_BCHW = start(toy, 4)
    kept_BCHW = x_BCHW.clone()
    noise = (lambda k: draw(toy, range(4), 1, k)) if eta > 0 else None
    found = optimise_noise(sampler, prompts, x_BCHW.to(dtype), reward, noise=noise, num_steps=12, lr=0.5)
    again = optimise_noise(sampler, prompts, x_BCHW.to(dtype), reward, noise=noise, num_steps=12, lr=0.5)
    assert torch.equal(found.x_BCHW, again.x_BCHW)
    assert torch.equal(x_BCHW, kept_BCHW)
    assert found.x_BCHW.dtype == torch.float32
    assert not found.x_BCHW.requires_grad
    # bfloat16 rounds what is started from, not what becomes of it: a float32 norm
    torch.testing.assert_close(norms(found.x_BCHW), norms(x_BCHW.to(dtype).float()), rtol=1e-5, atol=0)
    assert found.objective_SB.shape == (13, 4)
    best_B = found.objective_SB.amax(dim=0)
    assert (best_B > found.objective_SB[0]).any()
    assert (found.best_B < 12).any()
    torch.testing.assert_close((40 * value(sampler, prompts, found.x_BCHW, noise)).sin(), best_B, rtol=0, atol=1e-6)


def test_nothing_gained_is_the_noise_as_it_was() -> None:
    """A first step so long that it goes beyond the best, and the reward's own slope is against it."""
    toy = line_toy()
    sampler = make_sampler(toy, make_table(4))
    prompts, x_BCHW = start(toy)
    with torch.no_grad():
        best_BCHW = sampler.latents(prompts, x_BCHW, plan=NO_GRADIENT, noise=None) + 1e-3
    found = optimise_noise(
        sampler, prompts, x_BCHW, lambda x, p: -(x - best_BCHW).square().flatten(1).sum(1), num_steps=3, lr=5.0
    )
    assert torch.equal(found.x_BCHW, x_BCHW)
    assert found.best_B.tolist() == [0, 0, 0]


@pytest.mark.slow
def test_what_becomes_of_an_image_does_not_depend_on_the_others() -> None:
    """Objective, norm and optimiser's state are each image's own: in float64, where rounding does not grow."""
    toy = perceptron_toy()
    sampler = make_sampler(toy, make_table(4), guidance=2.0)
    prompts, x_BCHW = start(toy, 3)
    whole = optimise_noise(sampler, prompts, x_BCHW, toy_reward, num_steps=8, lr=0.3)
    others_BCHW = torch.cat([x_BCHW[:1], 3 * x_BCHW[1:].flip(0)])
    mixed = optimise_noise(sampler, [prompts[0], *prompts[:2]], others_BCHW, toy_reward, num_steps=8, lr=0.3)
    torch.testing.assert_close(mixed.x_BCHW[0], whole.x_BCHW[0], rtol=1e-9, atol=1e-9)
    for i in range(3):
        alone = optimise_noise(sampler, prompts[i : i + 1], x_BCHW[i : i + 1], toy_reward, num_steps=8, lr=0.3)
        torch.testing.assert_close(alone.x_BCHW[0], whole.x_BCHW[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.objective_SB[:, 0], whole.objective_SB[:, i], rtol=1e-9, atol=1e-9)
    assert (whole.objective_SB[-1] > whole.objective_SB[0]).all()


def test_adapters_count_and_stay_as_they_are() -> None:
    toy = perceptron_toy()
    sampler = make_sampler(toy, make_table(4))
    prompts, x_BCHW = start(toy)
    before = [parameter.detach().clone() for parameter in toy.parameters]
    found = optimise_noise(sampler, prompts, x_BCHW, toy_reward, num_steps=2)
    for parameter, kept in zip(toy.parameters, before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, kept)
    for parameter in toy.parameters:
        parameter.data.zero_()
    other = optimise_noise(sampler, prompts, x_BCHW, toy_reward, num_steps=2)
    assert not torch.allclose(found.objective_SB, other.objective_SB, atol=1e-4)


def spoilt(images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    return toy_reward(images_B3HW, prompts) / torch.tensor([0.0 if "two" in prompt else 1.0 for prompt in prompts])


def kinked(images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    hole_B = torch.tensor([0.0 if "two" in prompt else 1.0 for prompt in prompts])
    return (images_B3HW.flatten(1).sum(1) * hole_B).abs().sqrt()


@pytest.mark.parametrize(
    ("reward", "error", "words"),
    [
        (spoilt, NonFiniteError, r"noise, step 1: the objective for 'two red birds' is not finite, got (-?inf|nan)"),
        (
            kinked,
            NonFiniteError,
            r"step 1: the gradient .* for 'two red birds' is not finite, got a norm of nan",
        ),
        (
            lambda x, p: 0 * x.flatten(1).sum(1) + 1,
            NonFiniteError,
            r"gradient .* for 'a cat' is exactly zero: it does not depend on the image; lower the rate or k",
        ),
        (lambda x, p: x.detach().flatten(1).sum(1), UserError, "the objective has no gradient in the images"),
        (lambda x, p: x.sum(), ValueError, r"objective: must be of shape \(3,\), got \(\)"),
    ],
)
def test_an_objective_that_leads_nowhere_is_refused(
    reward: Callable[[Tensor, Sequence[str]], Tensor], error: type[Exception], words: str
) -> None:
    toy = line_toy()
    with pytest.raises(error, match=words):
        optimise_noise(make_sampler(toy, make_table(4)), *start(toy), reward)


def test_images_that_are_no_numbers_are_refused() -> None:
    toy = line_toy()
    prompts, x_BCHW = start(toy)
    x_BCHW[1] = float("nan")
    with pytest.raises(NonFiniteError, match="images that are not finite, for 'two red birds'"):
        optimise_noise(make_sampler(toy, make_table(4)), prompts, x_BCHW, toy_reward)


def test_a_reward_that_is_capped_ends_at_its_cap() -> None:
    """The gradient is zero there, which is no fault once something was gained."""
    toy = line_toy()
    sampler = make_sampler(toy, make_table(4))
    prompts, x_BCHW = start(toy)
    plain_B = value(sampler, prompts, x_BCHW)
    found = optimise_noise(
        sampler, prompts, x_BCHW, lambda x, p: toy_reward(x, p).clamp(max=plain_B + 0.01), num_steps=20
    )
    torch.testing.assert_close(found.objective_SB.amax(0), plain_B + 0.01, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_k_must_fit_the_sampling_steps(k: int) -> None:
    toy = line_toy()
    with pytest.raises(UserError, match=rf"k must be in 1..4, the sampling steps, got {k}"):
        optimise_noise(make_sampler(toy, make_table(4)), *start(toy), toy_reward, k=k)


def test_no_gradient_passes_steps_of_the_base_model() -> None:
    toy = line_toy()
    with pytest.raises(UserError, match="the first 2 steps are left to the base model"):
        optimise_noise(make_sampler(toy, make_table(4), num_base_steps=2), *start(toy), toy_reward)


@pytest.mark.long
def test_the_built_in_model_is_led_by_its_own_reward() -> None:
    from rltune.rewards.base import REWARDS

    config = RunConfig.model_validate({"rewards": {"aesthetic": {}}, "sampler": {"steps": 4}})
    sampler = sampler_of(config, load_base_model(config, CPU))
    x_BCHW = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a red star on a white background", "two blue circles on a black background"]
    found = optimise_noise(sampler, prompts, x_BCHW, REWARDS.build("aesthetic", {}), num_steps=3)
    assert found.objective_SB.amax(0).mean() > found.objective_SB[0].mean() + 0.1
    torch.testing.assert_close(norms(found.x_BCHW), norms(x_BCHW), rtol=1e-5, atol=0)
