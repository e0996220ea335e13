import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rltune.builtin.workshop import Workshop, train
from rltune.errors import NonFiniteError, UserError


class KilledError(Exception):
    pass


def fit_line(shop: Workshop, *, num_steps: int = 12, killed_at: int | None = None, scale: float = 1.0) -> nn.Linear:
    """Noisy regression by AdamW: its result depends on every step's random numbers and on the optimizer's state."""
    with shop.seeded("line"):
        model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW([{"name": "all", "params": list(model.parameters())}])

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        if step == killed_at:
            raise KilledError
        x = torch.randn(8, 3, generator=generator)
        return scale * (model(x)[:, 0] - x.sum(1)).square().mean()

    train(
        shop,
        "line",
        modules={"model": model},
        optimizer=optimizer,
        num_steps=num_steps,
        loss_of=loss_of,
        learning_rate_of=lambda step, group: 0.1 / (1 + step),
    )
    return model


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = fit_line(Workshop(tmp_path / "whole"))
    shop = Workshop(tmp_path / "killed", checkpoint_every_s=0.0)
    with pytest.raises(KilledError):
        fit_line(shop, killed_at=7)
    assert shop.load("line")["step"] == 7
    assert_same(fit_line(shop).state_dict(), whole.state_dict())


def test_a_finished_stage_takes_no_further_step(tmp_path: Path) -> None:
    shop = Workshop(tmp_path)
    whole = fit_line(shop)
    assert_same(fit_line(shop, killed_at=0).state_dict(), whole.state_dict())


def test_the_seed_decides(tmp_path: Path) -> None:
    one, other = (fit_line(Workshop(tmp_path / str(seed), seed=seed)).weight for seed in (0, 1))
    assert not torch.equal(one, other)


def test_seeding_networks_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    with Workshop(tmp_path).seeded("x"):
        torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_loss_that_is_not_finite_stops_the_build(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="line: the loss is nan at step 0"):
        fit_line(Workshop(tmp_path), scale=float("nan"))


def test_a_folder_belongs_to_one_seed_and_scale(tmp_path: Path) -> None:
    Workshop(tmp_path, seed=1).claim()
    Workshop(tmp_path, seed=1).claim()
    with pytest.raises(UserError, match="holds a build with"):
        Workshop(tmp_path, seed=2).claim()


def test_progress_ends_with_the_last_step(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    fit_line(Workshop(tmp_path, on_progress=lambda stage, step, total, figures: calls.append((stage, step, total))))
    assert calls[-1] == ("line", 12, 12)


def test_figures_survive(tmp_path: Path) -> None:
    shop = Workshop(tmp_path)
    assert shop.load_figures("line") is None
    shop.save_figures("line", {"loss": 0.5})
    assert shop.load_figures("line") == {"loss": 0.5}
    assert json.loads((tmp_path / "line.json").read_text()) == {"loss": 0.5}
