"""Fine-tuning of a head against counterfactuals: its gradient and its optimum by hand, on features made up for it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rltune.assets import BUILTIN_AESTHETIC_HEAD
from rltune.errors import NonFiniteError, UserError
from rltune.rewards.aesthetic import LAION_WIDTHS, Aesthetic, read_laion_head
from rltune.rewards.base import REWARDS
from rltune.rewards.finetune import Features, Settings, fine_tune, objective, read_features

CPU = torch.device("cpu")
NUM = 600


class Tower:
    """Sees the mean colour of the left half of an image, where its object is, and of the right, its ground."""

    name = "halves"

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 6)

    def image_features(self, images_B3HW: Tensor) -> Tensor:
        half = images_B3HW.shape[-1] // 2
        return torch.cat([images_B3HW[..., :half].mean((2, 3)), images_B3HW[..., half:].mean((2, 3))], dim=1)


def reward_of(head: nn.Module) -> Aesthetic:
    tower: Any = Tower()
    return Aesthetic(tower, head, offset=5.0, scale=2.0)


def linear(weights: Sequence[float], bias: float = 0.0) -> nn.Module:
    head = nn.Sequential(nn.Linear(len(weights), 1))
    with torch.no_grad():
        head[0].weight.copy_(torch.tensor([weights]))
        head[0].bias.fill_(bias)
    return head


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    object_N3, noise_N3 = torch.rand(2, NUM, 3, generator=generator)
    # a colour each for object and ground, which are alike: what one shows, the other nearly does
    flat = torch.stack([object_N3, 0.05 + 0.6 * object_N3 + 0.3 * noise_N3], dim=2)
    images = flat.repeat_interleave(2, dim=2)[:, :, None].expand(NUM, 3, 4, 4).contiguous()
    objects = torch.zeros(NUM, 1, 4, 4, dtype=torch.bool)
    objects[..., :2] = True
    return list(zip(images.split(50), objects.split(50), strict=True))


@pytest.fixture(scope="module")
def features(batches: list[tuple[Tensor, Tensor]]) -> Features:
    return read_features(reward_of(linear([0.0] * 6)), batches, CPU)


def test_features_are_those_of_images_with_a_part_from_the_image_before_or_of_one_colour(features: Features) -> None:
    clean = features.clean_ND.view(-1, 50, 2, 3)  # batch, image, half, colour
    before = clean.roll(1, 1)
    of_object, of_ground = features.replaced_PFND.unflatten(2, (-1, 50)).unflatten(-1, (2, 3))
    torch.testing.assert_close(of_object, torch.stack([
        torch.stack([before[:, :, 0], clean[:, :, 1]], dim=2), torch.stack([clean[:, :, 1], clean[:, :, 1]], dim=2),
    ]))  # fmt: skip
    torch.testing.assert_close(of_ground, torch.stack([
        torch.stack([clean[:, :, 0], before[:, :, 1]], dim=2), torch.stack([clean[:, :, 0], clean[:, :, 0]], dim=2),
    ]))  # fmt: skip


def test_the_gradient_is_that_of_the_formula(features: Features) -> None:
    part, floor, weight, unit = features.pick(torch.arange(7)), -0.3, 1.7, 0.4
    scores = torch.linspace(-1, 1, 7)
    head = linear([0.3, -0.2, 0.5, 0.1, 0.4, -0.6], 0.2)
    objective(head, part, scores, floor=floor, weight=weight, unit=unit).backward()
    w = head[0].weight.detach().double().numpy()[0]
    wanted = np.zeros(7)
    of_object, of_ground = part.replaced_PFND.double().numpy()
    rows = [(part.clean_ND.double().numpy(), scores.numpy(), 1.0)]
    rows += [(x, np.full(7, floor), weight / 2 / 2) for x in of_object]  # of two parts, and of two ways to refill
    rows += [(x, scores.numpy(), weight / 2 / 2) for x in of_ground]
    for x, target, share in rows:
        x1 = np.concatenate([x, np.ones((7, 1))], axis=1)
        wanted += share / unit * 2 * ((x1 @ [*w, 0.2] - target)[:, None] * x1).mean(0)
    np.testing.assert_allclose([*head[0].weight.grad[0], head[0].bias.grad[0]], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_head_that_hangs_on_the_ground_comes_to_the_least_squares_of_the_objective(features: Features) -> None:
    old = [0.2, 0.2, 0.2, 1.0, 1.0, 1.0]  # the ground counts five times as much
    settings = Settings(steps=600, lr=3e-2)
    found = fine_tune(reward_of(linear(old)), features, settings)
    learnt = features.pick(torch.arange(NUM) % 5 != 4)
    scores = learnt.clean_ND.double().numpy() @ old
    floor = np.quantile(scores, 0.05)
    rows = [(learnt.clean_ND, scores, 1.0)]
    rows += [(x, np.full_like(scores, floor), 0.25) for x in learnt.replaced_PFND[0]]
    rows += [(x, scores, 0.25) for x in learnt.replaced_PFND[1]]
    x1 = np.concatenate([share**0.5 * np.c_[x.double().numpy(), np.ones(len(x))] for x, _, share in rows])
    best = np.linalg.lstsq(x1, np.concatenate([share**0.5 * target for _, target, share in rows]), rcond=None)[0]
    new = found.reward.head[0].weight[0].tolist()  # type: ignore[index]
    np.testing.assert_allclose([*new, float(found.reward.head[0].bias)], best, atol=0.03)  # type: ignore[index]
    assert sum(new[3:]) / sum(new) < 0.4 < 0.8 < sum(old[3:]) / sum(old)  # what hangs on the ground
    assert found.after.explained > 0.7
    assert found.after.loss < found.before.loss


def test_without_weight_nothing_is_learnt_and_the_fit_says_so(features: Features) -> None:
    reward = reward_of(linear([1.0, 0.5, 0.2, 0.1, 0.3, 0.7]))
    found = fine_tune(reward, features, Settings(weight=0.0, steps=20))
    assert found.before.explained == 1
    assert found.after.explained == pytest.approx(1, abs=1e-6)
    assert found.before.loss == 0
    held = features.clean_ND[4::5]
    assert found.before.scores[0] == pytest.approx(float(reward.of_features(held).mean()))
    for shown, part in zip(found.before.scores[1:], features.replaced_PFND[:, :, 4::5], strict=True):
        assert shown == pytest.approx(float(reward.of_features(part).mean()))
    assert reward.of_features(held)[0].item() == pytest.approx(5 + 2 * float(reward.head(held[:1])))


def test_the_seed_decides_every_bit_and_the_old_head_stays(features: Features) -> None:
    reward = reward_of(nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 1)))
    before = [value.clone() for value in reward.head.state_dict().values()]
    one, same, other = (fine_tune(reward, features, Settings(steps=30, seed=seed)) for seed in (3, 3, 4))
    weights = [list(found.reward.head.state_dict().values()) for found in (one, same, other)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not torch.equal(weights[0][0], weights[2][0])
    assert not torch.equal(weights[0][0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(before, reward.head.state_dict().values(), strict=True))
    assert not any(value.requires_grad for value in one.reward.head.parameters())


@pytest.mark.slow
def test_a_head_of_ours_is_written_and_read_again(tmp_path: Path) -> None:
    built = REWARDS.get("aesthetic")()
    head = nn.Sequential(nn.Linear(128, 8), nn.SiLU(), nn.Linear(8, 1))
    built.with_head(head).save(tmp_path / "head.safetensors")
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    read = REWARDS.build("aesthetic", {"head": str(tmp_path / "head.safetensors")})
    wanted = 5.5 + 2 * head.eval()(built.features(images, [""] * 3))[:, 0]
    torch.testing.assert_close(read(images, [""] * 3), wanted, rtol=0, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["head.safetensors"]
    assert load_file(tmp_path / "head.safetensors").keys() == load_file(BUILTIN_AESTHETIC_HEAD).keys()


def test_a_head_of_laion_s_layout_is_written_and_read_again(laion_head_file: Path, tmp_path: Path) -> None:
    class Wide(Tower):
        def text_features(self, prompts: Sequence[str]) -> Tensor:
            return torch.zeros(len(prompts), LAION_WIDTHS[0])

    tower: Any = Wide()
    head = read_laion_head(laion_head_file)
    Aesthetic(tower, head).save(tmp_path / "head.pth")
    again = read_laion_head(tmp_path / "head.pth").state_dict()
    assert torch.load(tmp_path / "head.pth").keys() == torch.load(laion_head_file).keys()
    assert all(torch.equal(value, again[name]) for name, value in head.state_dict().items())


def test_what_cannot_be_learnt_from_is_said(features: Features, batches: list[tuple[Tensor, Tensor]]) -> None:
    reward = reward_of(linear([1.0] * 6))
    with pytest.raises(UserError, match="takes 10 or more, got 9"):
        fine_tune(reward, features.pick(torch.arange(9)), Settings())
    with pytest.raises(UserError, match="gives all 480 one score"):
        fine_tune(reward_of(linear([0.0] * 6, 1.0)), features, Settings())
    with pytest.raises(NonFiniteError, match=r"the loss is .* at step \d+; give a lower --lr"):
        fine_tune(reward, replace(features, clean_ND=features.clean_ND * torch.inf), Settings())
    images, objects = batches[1]
    objects = objects.clone()
    objects[3] = False
    with pytest.raises(UserError, match="number 54 marks nothing"):
        read_features(reward, [batches[0], (images, objects)], CPU)
