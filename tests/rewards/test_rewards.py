"""The suite that every registered reward passes: the contract of ``rltune.rewards.base.Reward``."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rltune.config.options import options_section
from rltune.errors import UnknownNameError, UserError
from rltune.rewards.base import REWARDS, Reward
from rltune.training.checking import networks_of

PROMPTS = ("a red circle", "two blue stars and an orange ring", "a green cross on a white background")
"""Captions of the built-in world, since some rewards read no others."""
GROUPED = (PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1])
"""Two prompts of two images each, not in order."""
Options = Mapping[str, Mapping[str, Any]]


@pytest.fixture(params=REWARDS.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reward(name: str, reward_options: Options) -> Reward:
    return REWARDS.build(name, reward_options.get(name, {}))


def make_images(num_images: int = 3, height: int = 48, width: int = 48, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(num_images, 3, height // 4 + 1, width // 4 + 1, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (0.1 + 0.8 * smooth + 0.05 * torch.rand(smooth.shape, generator=generator, dtype=torch.float64)).to(dtype)


def prompts_for(reward: Reward, num_images: int) -> tuple[str, ...]:
    """One prompt an image; the same one where images of a prompt are compared, for one alone has nothing to gain."""
    return (PROMPTS[0],) * num_images if reward.sees_group else PROMPTS[:num_images]


def test_a_score_is_a_finite_float32_number_an_image_within_the_stated_range(reward: Reward) -> None:
    images, prompts = make_images(), prompts_for(reward, 3)
    for values in (reward(images, prompts), reward.metric(images, prompts)):
        assert values.shape == (3,)
        assert values.dtype == torch.float32
        assert values.isfinite().all()
    low, high = reward.value_range
    assert low < high
    assert ((low <= reward(images, prompts)) & (reward(images, prompts) <= high)).all()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_flat_image_is_scored_within_the_stated_range(reward: Reward, level: float) -> None:
    values = reward(torch.full((1, 3, 48, 48), level), PROMPTS[:1])
    low, high = reward.value_range
    assert values.isfinite().all()
    # A mean of 6912 float32 numbers, or the norm of a vector, may be off by a few roundings.
    assert low - 1e-6 <= values.item() <= high + 1e-6


@pytest.mark.parametrize("size", [(65, 49), (33, 64), (17, 16), (96, 160)])
def test_any_image_size_is_scored(reward: Reward, size: tuple[int, int]) -> None:
    images, prompts = make_images(2, *size), prompts_for(reward, 2)
    for values in (reward(images, prompts), reward.metric(images, prompts)):
        assert values.shape == (2,)
        assert values.isfinite().all()


def test_the_image_gradient_is_finite_and_reaches_every_image(reward: Reward) -> None:
    if not reward.is_differentiable:
        pytest.skip("says that it is not differentiable")
    images = make_images(3, 65, 49).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, prompts_for(reward, 3)).sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()


def test_the_image_gradient_is_the_slope(name: str, reward_options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    # A float64 twin: rewards cast weights and images with ``float()``, and that is made to mean double here.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.Module, "float", torch.nn.Module.double)
    reward = REWARDS.build(name, reward_options.get(name, {}))
    if not reward.is_differentiable:
        pytest.skip("says that it is not differentiable")
    images = make_images(2, 33, 41, dtype=torch.float64).requires_grad_()
    prompts = prompts_for(reward, 2)
    values = reward(images, prompts)
    assert values.dtype == torch.float64
    (gradient,) = torch.autograd.grad(values.sum(), images)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        step = 1e-6 * direction
        rise = (reward(images + step, prompts) - reward(images - step, prompts)).sum() / 2e-6
        # Rounding: 1e-16 * 10 / 1e-6 = 1e-9, against slopes of 1e-3 and more; truncation: (1e-6)^2, far less.
        assert rise.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-8)


def test_an_image_moves_no_other_score(reward: Reward) -> None:
    if reward.sees_group:
        pytest.skip("says that it compares the images of a prompt")
    images = make_images()
    changed = torch.cat([images[:1] / 2, images[1:]])  # a contrast is blind to 1 - images
    before, after = reward(images, PROMPTS), reward(changed, PROMPTS)
    assert torch.equal(before[1:], after[1:])
    if reward.is_differentiable:  # one that is not may be right or wrong about both pictures alike
        assert before[0] != after[0]
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(reward(images, PROMPTS)[1], images)
        assert gradient[0].abs().max() == 0
        assert gradient[2].abs().max() == 0


def test_an_image_moves_no_score_of_another_prompt(reward: Reward) -> None:
    images = make_images(4)
    changed = torch.cat([images[:1] / 2, images[1:]])
    before, after = reward(images, GROUPED), reward(changed, GROUPED)
    assert torch.equal(before[1::2], after[1::2])
    if reward.is_differentiable:
        assert before[0] != after[0]
        assert (before[2] != after[2]) == reward.sees_group
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(reward(images, GROUPED)[1::2].sum(), images)
        assert gradient[0::2].abs().max() == 0


def test_a_prompt_alone_scores_as_in_a_batch(reward: Reward) -> None:
    images, scores = make_images(4), torch.zeros(4)
    for i in range(2):
        scores[i::2] = reward(images[i::2], GROUPED[i::2])
    # Matrix products of other sizes sum in another order: float32 rounding.
    torch.testing.assert_close(scores, reward(images, GROUPED), rtol=1e-5, atol=1e-5)


def test_a_batch_of_one_scores_as_in_a_batch(reward: Reward) -> None:
    if reward.sees_group:
        pytest.skip("says that it compares the images of a prompt")
    images = make_images()
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    # Matrix products of other sizes sum in another order: float32 rounding.
    torch.testing.assert_close(alone, reward(images, PROMPTS), rtol=1e-5, atol=1e-5)


def test_an_empty_batch_has_no_scores(reward: Reward) -> None:
    for values in (reward(torch.zeros(0, 3, 48, 48), []), reward.metric(torch.zeros(0, 3, 48, 48), [])):
        assert values.shape == (0,)
        assert values.dtype == torch.float32


def test_a_malformed_batch_is_the_callers_fault(reward: Reward) -> None:
    images = make_images(2)
    for bad_images, bad_prompts in (
        (images, PROMPTS),
        (images, PROMPTS[:1]),
        (images, "ab"),
        (images[0], PROMPTS[:3]),
        (images[:, :1], PROMPTS[:2]),
        ((images * 255).byte(), PROMPTS[:2]),
    ):
        with pytest.raises(ValueError, match="must be"):
            reward(bad_images, bad_prompts)
        with pytest.raises(ValueError, match="must be"):
            reward.metric(bad_images, bad_prompts)


def test_low_precision_images_are_scored_in_float32(reward: Reward) -> None:
    images = make_images().bfloat16()
    prompts = prompts_for(reward, 3)
    torch.testing.assert_close(reward(images, prompts), reward(images.float(), prompts), rtol=0, atol=0)


def test_a_reward_moves_and_keeps_its_score(reward: Reward) -> None:
    images, prompts = make_images(), prompts_for(reward, 3)
    before = reward(images, prompts)
    assert torch.equal(reward.to(torch.device("cpu"))(images, prompts), before)


def test_a_reward_moves_all_the_weights_that_it_holds(reward: Reward, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: set[int] = set()

    def to(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        moved.update(map(id, module.modules()))
        return module

    monkeypatch.setattr(torch.nn.Module, "to", to)
    assert reward.to(torch.device("meta")) is reward
    assert [network for network in networks_of(reward) if id(network) not in moved] == []


def test_an_experiment_file_knows_every_option_with_its_text(name: str, reward_options: Options) -> None:
    options = REWARDS.options(name)
    section = options_section(name, options)
    assert [option.name for option in options if not option.text] == []
    assert [option.name for option in options if option.type is Any] == []
    section.model_validate({})
    section.model_validate(reward_options.get(name, {}))


def test_an_unknown_option_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=f"reward '{name}': option 'colour' is unknown; (known:|it takes none)"):
        REWARDS.build(name, {"colour": 1})


def test_an_unknown_reward_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'aesthetic'"):
        REWARDS.build("aestetic", {})
