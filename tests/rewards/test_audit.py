"""The audit of rewards: scores whose dependence on object and ground is known in closed form."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rltune.builtin.render import object_masks, render
from rltune.builtin.scenes import distinct_scenes
from rltune.errors import UserError
from rltune.rewards.audit import VERSIONS, audit, replaced, share
from rltune.rewards.base import Reward

NUM = 12


@pytest.fixture(scope="module")
def objects_B1HW() -> Tensor:
    masks = torch.zeros(NUM, 1, 8, 8, dtype=torch.bool)
    for i, mask in enumerate(masks):
        mask[:, 1 : 4 + i % 3, 2:6] = True
    return masks


@pytest.fixture(scope="module")
def images_B3HW() -> Tensor:
    return torch.rand(NUM, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Weighted(Reward):
    """The sum of the pixels, each times a weight."""

    is_differentiable = True

    def __init__(self, weights_B1HW: Tensor) -> None:
        self.weights_B1HW = weights_B1HW

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        rows = [int(prompt) for prompt in prompts]
        return (images_B3HW * self.weights_B1HW[rows]).sum((1, 2, 3))


PROMPTS = [str(i) for i in range(NUM)]


@pytest.mark.parametrize("part", ["object", "ground"])
def test_the_other_part_stays_and_this_one_is_of_the_image_before_or_one_colour(
    images_B3HW: Tensor, objects_B1HW: Tensor, part: str
) -> None:
    gone = objects_B1HW.expand_as(images_B3HW) if part == "object" else ~objects_B1HW.expand_as(images_B3HW)
    for fill in ("image", "colour"):
        new = replaced(images_B3HW, objects_B1HW, part, fill)
        assert torch.equal(new[~gone], images_B3HW[~gone])
        for i in range(NUM):
            for channel in range(3):
                filled = new[i, channel][gone[i, channel]]
                kept = images_B3HW[i, channel][~gone[i, channel]]
                wanted = images_B3HW[i - 1, channel][gone[i, channel]] if fill == "image" else kept.mean()
                torch.testing.assert_close(filled, wanted.expand_as(filled))


def test_a_score_of_the_object_alone_is_all_the_object_s(images_B3HW: Tensor, objects_B1HW: Tensor) -> None:
    found = audit("object", Weighted(objects_B1HW.float()), images_B3HW, objects_B1HW, PROMPTS)
    assert found.gradient == 1
    assert found.area == pytest.approx(float(objects_B1HW.float().mean()))
    for change in found.changes:
        if change.part == "ground":
            assert (change.mean, change.rms) == (0, 0)
            assert change.correlation == pytest.approx(1)
        else:
            assert change.rms > 0.5
    assert found.shares == {"image": (1.0, 0.0), "colour": (1.0, 0.0)}


def test_changes_are_those_of_the_scores_written_out(images_B3HW: Tensor, objects_B1HW: Tensor) -> None:
    weights = torch.where(objects_B1HW, 1.0, 0.25)
    found = audit("both", Weighted(weights), images_B3HW, objects_B1HW, PROMPTS)
    own = (images_B3HW.double() * weights).sum((1, 2, 3)).numpy()
    for change, (part, fill), values in zip(found.changes, VERSIONS, found.versions_VB, strict=True):
        new = (replaced(images_B3HW, objects_B1HW, part, fill).double() * weights).sum((1, 2, 3)).numpy()
        np.testing.assert_allclose(values, new, rtol=1e-5)
        assert change.mean == pytest.approx((new - own).mean(), abs=1e-4)
        assert change.rms == pytest.approx(np.sqrt(((new - own) ** 2).mean()), rel=1e-4)
        assert change.half == pytest.approx(2.201 * (new - own).std(ddof=1) / NUM**0.5, rel=1e-3)  # t of 11 degrees
        assert change.correlation == pytest.approx(np.corrcoef(own, new)[0, 1], abs=1e-5)
    # the gradient is the weight itself
    area = float(objects_B1HW.double().mean())
    assert found.gradient == pytest.approx(area / (area + (1 - area) / 16))


def test_the_interval_of_a_share_is_that_of_a_ratio() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.exponential(2, 4000), rng.exponential(1, 4000)
    value, half = share(a, b)
    assert value == a.sum() / (a + b).sum()
    residual = a - value * (a + b)  # the delta method
    assert half == pytest.approx(1.96 * residual.std() / 4000**0.5 / (a + b).mean(), rel=0.01)
    assert share(np.zeros(3), np.zeros(3)) == (0.5, 0)


def test_a_score_without_gradient_or_spread_says_so(images_B3HW: Tensor, objects_B1HW: Tensor) -> None:
    class Constant(Reward):
        is_differentiable = False

        def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
            return torch.ones(len(prompts))

    found = audit("constant", Constant(), images_B3HW, objects_B1HW, PROMPTS)
    assert found.gradient is None
    assert {change.correlation for change in found.changes} == {None}


def test_what_cannot_be_audited_is_said(images_B3HW: Tensor, objects_B1HW: Tensor) -> None:
    class Comparing(Weighted):
        sees_group = True

    reward = Weighted(objects_B1HW.float())
    with pytest.raises(UserError, match="compares the images of a prompt"):
        audit("pairs", Comparing(objects_B1HW.float()), images_B3HW, objects_B1HW, PROMPTS)
    with pytest.raises(UserError, match="got 1; give two or more"):
        audit("one", reward, images_B3HW[:1], objects_B1HW[:1], PROMPTS[:1])
    for mask, what in ((torch.zeros_like, "nothing"), (torch.ones_like, "everything")):
        masks = objects_B1HW.clone()
        masks[4] = mask(masks[4])
        with pytest.raises(UserError, match=f"number 5 marks {what}"):
            audit("masks", reward, images_B3HW, masks, PROMPTS)


def test_outside_its_objects_a_scene_is_its_ground() -> None:
    scenes = distinct_scenes(1, 32, is_heldout=False)
    assert 0 < sum(scene.style.has_shadow for scene in scenes) < 32
    masks, pictures = object_masks(scenes), render(scenes)
    grounds = render([replace(scene, placed=()) for scene in scenes])
    apart = (pictures - grounds).abs().amax(1, keepdim=True)
    assert float(apart[~masks].max()) < 0.05
    assert float(apart[masks].mean()) > 0.2
    is_lit = torch.tensor([not scene.style.has_shadow for scene in scenes])
    assert float(apart[is_lit][~masks[is_lit]].max()) == 0
