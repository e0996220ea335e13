"""Rewards with a fault of their own, known while a test of training runs, and the base model measured once."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rltune.rewards.base import REWARDS
from rltune.rewards.pixel import brightness


class Brightness:
    """The mean of all channels, to be spoilt below."""

    value_range = (0.0, 1.0)

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return brightness(images_B3HW, prompts)


class NanWhenTwo(Brightness):
    """Not finite for prompts that hold 'two'."""

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        hole = torch.tensor([float("nan") if "two" in prompt else 0.0 for prompt in prompts])
        return super().__call__(images_B3HW, prompts) + hole


class Blind(Brightness):
    """Looks at the prompt alone, so that its gradient is zero."""

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return 0 * super().__call__(images_B3HW, prompts) + torch.tensor([float(len(p)) for p in prompts])


class Opaque(Brightness):
    """Has no gradient, and says so."""

    is_differentiable = False

    @torch.no_grad()
    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().__call__(images_B3HW, prompts)


@pytest.fixture(autouse=True)
def _faulty_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    # not by ``register``, or the suite of every reward would find them where it is collected later
    for name, kind in {"nan_when_two": NanWhenTwo, "blind": Blind, "opaque": Opaque}.items():
        monkeypatch.setitem(REWARDS._builders, name, kind)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs share the measurements of the tiny pipeline."""
    return tmp_path_factory.mktemp("base")
