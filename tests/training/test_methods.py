"""Every estimator in the loop: that it trains, what it is charged for, in what memory, and on how many workers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.estimators.base import ESTIMATORS, Round
from rltune.estimators.refl import ReFL
from tests.training.runs import Make, adapters, metrics, train, train_in_processes

T = 4
"""Sampling steps of ``make_config``; its batch has 4 images."""


@dataclass(frozen=True)
class Method:
    """An estimator's section, and what an image of a round costs with it."""

    section: Mapping[str, Any]
    queries: int
    calls: int
    k: int
    sections: Mapping[str, Any] = field(default_factory=dict)

    def experiment(self, make_config: Make, name: str, **sections: Any) -> RunConfig:
        estimator = {"name": name, "k": None, "draw": None, **self.section, **sections.pop("estimator", {})}
        return make_config(estimator=estimator, **{**self.sections, **sections})


POLICY = {"sampler": {"eta": 1.0}, "prompts": {"images_per_prompt": 2}}
METHODS = {
    # sampling, then forward again and backward for every step that carries gradient
    "alignprop": Method({"k": 2, "draw": "fixed"}, queries=1, calls=T + 2 * 2, k=2),
    "draft": Method({"k": 3}, queries=1, calls=T + 2 * 3, k=3),
    # the copies run the last step alone
    "draft_lv": Method({"options": {"n": 2}}, queries=3, calls=T + 2 + 2 * (1 + 2), k=1),
    "drtune": Method({"k": 2, "options": {"early_stop": 0.0}}, queries=1, calls=T + 2 * 2, k=2),
    "full": Method({}, queries=1, calls=T + 2 * T, k=T),
    "refl": Method({"options": {"window": 0.25}}, queries=1, calls=T + 2, k=1),
    # sampling, then forward and backward at every step
    "ddpo": Method({"options": {"min_count": 2, "epochs": 2}}, 1, calls=T + 2 * 2 * T, k=T, sections=POLICY),
    # and forward once more without adapters
    "dpok": Method({"options": {"epochs": 1}}, queries=1, calls=T + 3 * T, k=T, sections=POLICY),
    # the clean prediction of every step is scored besides the image
    "dag": Method({"options": {"fraction": 0.5}}, queries=1 + T, calls=T + 2 * (T // 2), k=T // 2, sections=POLICY),
}


def test_there_is_an_entry_for_every_estimator() -> None:
    shipped = {name for name in ESTIMATORS.names() if ESTIMATORS.get(name).__module__.startswith("rltune.")}
    assert set(METHODS) == shipped


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_an_estimator_trains_and_its_cost_is_counted(
    make_config: Make, tmp_path: Path, base_dir: Path, name: str
) -> None:
    method = METHODS[name]
    evaluate = {"every": 2, "images_per_prompt": 1}
    config = method.experiment(
        make_config, name, optim={"steps": 2}, evaluate=evaluate, estimator={"checkpoint": "always"}
    )
    reporter = train(config, tmp_path, base_dir=base_dir)
    assert reporter.reports[-1]["is_final"] == 1
    assert reporter.reports[-1]["eval/drift"] > 0
    assert (reporter.reports[-1]["queries"], reporter.reports[-1]["calls"]) == (8 * method.queries, 8 * method.calls)
    rows = metrics(tmp_path)
    assert [row["queries"] for row in rows] == [4 * method.queries, 8 * method.queries]
    assert [row["calls"] for row in rows] == [4 * method.calls, 8 * method.calls]
    for row in rows:
        assert row["k"] == method.k
        assert 0 < row["grad_norm"] < float("inf")
        assert 0 < row["train/brightness"] < 1  # a mean over the round's own images, each counted once
        expected = 0.75 * row["train/brightness_z"] + 0.25 * row["train/smoothness_z"]
        assert row["train/reward"] == pytest.approx(expected, rel=1e-4, abs=1e-4)


# ---- what a round is made of


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[Round]:
    """Every round that ReFL gets."""
    seen: list[Round] = []
    train_round = ReFL.train

    def look(self: ReFL, round: Round) -> None:
        seen.append(round)
        train_round(self, round)

    monkeypatch.setattr(ReFL, "train", look)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint", "is_serial", "num_kept"), [("always", False, 0), ("never", False, T), ("serial", True, 0)]
)
def test_the_mode_reaches_the_estimator(
    make_config: Make,
    tmp_path: Path,
    base_dir: Path,
    rounds: list[Round],
    checkpoint: str,
    is_serial: bool,
    num_kept: int,
) -> None:
    # adapters and cost are the same, so only memory would tell
    config = METHODS["refl"].experiment(make_config, "refl", optim={"steps": 1}, estimator={"checkpoint": checkpoint})
    train(config, tmp_path, base_dir=base_dir)
    assert [(round.is_serial, round.sampler.num_kept) for round in rounds] == [(is_serial, num_kept)]


@pytest.mark.long
def test_every_round_has_prompts_noise_and_draws_of_its_own(
    make_config: Make, tmp_path: Path, base_dir: Path, rounds: list[Round]
) -> None:
    config = METHODS["refl"].experiment(
        make_config,
        "refl",
        prompts={"images_per_prompt": 2},
        sampler={"eta": 1.0},
        optim={"steps": 3, "micro_batch": 1},
        evaluate={"every": 3},
    )
    train(config, tmp_path, base_dir=base_dir)
    batches = [batch for round in rounds for batch in round.batches]
    shown = [prompt for batch in batches for prompt in batch.prompts]
    assert len(shown) == 12
    assert shown[::2] == shown[1::2]
    assert len(set(shown[:10])) == 5  # each of five has its turn before any has another
    draws = [batch.x_BCHW for batch in batches]
    for batch in batches:
        assert batch.noise is not None
        assert batch.extra_noise is not None
        draws += [batch.noise(0), batch.noise(1), batch.extra_noise(0), batch.extra_noise(1)]
    assert all(draw.shape == (1, 4, 8, 8) for draw in draws)
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 12 * 5
    assert len({tuple(round.rng.integers(2**32, size=4).tolist()) for round in rounds}) == 3


@pytest.mark.long
def test_a_policy_needs_no_gradient_of_its_reward(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    for reward in ("opaque", "brightness"):  # the same numbers, with gradient and without
        config = METHODS["ddpo"].experiment(make_config, "ddpo", rewards={reward: {}}, optim={"steps": 2})
        reporter = train(config, tmp_path / reward, base_dir=base_dir)
        assert reporter.reports[-1]["eval/drift"] > 0
    opaque, brightness = adapters(tmp_path / "opaque", 2), adapters(tmp_path / "brightness", 2)
    assert all(torch.equal(opaque[name], brightness[name]) for name in opaque)


@pytest.mark.long
def test_a_flat_optimum_costs_queries(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    cases: list[tuple[dict[str, float], int]] = [
        ({}, 1),
        ({"flatness_image": 0.5}, 2),
        ({"flatness_weights": 0.05}, 2),
        ({"flatness_image": 0.5, "flatness_weights": 0.05}, 4),
    ]
    rows = []
    for i, (regularize, queries) in enumerate(cases):
        config = METHODS["alignprop"].experiment(
            make_config, "alignprop", optim={"steps": 1}, regularize=regularize, evaluate={"images_per_prompt": 1}
        )
        train(config, tmp_path / str(i), base_dir=base_dir)
        rows += metrics(tmp_path / str(i))
        assert rows[-1]["queries"] == 4 * queries
    assert len({row["grad_norm"] for row in rows}) == len(rows)
    assert rows[2]["train/reward"] == rows[0]["train/reward"]  # a second look at the same images is not a second image


@pytest.mark.long
def test_a_penalty_holds_the_network_near_the_base_model(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    drifts = []
    for weight in (0.0, 1e3):
        config = METHODS["full"].experiment(
            make_config,
            "full",
            optim={"steps": 3},
            regularize={"drift": weight},
            evaluate={"every": 3, "images_per_prompt": 1},
        )
        drifts.append(train(config, tmp_path / str(weight), base_dir=base_dir).reports[-1]["eval/drift"])
    assert 0 < drifts[1] < drifts[0] / 2
    free, held = metrics(tmp_path / "0.0"), metrics(tmp_path / "1000.0")
    assert held[0]["grad_norm"] == free[0]["grad_norm"]  # adapters that start at 0 have no drift yet
    assert held[1]["grad_norm"] != free[1]["grad_norm"]
    assert held[0]["calls"] == free[0]["calls"] + 4 * T  # the base model's pass at every step


# ---- memory

SMOOTH = {"eps": 1.0, "lr": 0.5, "steps": 2}
"""With a large eps Adam's step is nearly linear in the gradient, so that rounding does not become a whole lr."""


def largest_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Over all adapters that start at 0, relative to the largest."""
    assert first.keys() == second.keys()
    moved = [name for name in first if ".lora_B." in name]
    largest = max(first[name].abs().max().item() for name in moved)
    assert largest > 0
    return max((first[name] - second[name]).abs().max().item() for name in moved) / largest


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param("alignprop", marks=pytest.mark.long), "drtune"])
def test_how_activations_are_kept_changes_no_adapter(
    make_config: Make, tmp_path: Path, base_dir: Path, name: str
) -> None:
    modes = {"always": 0.0, "never": 0.0, "auto": 0.0}
    if name != "alignprop":
        # the same products, added up from another order of steps: float32
        modes["serial"] = 1e-5
    evaluate = {"every": 2, "images_per_prompt": 1}
    for mode, tolerance in modes.items():
        config = METHODS[name].experiment(
            make_config,
            name,
            optim=SMOOTH,
            evaluate=evaluate,
            estimator={"checkpoint": mode},
            regularize={"drift": 0.5},
        )
        train(config, tmp_path / mode, base_dir=base_dir)
        difference = largest_difference(adapters(tmp_path / "always", 2), adapters(tmp_path / mode, 2))
        assert difference <= tolerance, mode
    calls = {mode: metrics(tmp_path / mode)[-1]["calls"] for mode in modes}
    assert calls["never"] == calls["auto"] < calls["always"]
    assert calls.get("serial", calls["always"]) == calls["always"]


# ---- workers

SEVERAL = ("alignprop", "draft_lv", "ddpo", "dpok", "dag")
GROUPS = "diversity_pixels"
"""Beside them: a reward that compares the images of a prompt, three prompts of two images each."""
COMPARED: dict[str, Any] = {"rewards": {"diversity_pixels": {}, "brightness": {}}, "prompts": {"images_per_prompt": 2}}


@dataclass(frozen=True)
class Folders:
    """Of the same experiments, trained by this process, and by several that share every batch."""

    by_count: Mapping[int, Path]

    def of(self, name: str, count: int) -> Path:
        return self.by_count[count] / name


@pytest.fixture(scope="module")
def by_several(make_config: Make, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("workers")
    evaluate = {"every": 2, "images_per_prompt": 1}
    # of 4 images three workers have 1, 1 and 2, and so another number of micro-batches than each other
    optim = SMOOTH | {"micro_batch": 1}
    configs = {name: METHODS[name].experiment(make_config, name, optim=optim, evaluate=evaluate) for name in SEVERAL}
    configs[GROUPS] = make_config(
        **COMPARED, optim=SMOOTH | {"batch": 6}, evaluate={"every": 2, "prompts": 2, "images_per_prompt": 2}
    )
    for name, config in configs.items():
        train(config, root / "1" / name, base_dir=base_dir)
    for count in (2, 3):
        train_in_processes(configs, root / str(count), count)
    return Folders({count: root / str(count) for count in (1, 2, 3)})


def check_same_numbers(one: Path, several: Path, *, tolerance: float) -> None:
    """Everything that is not a time or a count of workers; float32, another order of additions."""
    for first, second in zip(metrics(one), metrics(several), strict=True):
        for key in ("step", "images_seen", "queries", "calls", "k"):
            assert first[key] == second[key], key
        for key, value in first.items():
            if key == "grad_norm" or key.startswith(("train/", "eval/", "gain/")):
                assert second[key] == pytest.approx(value, rel=tolerance, abs=1e-5), key


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", [*SEVERAL, GROUPS])
def test_several_workers_take_the_steps_of_one_with_the_whole_batch(by_several: Folders, name: str, count: int) -> None:
    one, several = by_several.of(name, 1), by_several.of(name, count)
    assert [row["workers"] for row in metrics(several)] == [count] * 2
    # measured: 4e-5 in a norm of 3, where a flow is learned too
    check_same_numbers(one, several, tolerance=2e-4)
    assert largest_difference(adapters(one, 2), adapters(several, 2)) < 2e-4


@pytest.mark.long
def test_two_workers_take_the_steps_of_one_in_bfloat16_too(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    # an image at a time, for bfloat16 kernels may round a larger batch otherwise
    config = make_config(
        optim=SMOOTH | {"micro_batch": 1},
        evaluate={"every": 2, "images_per_prompt": 1},
        resources={"precision": "bf16"},
    )
    train(config, tmp_path / "1" / "run", base_dir=base_dir)
    train_in_processes({"run": config}, tmp_path / "2", 2)
    check_same_numbers(tmp_path / "1" / "run", tmp_path / "2" / "run", tolerance=2e-4)
    assert largest_difference(adapters(tmp_path / "1" / "run", 2), adapters(tmp_path / "2" / "run", 2)) < 2e-4


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_workers(make_config: Make, tmp_path: Path, base_dir: Path) -> None:
    name = "ddpo"  # with state of its own; and with an average
    optim = SMOOTH | {"steps": 4, "ema": 0.5}
    config = METHODS[name].experiment(make_config, name, optim=optim, evaluate={"every": 2, "images_per_prompt": 1})
    train(config, tmp_path / "1" / name, base_dir=base_dir)
    train_in_processes({name: config}, tmp_path / "2", 2)
    lost = tmp_path / "2" / name / "checkpoints" / "step-000002"
    train(config, tmp_path / "2 to 1" / name, base_dir=base_dir, resume_from=lost)
    train_in_processes({name: config}, tmp_path / "2 to 3", 3, resume_from=lost)
    whole = tmp_path / "1" / name
    for root in ("2 to 1", "2 to 3"):
        resumed = tmp_path / root / name
        rows = metrics(resumed)
        assert [(row["step"], row["workers"]) for row in rows] == [(step, int(root[-1])) for step in (3, 4)]
        lines = (whole / "trial" / "metrics.jsonl").read_text().splitlines(keepends=True)
        tail = tmp_path / root / "tail" / "trial" / "metrics.jsonl"
        tail.parent.mkdir(parents=True)
        tail.write_text("".join(lines[2:]))
        check_same_numbers(tmp_path / root / "tail", resumed, tolerance=2e-4)
        assert largest_difference(adapters(whole, 4), adapters(resumed, 4)) < 2e-4
