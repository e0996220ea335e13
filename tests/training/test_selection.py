"""Which evaluation counts: by objective or judge, among those that keep every constraint."""

from typing import Any

import pytest
from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.training.checkpoint import Evaluated
from rltune.training.selection import Selection

BASE = {"eval/brightness": 0.5, "eval/diversity": 0.2, "eval/drift": 0.0}
RUN = [(0.6, 0.18, 0.1), (0.9, 0.05, 0.4), (0.8, 0.12, 0.3), (0.7, 0.15, 0.2)]
"""brightness, diversity and drift at steps 10, 20, 30 and 40."""


def select(rows: list[tuple[float, float, float]] = RUN, **sections: Any) -> Selection:
    config = RunConfig.model_validate({"rewards": {"brightness": {}}} | sections)
    selection = Selection(config, BASE)
    for i, row in enumerate(rows):
        metrics = {f"eval/{name}": value for name, value in zip(("brightness", "diversity", "drift"), row, strict=True)}

        def adapter(number: int = i) -> dict[str, Tensor]:
            return {"number": Tensor([number])}

        selection.take(Evaluated(10 * (i + 1), metrics), adapter)
    return selection


@pytest.mark.parametrize(
    ("name", "constraints", "step"),
    [
        ("last", {}, 40),
        ("brightness", {}, 20),
        ("diversity", {}, 10),
        ("drift", {}, 10),  # smaller is better
        ("brightness", {"diversity": {"min": 0.1}}, 30),
        ("brightness", {"diversity": {"min_ratio_to_base": 0.7}}, 40),  # at least 0.14
        ("brightness", {"diversity": {"min": 0.1}, "drift": {"max": 0.15}}, 10),
        ("brightness", {"diversity": {"min": 0.3}}, 40),  # none keeps it: the last
        ("last", {"diversity": {"min": 0.16}}, 40),
    ],
)
def test_the_best_that_keeps_every_constraint_counts(name: str, constraints: dict[str, Any], step: int) -> None:
    selection = select(evaluate={"select": name}, constraints=constraints)
    assert selection.counted is not None
    assert selection.counted.step == step
    if selection.selected is not None:
        assert float(selection.selected.adapter["number"]) == step / 10 - 1
    assert selection.last is not None
    assert selection.last.step == 40


def test_of_two_that_are_equal_the_earlier_counts() -> None:
    selection = select([RUN[0], RUN[0]], evaluate={"select": "brightness"})
    assert selection.counted is not None
    assert selection.counted.step == 10


def test_the_base_model_is_no_candidate_and_nothing_counts_before_an_evaluation() -> None:
    assert select([], evaluate={"select": "brightness"}).counted is None
    worse = select([(0.1, 0.1, 0.1)], evaluate={"select": "brightness"})
    assert worse.counted is not None
    assert worse.counted.step == 10
