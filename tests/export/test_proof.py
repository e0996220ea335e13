"""The proof itself: what it says of files that are not the trained adapter; that they are refused is conformance."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import lora_parameters
from rltune.errors import RunError, UserError
from rltune.export.base import Adapter
from rltune.export.diffusers import Diffusers
from rltune.export.proof import TOLERANCE, Reload, check_reload, rounding_of
from tests.export.random_lora import RandomLora, config_of, drawing, greatest_difference

FOLDER = Path("exports") / "001"
Updates = dict[str, Tensor]


@pytest.fixture(scope="module")
def lora(tiny_pipeline: Path) -> RandomLora:
    return RandomLora(tiny_pipeline)


@dataclass(frozen=True)
class Scripted:
    """A format whose files add to the network what they are told to, and draw whatever is drawn."""

    change: Callable[[Updates], Updates]
    reader: str = "a tool"

    def load(self, model: ModelFamily, folder: Path) -> Iterable[tuple[str, Tensor]]:
        layers = {name.partition(".lora_")[0] for name in STATE}
        update = {name: 4 * STATE[f"{name}.lora_B.weight"] @ STATE[f"{name}.lora_A.weight"] for name in sorted(layers)}
        return self.change(update).items()

    def write(self, model: ModelFamily, adapter: Adapter, folder: Path) -> tuple[Path, ...]:
        raise AssertionError("not asked for")

    def how_to_load(self, model: ModelFamily, folder: Path) -> str:
        raise AssertionError("not asked for")


STATE = {
    "one.lora_A.weight": torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]),
    "one.lora_B.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    "two.lora_A.weight": torch.tensor([[2.0, 2.0, 2.0], [0.0, 0.0, 1.0]]),
    "two.lora_B.weight": torch.tensor([[1.0, 1.0], [0.0, 1.0]]),
}
"""Of rank 2; with alpha 8 the scale is 4."""


def check(lora: RandomLora, change: Callable[[Updates], Updates]) -> Reload:
    adapter = Adapter(STATE, 2, 8.0, "attention")
    trained = replace(lora.trained, adapter=adapter, draw=lambda model: lora.trained.images_B3HW)
    return check_reload(Scripted(change), FOLDER, lora.model, trained)


def refuse(updates: Updates) -> Updates:
    raise UserError("exports/001/file: holds no tensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda updates: {**updates, "two": 0.5 * updates["two"]}, "its update of two is another than the trained one"),
        (lambda updates: {**updates, "two": updates["one"]}, "its update of two is another than the trained one"),
        (lambda updates: {**updates, "two": updates["two"] * torch.nan}, "its update of two is another than the"),
        (lambda updates: {"one": updates["one"]}, "it leaves out two"),
        (lambda updates: {}, "it leaves out one, two"),
        (lambda updates: {**updates, "three": updates["two"]}, "it changes three, which was not trained"),
    ],
)
def test_layers_are_compared_one_by_one(lora: RandomLora, change: Callable[[Updates], Updates], message: str) -> None:
    assert check(lora, lambda updates: updates) == Reload(0.0, lora_effect(lora))
    with pytest.raises(RunError, match=rf"^exports/001: reloaded with a tool {message}.*; it is not fit for use$"):
        check(lora, change)


def test_what_the_tool_says_against_a_file_is_passed_on(lora: RandomLora) -> None:
    with pytest.raises(RunError, match=r"^exports/001/file: holds no tensors; it is not fit for use$"):
        check(lora, refuse)


def lora_effect(lora: RandomLora) -> float:
    return greatest_difference(lora.trained.images_B3HW, lora.trained.base_B3HW)


def test_images_are_compared_too(lora: RandomLora) -> None:
    """By their size, and by the share of the effect: the layers of the file are right here, what draws them is not."""
    base_B3HW, images_B3HW = lora.trained.base_B3HW, lora.trained.images_B3HW
    adapter = Adapter(STATE, 2, 8.0, "attention")

    def check(error: Tensor, size: float = 1.0) -> Reload:
        """Draw images whose effect is ``size`` times that of the adapter, off by ``error``."""
        shown_B3HW = base_B3HW + size * (images_B3HW - base_B3HW)
        drawn = {"draw": lambda model: shown_B3HW + error, "images_B3HW": shown_B3HW}
        trained = replace(lora.trained, adapter=adapter, **drawn)
        return check_reload(Scripted(lambda updates: updates), FOLDER, lora.model, trained)

    flat = torch.ones_like(images_B3HW)
    assert check(0.9 * TOLERANCE * flat).difference == pytest.approx(0.9 * TOLERANCE, rel=1e-3)
    with pytest.raises(RunError, match=r"it gives other images than the trained adapter, by 0\.0022 where 0\.002"):
        check(1.1 * TOLERANCE * flat)
    assert TOLERANCE < 1 / 255  # what passes cannot be seen in 8 bits
    # an effect of a thousandth, the images of the base model: not to be seen, and all of the effect
    effect = images_B3HW - base_B3HW
    with pytest.raises(RunError, match=r"its images differ from the trained adapter's by .*, and those from the base"):
        check(-1e-3 * effect, size=1e-3)


@pytest.mark.slow
def test_what_another_number_format_changes_is_a_figure(lora: RandomLora, tmp_path: Path) -> None:
    """By hand: diffusers casts a loaded adapter to the format of its base."""
    Diffusers().write(lora.model, lora.adapter, tmp_path)
    half = config_of(lora.pipeline, resources={"precision": "bf16"})
    by_hand = lora.fresh("bf16")
    by_hand.pipeline.load_lora_weights(tmp_path)
    assert {p.dtype for p in lora_parameters(by_hand.network)} == {torch.bfloat16}
    expected = greatest_difference(drawing(half)(by_hand).float(), lora.trained.images_B3HW)
    assert rounding_of(Diffusers(), tmp_path, lora.fresh("bf16"), lora.trained) == expected
    assert expected > TOLERANCE  # the very difference that says nothing of the file
