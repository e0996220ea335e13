"""The faithful rewards: a share of right parts, or all or nothing, from readings made by hand."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rltune.builtin.judge import Reading
from rltune.builtin.render import render
from rltune.builtin.scenes import make_scenes
from rltune.errors import RunError, UserError
from rltune.rewards.base import REWARDS
from rltune.rewards.faithful import Faithful

PROMPT = "two red stars and a blue ring on a white background, glossy"
RIGHT = {"red": (2, "star"), "blue": (1, "ring")}


class Reader:
    """A judge that says what it was told to, and keeps the pictures that it was shown."""

    def __init__(self, *readings: Reading) -> None:
        self.readings = list(readings)
        self.seen: list[Tensor] = []

    def read(self, images_B3HW: Tensor) -> list[Reading]:
        self.seen.append(images_B3HW)
        return self.readings


def score(readings: Sequence[Reading], prompts: Sequence[str], *, is_strict: bool = False) -> list[float]:
    reward = Faithful(Reader(*readings), is_strict=is_strict)  # type: ignore[arg-type]
    images = torch.rand(len(prompts), 3, 64, 64, generator=torch.Generator().manual_seed(0))
    values = reward(images, prompts)
    assert values.dtype == torch.float32
    return values.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("reading", "share", "strict"),
    [
        (Reading(RIGHT, "white"), 1.0, 1.0),
        (Reading(RIGHT, "black"), 0.75, 0.0),
        (Reading({**RIGHT, "red": (3, "star")}, "white"), 0.75, 0.0),  # the number
        (Reading({**RIGHT, "red": (2, "cross")}, "white"), 0.75, 0.0),  # a shape
        (Reading({"green": (2, "star"), "blue": (1, "ring")}, "white"), 0.75, 0.0),  # a colour
        (Reading({"red": (2, "ring"), "blue": (1, "star")}, "white"), 1.0, 0.0),  # all that is asked for, mixed up
        (Reading({"red": (2, "star")}, "white"), 0.25, 0.0),
        (Reading({}, "pink"), 0.0, 0.0),
    ],
)
def test_a_score_is_the_share_of_right_parts_and_the_strict_one_all_or_nothing(
    reading: Reading, share: float, strict: float
) -> None:
    assert score([reading], [PROMPT]) == [share]
    assert score([reading], [PROMPT], is_strict=True) == [strict]


def test_a_prompt_that_leaves_the_ground_open_takes_any() -> None:
    assert score([Reading(RIGHT, "pink")], ["a blue ring and two red stars"], is_strict=True) == [1.0]


def test_each_picture_is_held_against_its_own_prompt() -> None:
    readings = [Reading({"red": (1, "star")}, "white"), Reading({"blue": (1, "ring")}, "white")]
    prompts = ["a red star", "a blue ring"]
    assert score(readings, prompts) == [1.0, 1.0]
    # Another colour and shape, the number and the open ground are right.
    assert score(readings, prompts[::-1]) == [0.5, 0.5]


def test_the_judge_is_shown_pictures_of_its_own_size_and_range() -> None:
    reader = Reader(Reading({}, "white"))
    reward = Faithful(reader)  # type: ignore[arg-type]
    reward(torch.full((1, 3, 64, 64), 0.75), ["a red star"])
    reward(torch.tensor([-0.5, 1.5]).repeat(128, 64)[None, None].expand(1, 3, 128, 128), ["a red star"])
    assert torch.equal(reader.seen[0], torch.full((1, 3, 64, 64), 0.5))
    assert reader.seen[1].shape == (1, 3, 64, 64)
    assert reader.seen[1].abs().max() <= 1


def test_a_score_carries_no_gradient() -> None:
    reward = Faithful(Reader(Reading(RIGHT, "white")))  # type: ignore[arg-type]
    assert not reward(torch.rand(1, 3, 64, 64, requires_grad=True), [PROMPT]).requires_grad


def test_a_prompt_that_is_no_caption_is_the_users_fault() -> None:
    with pytest.raises(UserError, match=r"judge 'faithful': cannot read what 'a cat' asks for; .*such as 'two red"):
        score([Reading(RIGHT, "white")] * 2, [PROMPT, "a cat"])


def test_a_missing_file_is_said() -> None:
    for name in ("faithful", "faithful_exact"):
        with pytest.raises(RunError, match=r"judge: nowhere\.safetensors is missing"):
            REWARDS.build(name, {"weights": "nowhere.safetensors"})


@pytest.mark.long
def test_the_shipped_judge_scores_renders_by_their_captions() -> None:
    scenes, _ = make_scenes(535_353, 64, is_heldout=True)
    images, captions = render(scenes), [scene.canonical_caption() for scene in scenes]
    share, strict = (REWARDS.build(name, {}) for name in ("faithful", "faithful_exact"))
    assert not share.is_differentiable
    assert not strict.is_differentiable
    # It read all 64 right when this was written; two mistakes may pass.
    assert strict(images, captions).sum() >= 62
    assert share(images, captions).mean() >= strict(images, captions).mean()
    other = captions[1:] + captions[:1]
    assert strict(images, other).sum() <= 2  # two scenes in a row may say the same
    # Parts are right by chance, the ground of one picture in six and the number of one in three: (1/6 + 1/3) / 4 = .13.
    assert 0.05 < share(images, other).mean() < 0.3


def test_two_kinds_of_one_color_are_refused() -> None:
    with pytest.raises(UserError, match=r"judge 'faithful_exact': cannot read .*with another colour for each kind"):
        Faithful(Reader(Reading(RIGHT, "white")), is_strict=True)(  # type: ignore[arg-type]
            torch.rand(1, 3, 64, 64), ["a red star and a red ring on a white background"]
        )
