import pytest
import torch

from rltune.training.streams import Stream, drawn_prompts, generator, noise, prompt_indices


def test_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    together = noise(7, Stream.LATENT, [(4,), (5,), (6,)], (2, 3))
    alone = torch.cat([noise(7, Stream.LATENT, [(i,)], (2, 3)) for i in (4, 5, 6)])
    assert torch.equal(together, alone)


def test_noise_is_standard_normal_and_differs_by_every_key() -> None:
    shape = (4, 64, 64)
    draws = [
        noise(7, Stream.LATENT, [(0,)], shape),
        noise(8, Stream.LATENT, [(0,)], shape),
        noise(7, Stream.EVAL_LATENT, [(0,)], shape),
        noise(7, Stream.LATENT, [(1,)], shape),
        noise(7, Stream.STEP_NOISE, [(0, 0)], shape),
        noise(7, Stream.STEP_NOISE, [(0, 1)], shape),
    ]
    flat = torch.cat(draws).flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(len(draws))
    bound = 5 / flat.shape[1] ** 0.5  # five standard errors of a mean of N independent terms of variance 1
    assert correlation.abs().max() < bound
    assert flat.mean().abs() < bound
    assert (flat.var() - 1).abs() < 2 * bound


def test_every_prompt_is_shown_once_before_any_again() -> None:
    indices = prompt_indices(3, 0, 15, 5)
    for epoch in range(3):
        assert sorted(indices[5 * epoch : 5 * epoch + 5]) == list(range(5))
    assert indices[:5] != indices[5:10]


def test_prompts_of_an_image_do_not_depend_on_where_the_range_starts() -> None:
    assert prompt_indices(3, 0, 12, 5)[7:12] == prompt_indices(3, 7, 5, 5)


@pytest.mark.parametrize("each", [1, 2, 4])
def test_images_of_a_prompt_follow_each_other(each: int) -> None:
    single = prompt_indices(3, 0, 10, 5)
    assert prompt_indices(3, 0, 10 * each, 5, each) == [index for index in single for _ in range(each)]


def test_a_range_may_start_within_the_images_of_a_prompt() -> None:
    # two workers with six images of a prompt between them
    whole = prompt_indices(3, 24, 24, 5, 6)
    assert prompt_indices(3, 24, 9, 5, 6) + prompt_indices(3, 33, 15, 5, 6) == whole
    assert all(len(set(whole[i : i + 6])) == 1 for i in range(0, 24, 6))


def test_estimator_draws_depend_on_seed_and_step_alone() -> None:
    first = generator(1, Stream.ESTIMATOR, 4).integers(1000, size=5)
    assert (first == generator(1, Stream.ESTIMATOR, 4).integers(1000, size=5)).all()
    assert (first != generator(1, Stream.ESTIMATOR, 5).integers(1000, size=5)).any()


@pytest.mark.parametrize(("num_images", "each"), [(1, 1), (6, 1), (7, 2), (25, 1), (60, 2)])
def test_the_prompts_that_are_drawn_are_those_of_the_images(num_images: int, each: int) -> None:
    shown = prompt_indices(3, 0, num_images, 20, each)
    assert drawn_prompts(3, num_images, 20, each) == sorted(set(shown))
