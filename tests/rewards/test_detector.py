"""Counting and looking for objects, with a detector that says what the test wants it to."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rltune.errors import UserError
from rltune.rewards.base import REWARDS
from rltune.rewards.detector import ObjectCount, ObjectPresence, soft_count

HALF = math.log(0.3 / 0.7)
"""The logit of the default threshold."""


class Stub:
    """Gives each image its logits, moved by the image's mean so that there is a gradient; boxes are given."""

    def __init__(self, logits: Sequence[Sequence[float]], boxes: Tensor) -> None:
        self._logits_BN = torch.tensor(logits)
        self._boxes_N4 = boxes

    def logits(self, images: Tensor) -> Tensor:
        return (self._logits_BN + images.mean(dim=(1, 2, 3))[:, None] - 0.5)[..., None]

    def detect(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits(images), self._boxes_N4.expand(len(images), -1, -1)

    def to(self, device: torch.device) -> "Stub":
        return self


def apart(num_boxes: int) -> Tensor:
    left = torch.arange(num_boxes) * 2.0
    return torch.stack([left, torch.zeros_like(left), left + 1, torch.ones_like(left)], dim=1)


def grey(num_images: int = 1) -> Tensor:
    return torch.full((num_images, 3, 4, 4), 0.5)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def test_boxes_apart_count_their_chances() -> None:
    logits = [[0.4, -0.9, -3.0], [2.0, 1.0, -0.8]]
    reward = ObjectCount(Stub(logits, apart(3)), target=1, temperature=0.5)
    counts = [sum(sigmoid((logit - HALF) / 0.5) for logit in row) for row in logits]
    expected = [-abs(count - 1) for count in counts]
    assert counts[0] < 1.6 < counts[1]
    # A few float32 operations on numbers of about 1.
    assert reward(grey(2), ["", ""]).tolist() == pytest.approx(expected, abs=1e-6)


def test_threshold_and_temperature_place_and_scale_the_logits() -> None:
    for threshold, temperature in ((0.5, 1.0), (0.1, 0.25)):
        reward = ObjectCount(Stub([[0.3]], apart(1)), target=0, threshold=threshold, temperature=temperature)
        expected = -sigmoid((0.3 - math.log(threshold / (1 - threshold))) / temperature)
        assert reward(grey(), [""]).item() == pytest.approx(expected, abs=1e-6)  # float32


def test_boxes_on_one_object_count_once() -> None:
    # Three boxes of a width of 1 on one place (overlapping by 0.9 and more), one 5 away.
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.02, 0, 1.02, 1], [0.0, 0, 1, 0.97], [5.0, 0, 6, 1]])
    sure = torch.full((4,), 50.0)
    assert soft_count(sure, boxes).item() == pytest.approx(2, abs=1e-6)  # float32
    z = torch.tensor([1.0, 0.5, -0.2, 2.0])
    chance = [sigmoid(value) for value in z.tolist()]
    alike = sum(chance[i] / (1 + sum(chance[j] for j in range(3) if j != i)) for i in range(3))
    assert soft_count(z, boxes).item() == pytest.approx(alike + chance[3], abs=1e-6)


def test_boxes_that_overlap_by_less_than_half_count_apart() -> None:
    # Overlap 2/3 over union 4/3 is a half, which is not more than a half; a little more is.
    for shift, count in ((1 / 3 + 0.01, 2.0), (1 / 3 - 0.01, 1.0)):
        boxes = torch.tensor([[0.0, 0, 1, 1], [shift, 0, 1 + shift, 1]])
        assert soft_count(torch.full((2,), 50.0), boxes).item() == pytest.approx(count, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("target", [0, 3])
@pytest.mark.parametrize("logit", [-10.0, -30.0, -60.0])
def test_an_image_without_any_object_pulls_towards_the_target(logit: float, target: int) -> None:
    reward = ObjectCount(Stub([[logit] * 3600], apart(3600)), target=target)
    images = grey().requires_grad_()
    score = reward(images, [""])
    (gradient,) = torch.autograd.grad(score.sum(), images)
    # The count is between nothing and a tenth; its value below is 0.1 / (1 + x), x by hand.
    x = math.log(0.1) - (math.log(3600) + (logit - HALF) / 0.25)
    assert score.item() == pytest.approx(-abs(0.1 / (1 + x) - target), rel=1e-5)  # float32
    slope = 0.1 / (1 + x) ** 2 / 0.25  # by a logit
    assert gradient.sum().item() == pytest.approx(slope if target else -slope, rel=1e-4)  # a sum of 3600
    assert (gradient != 0).all()


@pytest.mark.slow
def test_the_faint_count_is_smooth_where_it_begins_and_little_too_high() -> None:
    z = torch.linspace(-12, 0, 4001, dtype=torch.float64)
    count = torch.stack([soft_count(value[None], apart(1).double()) for value in z])
    excess = count - z.sigmoid()
    assert excess.min() >= -1e-12
    assert 0.02 < excess.max() < 0.021
    slope = count.diff() / z.diff()
    # A step of 0.003 in z at a curvature of at most 0.3 changes the slope by 0.001: a kink would stand out.
    assert slope.diff().abs().max() < 1e-3
    assert slope.min() > 0


@pytest.mark.parametrize("logit", [0.0, 10.0, 20.0])
def test_too_many_objects_push_away(logit: float) -> None:
    reward = ObjectCount(Stub([[logit] * 4], apart(4)), target=1)
    images = grey().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, [""]).sum(), images)
    assert (gradient < 0).all()


def test_the_metric_counts_what_is_left_of_the_boxes() -> None:
    boxes = torch.tensor(
        [
            [0.0, 0, 1, 1],  # found
            [0.1, 0, 1.1, 1],  # overlaps it by 0.9 / 1.1, less sure: the same object
            [0.6, 0, 1.6, 1],  # overlaps the first by 0.4 / 1.6, the second by 0.5 / 1.5: another one
            [4.0, 4, 5, 5],  # below the threshold
            [8.0, 0, 9, 1],  # found
        ]
    )
    logits = [2.0, 1.0, 0.5, HALF - 0.01, HALF + 0.01]
    for target in (0, 3, 5):
        value = ObjectCount(Stub([logits], boxes), target=target).metric(grey(), [""])
        assert value.dtype == torch.float32
        assert value.tolist() == [-abs(3 - target)]
    assert ObjectCount(Stub([[-9.0] * 5], boxes), target=2).metric(grey(), [""]).tolist() == [-2]


@pytest.mark.parametrize("logits", [(-1.0, -0.5, 0.4), (-4.0, -5.0, -30.0), (2.0, 2.0, 2.0)])
def test_presence_is_the_log_chance_of_odds_that_add_up(logits: tuple[float, ...]) -> None:
    odds = sum(math.exp((logit - HALF) / 0.25) for logit in logits)
    stub = Stub([logits], apart(3))
    there, gone = ObjectPresence(stub), ObjectPresence(stub, remove=True)
    # float32 logits of about 10 after division by 0.25.
    assert there(grey(), [""]).item() == pytest.approx(math.log(odds / (1 + odds)), rel=1e-5)
    assert gone(grey(), [""]).item() == pytest.approx(math.log(1 / (1 + odds)), rel=1e-5)
    assert there.metric(grey(), [""]).item() == pytest.approx(odds / (1 + odds), rel=1e-5)
    assert gone.metric(grey(), [""]).item() == pytest.approx(1 / (1 + odds), rel=1e-5)


@pytest.mark.parametrize("logit", [-60.0, -30.0, -10.0, 5.0])
def test_presence_pulls_however_far_the_object_is(logit: float) -> None:
    images = grey().requires_grad_()
    stub = Stub([[logit] * 3600], apart(3600))
    (gradient,) = torch.autograd.grad(ObjectPresence(stub)(images, [""]).sum(), images)
    assert gradient.isfinite().all()
    assert (gradient > 0).all()
    if logit < 0:
        assert gradient.sum().item() == pytest.approx(4, rel=1e-4)  # 1 / temperature, a sum of 3600
    (gradient,) = torch.autograd.grad(ObjectPresence(stub, remove=True)(images, [""]).sum(), images)
    assert gradient.isfinite().all()
    if logit > 0:
        assert gradient.sum().item() == pytest.approx(-4, rel=1e-4)


def test_presence_is_the_mean_over_phrases() -> None:
    class Two(Stub):
        def logits(self, images: Tensor) -> Tensor:
            return torch.tensor([[[1.0, -2.0], [0.0, -1.0]]])

    z = ((torch.tensor([[1.0, -2.0], [0.0, -1.0]]).double() - HALF) / 0.25).logsumexp(dim=0)
    for remove, sign in ((False, 1), (True, -1)):
        expected = sum(math.log(sigmoid(sign * value)) for value in z.tolist()) / 2
        reward = ObjectPresence(Two([[0.0]], apart(1)), remove=remove)
        assert reward(grey(), [""]).item() == pytest.approx(expected, rel=1e-5)  # float32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("object_count", {"target": 1}, "of must be a phrase such as 'red apple', got None"),
        ("object_count", {"of": ["cat"], "target": 1}, "of must be a phrase .*, got \\['cat'\\]"),
        ("object_count", {"of": "cat"}, "target must be a whole number of objects, got None"),
        ("object_count", {"of": "cat", "target": -1}, "target must be .*, got -1"),
        ("object_count", {"of": "cat", "target": 1.5}, "target must be .*, got 1.5"),
        ("object_count", {"of": "cat", "target": True}, "target must be .*, got True"),
        ("object_count", {"of": "cat", "target": 1, "threshold": 1}, "threshold must be .* 0 and 1, got 1"),
        ("object_count", {"of": "cat", "target": 1, "temperature": 0}, "temperature must be .*, got 0"),
        ("object_presence", {}, "of must be .*, got None"),
        ("object_presence", {"of": []}, "of must be .*, got \\[\\]"),
        ("object_presence", {"of": ["cat", " "]}, "of must be"),
        ("object_presence", {"of": "cat", "remove": "no"}, "remove must be true or false, got 'no'"),
        ("object_presence", {"of": "cat", "threshold": "high"}, "threshold must be .*, got 'high'"),
        ("object_presence", {"of": "cat", "temperature": math.inf}, "temperature must be .*, got inf"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_loaded(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"reward '{name}': {message}"):
        REWARDS.build(name, options)
