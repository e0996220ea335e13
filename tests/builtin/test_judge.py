"""The judge: how a reading is held against a prompt, how logits become a reading, its loss, and the one that ships."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rltune.assets import BUILTIN_JUDGE
from rltune.builtin.grammar import Content
from rltune.builtin.judge import (
    COLORS,
    DISC,
    GROUNDS,
    Judge,
    Reading,
    Verdict,
    compare,
    judge_images,
    judge_loss,
    load_judge,
)
from rltune.builtin.labels import Labels, make_labels
from rltune.builtin.render import render
from rltune.builtin.scenes import MAX_OBJECTS, SHAPES, Group, make_scene, make_scenes
from rltune.errors import RunError

CPU = torch.device("cpu")
ASKED = Content((Group(2, "plain", "red", "star"), Group(1, "striped", "blue", "ring")), "white")
RIGHT = {"red": (2, "star"), "blue": (1, "ring")}
ALL = Verdict(ground=True, colors=True, count=True, shape=True, groups=True)


def verdict(groups: dict[str, tuple[int, str]], ground: str = "white", asked: Content = ASKED) -> Verdict:
    return compare(Reading(groups, ground), asked)


def test_a_right_picture_is_right_in_every_part() -> None:
    assert verdict(RIGHT) == ALL
    assert verdict(RIGHT).exact
    assert verdict(dict(reversed(RIGHT.items()))) == ALL


@pytest.mark.parametrize(
    ("groups", "wrong"),
    [
        ({**RIGHT, "red": (3, "star")}, {"count", "groups"}),  # one object too many
        ({**RIGHT, "red": (1, "star")}, {"count", "groups"}),
        ({**RIGHT, "green": (1, "star")}, {"colors", "count", "groups"}),  # an extra group, of a shape asked for
        ({**RIGHT, "green": (1, "cross")}, {"colors", "count", "shape", "groups"}),
        ({"red": (3, "star")}, {"colors", "shape", "groups"}),  # a group is missing, the sum is right
        ({**RIGHT, "blue": (1, "circle")}, {"shape", "groups"}),
        ({"red": (2, "ring"), "blue": (1, "star")}, {"groups"}),  # shapes swapped between the groups
        ({"red": (1, "star"), "blue": (2, "ring")}, {"groups"}),  # counts swapped
        ({"green": (2, "star"), "blue": (1, "ring")}, {"colors", "groups"}),
        ({}, {"colors", "count", "shape", "groups"}),
    ],
)
def test_each_mistake_shows_in_its_own_parts(groups: dict[str, tuple[int, str]], wrong: set[str]) -> None:
    result = verdict(groups)
    assert {part for part in ("ground", "colors", "count", "shape", "groups") if not getattr(result, part)} == wrong
    assert not result.exact


def test_the_ground_counts_only_where_the_prompt_names_it() -> None:
    wrong = verdict(RIGHT, ground="black")
    assert (wrong.ground, wrong.groups, wrong.exact) == (False, True, False)
    open_ground = Content(ASKED.groups, None)
    assert verdict(RIGHT, ground="black", asked=open_ground) == ALL


def test_logits_are_read_as_their_largest_class(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    count = torch.rand(2, len(COLORS), 1 + MAX_OBJECTS, generator=generator)
    count[..., 0] += 1  # nothing, unless raised further below
    shape = torch.rand(2, len(COLORS), len(SHAPES), generator=generator)
    ground = torch.rand(2, len(GROUNDS), generator=generator)
    for row, color, number, kind in ((0, "red", 2, "star"), (0, "blue", 1, "ring"), (1, "black", 4, "cross")):
        count[row, COLORS.index(color), number] += 3
        shape[row, COLORS.index(color), SHAPES.index(kind)] += 3
    ground[0, GROUNDS.index("pink")] += 3
    ground[1, GROUNDS.index("white")] += 3
    judge = Judge()
    monkeypatch.setattr(judge, "forward", lambda images: {"count": count, "shape": shape, "ground": ground})
    assert judge.read(torch.zeros(2, 3, 64, 64)) == [
        Reading({"red": (2, "star"), "blue": (1, "ring")}, "pink"),
        Reading({"black": (4, "cross")}, "white"),
    ]


def test_an_untrained_judge_gives_logits_of_the_stated_shapes() -> None:
    logits = Judge().eval()(torch.zeros(2, 3, 64, 64))
    assert {name: tuple(value.shape) for name, value in logits.items()} == {
        "color_map": (2, 1 + len(COLORS), 16, 16),
        "shape_map": (2, 1 + len(SHAPES), 16, 16),
        "center_map": (2, 16, 16),
        "ground": (2, len(GROUNDS)),
        "count": (2, len(COLORS), 1 + MAX_OBJECTS),
        "shape": (2, len(COLORS), len(SHAPES)),
    }


# ---- the loss: with logits of 0 and SURE a right class costs log(1 + n exp(-SURE)) = 0 in float32, a wrong one SURE
SURE = 40.0
SCENES = tuple(make_scene(31, index) for index in range(24))
ABSOLUTE = 1e-6
"""What rounding may leave of a loss that is 0."""


def one_hot(classes: Tensor, count: int) -> Tensor:
    return SURE * torch.nn.functional.one_hot(classes, count).float()


@pytest.fixture
def labels() -> Labels:
    return make_labels(SCENES)


@pytest.fixture
def perfect(labels: Labels) -> dict[str, Tensor]:
    """The logits of a judge that is sure and right, by loops over the scenes."""
    disc = labels.discs(DISC)
    color_map, shape_map = torch.zeros(2, len(SCENES), 16, 16, dtype=torch.long)
    count = torch.zeros(len(SCENES), len(COLORS), dtype=torch.long)
    shape = torch.zeros(len(SCENES), len(COLORS), dtype=torch.long)
    for i, scene in enumerate(SCENES):
        for k, item in enumerate(scene.placed):
            group = scene.groups[item.group]
            color_map[i][disc[i, k]] = 1 + COLORS.index(group.color)
            shape_map[i][disc[i, k]] = 1 + SHAPES.index(group.shape)
        for group in scene.groups:
            count[i, COLORS.index(group.color)] = group.count
            shape[i, COLORS.index(group.color)] = SHAPES.index(group.shape)
    return {
        "color_map": one_hot(color_map, 1 + len(COLORS)).movedim(-1, 1),
        "shape_map": one_hot(shape_map, 1 + len(SHAPES)).movedim(-1, 1),
        "center_map": SURE * (2 * labels.centers().sum(1) - 1),
        "ground": one_hot(torch.tensor([GROUNDS.index(scene.ground) for scene in SCENES]), len(GROUNDS)),
        "count": one_hot(count, 1 + MAX_OBJECTS),
        "shape": one_hot(shape, len(SHAPES)),
    }


def test_perfect_logits_cost_nothing(perfect: dict[str, Tensor], labels: Labels) -> None:
    assert judge_loss(perfect, labels).item() == pytest.approx(0.0, abs=ABSOLUTE)


@pytest.mark.parametrize(
    ("part", "dim", "cost"),
    [
        ("color_map", 1, SURE),
        ("shape_map", 1, SURE),
        ("ground", 1, SURE),
        ("count", 2, 2 * SURE),
        ("shape", 2, SURE),
    ],
)
def test_a_wrong_part_costs_what_the_formula_says(
    perfect: dict[str, Tensor], labels: Labels, part: str, dim: int, cost: float
) -> None:
    wrong = perfect | {part: perfect[part].roll(1, dim)}  # every class taken for the next one
    # Means of up to 6144 equal numbers in float32.
    assert judge_loss(wrong, labels).item() == pytest.approx(cost, rel=1e-5)


def test_missed_centres_cost_eight_times_what_invented_ones_do(perfect: dict[str, Tensor], labels: Labels) -> None:
    num_cells, num_centers = len(SCENES) * 256, sum(scene.num_objects for scene in SCENES)
    wrong = perfect | {"center_map": -perfect["center_map"]}
    expected = SURE * (8 * num_centers + num_cells - num_centers) / num_cells
    assert judge_loss(wrong, labels).item() == pytest.approx(expected, rel=1e-5)  # a mean of 6144 float32 numbers


def test_absent_colours_weigh_three_tenths_and_their_shape_nothing(perfect: dict[str, Tensor], labels: Labels) -> None:
    present = torch.zeros(len(SCENES), len(COLORS), dtype=torch.bool)
    for i, scene in enumerate(SCENES):
        for group in scene.groups:
            present[i, COLORS.index(group.color)] = True
    count = torch.where(present[..., None], perfect["count"], perfect["count"].roll(1, 2))
    num_present, num_absent = int(present.sum()), int((~present).sum())
    expected = 2 * SURE * 0.3 * num_absent / (0.3 * num_absent + num_present)
    # A ratio of two float32 sums over 192 colours.
    assert judge_loss(perfect | {"count": count}, labels).item() == pytest.approx(expected, rel=1e-5)
    shape = torch.where(present[..., None], perfect["shape"], perfect["shape"].roll(1, 2))
    assert judge_loss(perfect | {"shape": shape}, labels).item() == pytest.approx(0.0, abs=ABSOLUTE)


# ---- files
def test_a_file_of_half_precision_is_loaded_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge()
    state = {name: value.half() if value.is_floating_point() else value for name, value in judge.state_dict().items()}
    save_file(state, tmp_path / "judge.safetensors")
    loaded = load_judge(tmp_path / "judge.safetensors")
    assert not loaded.training
    assert [name for name, value in loaded.named_parameters() if value.requires_grad] == []
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    assert [name for name, value in loaded.state_dict().items() if not torch.equal(value, state[name].to(value))] == []


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"judge: .*no\.safetensors is missing; install rltune again"):
        load_judge(tmp_path / "no.safetensors")


@pytest.mark.long
def test_the_shipped_judge_reads_renders_it_never_saw() -> None:
    scenes, _ = make_scenes(424_242, 256, is_heldout=True)  # no seed of any build: pictures as well as contents are new
    contents = [Content(scene.groups, scene.ground) for scene in scenes]
    images = (render(scenes) * 255).round().to(torch.uint8)
    judge = load_judge(BUILTIN_JUDGE)
    own = judge_images(judge, images, contents, CPU)
    # Two mistakes in 256 may pass; it made none when this was written.
    assert sum(result.exact for result in own) / 256 >= 0.99
    other = judge_images(judge, images, contents[1:] + contents[:1], CPU)
    # Against another scene's content next to nothing is right; among these, one pair in a row shows the same thing.
    assert sum(result.exact for result in other) / 256 < 0.02
