import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
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


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = fit_line(Workshop(tmp_path / "whole"))
    shop = Workshop(tmp_path / "killed", checkpoint_every_s=0.0)
    with pytest.raises(KilledError):
        fit_line(shop, killed_at=7)
    assert shop.load("line")["step"] == 7
    assert_same(fit_line(shop).state_dict(), whole.state_dict())


@pytest.mark.slow
def test_a_finished_stage_takes_no_further_step(tmp_path: Path) -> None:
    shop = Workshop(tmp_path)
    whole = fit_line(shop)
    assert_same(fit_line(shop, killed_at=0).state_dict(), whole.state_dict())


@pytest.mark.slow
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


def follow(
    shop: Workshop,
    num_steps: int,
    loss_at: Callable[[int], float],
    *,
    validate: Callable[[], Mapping[str, float]] | None = None,
    killed_at: int | None = None,
) -> list[dict[str, str]]:
    """The rows of the learning curve of a stage whose losses are known."""
    weight = nn.Linear(1, 1, bias=False)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        if step == killed_at:
            raise KilledError
        return 0 * weight.weight.sum() + loss_at(step)

    train(
        shop,
        "known",
        modules={"weight": weight},
        optimizer=torch.optim.AdamW([{"name": "all", "params": list(weight.parameters())}]),
        num_steps=num_steps,
        loss_of=loss_of,
        learning_rate_of=lambda step, group: 0.0,
        validate=validate,
    )
    with (shop.work_dir / "known-curve.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_short_stage_has_a_row_a_step(tmp_path: Path) -> None:
    rows = follow(Workshop(tmp_path), 7, lambda step: 2.0**-step)
    # Six digits are written.
    assert rows == [{"step": str(step + 1), "loss": f"{2.0**-step:.6g}"} for step in range(7)]


@pytest.mark.slow
def test_a_long_stage_has_the_means_of_its_losses_in_rows(tmp_path: Path) -> None:
    rows = follow(Workshop(tmp_path), 601, lambda step: float(step))
    # Three steps a row: 0, 1, 2 have a mean of 1, then 4, ...; the last step is left over and is a row of its own.
    assert [float(row["step"]) for row in rows] == [*range(3, 601, 3), 601]
    assert [float(row["loss"]) for row in rows] == [*range(1, 600, 3), 600]


@pytest.mark.slow
def test_held_out_figures_are_taken_twenty_times(tmp_path: Path) -> None:
    calls: list[int] = []

    def validate() -> dict[str, float]:
        calls.append(len(calls))
        return {"val_loss": 10.0 + calls[-1]}

    rows = follow(Workshop(tmp_path), 600, lambda step: 1.0, validate=validate)
    assert len(rows) == 200
    taken = [(int(row["step"]), float(row["val_loss"])) for row in rows if row["val_loss"]]
    assert taken == [(30 * (i + 1), 10.0 + i) for i in range(20)]


@pytest.mark.slow
def test_a_curve_without_validation_has_no_column_for_it(tmp_path: Path) -> None:
    assert follow(Workshop(tmp_path), 2, lambda step: 1.0)[0].keys() == {"step", "loss"}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(301,), (301, 350), (0, 449)])
def test_a_killed_run_leaves_the_same_curve(tmp_path: Path, kills: tuple[int, ...]) -> None:
    def loss_at(step: int) -> float:
        return 1 / (3 + step)

    def validate() -> dict[str, float]:
        return {"val_loss": 0.5}

    follow(Workshop(tmp_path / "whole"), 450, loss_at, validate=validate)
    for number, killed_at in enumerate(kills):
        # The first run leaves a checkpoint a step, in the middle of a row of two; what a second one did is lost.
        shop = Workshop(tmp_path / "killed", checkpoint_every_s=0.0 if number == 0 else 1e9)
        with pytest.raises(KilledError):
            follow(shop, 450, loss_at, validate=validate, killed_at=killed_at)
        assert not (tmp_path / "killed" / "known-curve.csv").exists()
    follow(Workshop(tmp_path / "killed"), 450, loss_at, validate=validate)
    one, other = ((tmp_path / name / "known-curve.csv").read_bytes() for name in ("whole", "killed"))
    assert other == one
    assert one.count(b"\n") == 226  # a row for two steps each, and the header


@pytest.mark.slow
def test_a_plot_of_the_curve_appears(tmp_path: Path) -> None:
    follow(Workshop(tmp_path), 20, lambda step: 2.0**-step)
    with Image.open(tmp_path / "known-curve.png") as image:
        # 6.4 by 3.6 inches at 120 dots; a line in colour is on it.
        assert image.size == (768, 432)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
