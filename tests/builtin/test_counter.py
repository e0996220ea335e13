"""The soft counter: chances and loss in closed form, and the one that ships against renders."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rltune.assets import BUILTIN_COUNTER
from rltune.builtin.counter import Counter, counter_loss, load_counter, log_chances
from rltune.builtin.labels import Labels, make_labels
from rltune.builtin.render import render
from rltune.builtin.scenes import OBJECT_COLORS, SHAPES, make_scene, make_scenes
from rltune.errors import RunError

COLORS = tuple(OBJECT_COLORS)
SCENES = tuple(make_scene(37, index) for index in range(24))
NUM_OBJECTS = sum(scene.num_objects for scene in SCENES)
SURE = 40.0


class Fixed(nn.Module):
    """Gives the same logits for any picture."""

    def __init__(self, *logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, ...]:
        return self.logits


def test_chances_are_the_product_of_centre_colour_and_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    center, color, shape = (
        3 * torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((2, 2, 3), (2, len(COLORS), 2, 3), (2, len(SHAPES), 2, 3))
    )
    result = log_chances(Fixed(center, color, shape), torch.zeros(2, 3, 64, 64))  # type: ignore[arg-type]
    assert result.shape == (2, len(COLORS), len(SHAPES), 6)
    for b in range(2):
        for row in range(2):
            for column in range(3):
                here = 1 / (1 + math.exp(-center[b, row, column]))
                color_sum = sum(math.exp(value) for value in color[b, :, row, column])
                shape_sum = sum(math.exp(value) for value in shape[b, :, row, column])
                for c in range(len(COLORS)):
                    for s in range(len(SHAPES)):
                        share = math.exp(color[b, c, row, column]) / color_sum * math.exp(shape[b, s, row, column])
                        # Float64 on both sides.
                        assert math.exp(result[b, c, s, 3 * row + column]) == pytest.approx(
                            here * share / shape_sum, rel=1e-12
                        )


def test_the_network_answers_for_every_cell() -> None:
    center, color, shape = Counter()(torch.zeros(2, 3, 64, 64))
    assert center.shape == (2, 16, 16)
    assert color.shape == (2, len(COLORS), 16, 16)
    assert shape.shape == (2, len(SHAPES), 16, 16)


@pytest.fixture
def labels() -> Labels:
    return make_labels(SCENES)


@pytest.fixture
def perfect() -> tuple[Tensor, Tensor, Tensor]:
    """The logits of a counter that is sure and right at every centre and says nothing of colours elsewhere."""
    center = torch.full((len(SCENES), 16, 16), -SURE)
    color = torch.zeros(len(SCENES), len(COLORS), 16, 16)
    shape = torch.zeros(len(SCENES), len(SHAPES), 16, 16)
    for i, scene in enumerate(SCENES):
        for item in scene.placed:
            # In float32, as the labels: the middle of the picture is .5 but for the last bit of float64.
            row, column = (int(torch.tensor(value) * 16) for value in (item.y, item.x))
            group = scene.groups[item.group]
            center[i, row, column] = SURE
            color[i, COLORS.index(group.color), row, column] = SURE
            shape[i, SHAPES.index(group.shape), row, column] = SURE
    return center, color, shape


def test_a_counter_that_knows_nothing_pays_for_every_class(labels: Labels) -> None:
    zeros = (torch.zeros(len(SCENES), *size, 16, 16) for size in ((), (8,), (6,)))
    # log 2 for every one of the 256 cells a picture, shared out over the objects; then one of 8 colours, of 6 shapes.
    expected = math.log(2) * 256 * len(SCENES) / NUM_OBJECTS + math.log(8) + math.log(6)
    # A float32 sum of 6144 equal numbers.
    assert counter_loss(*zeros, labels).item() == pytest.approx(expected, rel=1e-5)


def test_a_perfect_counter_pays_nothing(perfect: tuple[Tensor, Tensor, Tensor], labels: Labels) -> None:
    # exp(-40) a cell is nothing in float32.
    assert counter_loss(*perfect, labels).item() == pytest.approx(0.0, abs=1e-6)


def test_each_mistake_costs_its_share_of_the_objects(perfect: tuple[Tensor, Tensor, Tensor], labels: Labels) -> None:
    center, color, shape = perfect
    # Sums and means of some 50 float32 numbers.
    assert counter_loss(-center, color, shape, labels).item() == pytest.approx(
        SURE * 256 * len(SCENES) / NUM_OBJECTS, rel=1e-5
    )
    assert counter_loss(center, color.roll(1, 1), shape, labels).item() == pytest.approx(SURE, rel=1e-5)
    assert counter_loss(center, color, shape.roll(1, 1), labels).item() == pytest.approx(SURE, rel=1e-5)
    one_missed = center.clone()
    one_missed[(0, *(center[0] > 0).nonzero()[0])] = -SURE
    assert counter_loss(one_missed, color, shape, labels).item() == pytest.approx(SURE / NUM_OBJECTS, rel=1e-5)


def test_colours_and_shapes_count_at_centres_only(perfect: tuple[Tensor, Tensor, Tensor], labels: Labels) -> None:
    center, color, shape = perfect
    elsewhere = (center < 0)[:, None]
    noise = 100 * torch.randn(color.shape, generator=torch.Generator().manual_seed(0))
    changed = (color + noise * elsewhere, shape + noise[:, : len(SHAPES)] * elsewhere)
    assert counter_loss(center, *changed, labels).item() == pytest.approx(0.0, abs=1e-6)  # as above


def test_a_file_of_half_precision_is_loaded_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {name: value.half() for name, value in Counter().state_dict().items()}
    save_file(state, tmp_path / "counter.safetensors")
    loaded = load_counter(tmp_path / "counter.safetensors")
    assert not loaded.training
    assert [name for name, value in loaded.named_parameters() if value.requires_grad] == []
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    assert [name for name, value in loaded.state_dict().items() if not torch.equal(value, state[name].float())] == []


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"counter: .*no\.safetensors is missing; install rltune again"):
        load_counter(tmp_path / "no.safetensors")


@pytest.mark.long
def test_the_shipped_counter_counts_renders_it_never_saw() -> None:
    scenes, _ = make_scenes(424_242, 256, is_heldout=True)  # no seed of any build: pictures as well as contents are new
    with torch.no_grad():
        counts = log_chances(load_counter(BUILTIN_COUNTER), 2 * render(scenes) - 1).exp().sum(3)
    errors = []
    truth = torch.zeros_like(counts)
    for i, scene in enumerate(scenes):
        for group in scene.groups:
            place = (i, COLORS.index(group.color), SHAPES.index(group.shape))
            truth[place] = group.count
            errors.append(abs(counts[place].item() - group.count))
    # It was .05 when this was written; a counter that sees nothing errs by 1.67.
    assert sum(errors) / len(errors) < 0.15
    # What is not there: some 46 kinds a picture, whose chances must not add up to an object; they were .02.
    assert counts[truth == 0].sum() / len(scenes) < 0.15
