"""Which prompts are fresh: none that the search used, no repeats, and enough of them."""

from pathlib import Path

import pytest

from rltune.config.experiment import RunConfig
from rltune.config.load import load_experiment
from rltune.errors import UserError
from rltune.training.heldout import distinct, fresh_prompts, search_prompts
from rltune.training.prompts import read_prompts

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.yaml"))
HELD_OUT = ["a snail", "an octopus", "a crab", "a moth", "an owl"]


def asking(prompts: int, held_out: list[str] = HELD_OUT, confirm: int | str = "auto") -> RunConfig:
    section = {"prompts": prompts, "confirm": confirm}
    asked = {"rewards": {"brightness": {}}, "prompts": {"eval": held_out}, "evaluate": section}
    return RunConfig.model_validate(asked)


@pytest.mark.parametrize(
    ("prompts", "confirm", "fresh", "num_reused"),
    [
        (2, "auto", HELD_OUT[2:4], 0),
        (2, 3, HELD_OUT[2:5], 0),
        (2, 9, HELD_OUT[2:5], 0),
        (3, "auto", HELD_OUT[3:], 0),  # two left of three wanted: half of them and more
        (4, "auto", HELD_OUT[:4], 4),  # one left of four
        (4, 1, HELD_OUT[4:], 0),  # as many as were asked for
        (5, "auto", HELD_OUT, 5),
        (1, "auto", HELD_OUT[1:2], 0),
    ],
)
def test_fresh_prompts_are_those_behind_the_searchs_if_enough_are_left(
    prompts: int, confirm: int | str, fresh: list[str], num_reused: int
) -> None:
    found = fresh_prompts(asking(prompts, confirm=confirm))
    assert (list(found.prompts), found.num_reused) == (fresh, num_reused)


def test_a_single_prompt_that_is_left_is_not_enough() -> None:
    assert fresh_prompts(asking(2, HELD_OUT[:3])).num_reused == 2


def test_repeats_are_dropped() -> None:
    repeated = ["a snail", "A  Snail", "an octopus", "a snail", "a crab", "an octopus", "a moth"]
    assert distinct(repeated) == ("a snail", "an octopus", "a crab", "a moth")
    assert search_prompts(asking(2, repeated)) == ("a snail", "an octopus")
    assert fresh_prompts(asking(2, repeated)).prompts == ("a crab", "a moth")
    with pytest.raises(UserError, match=r"5 prompts are wanted, but prompts\.eval holds 7, 4 of them different"):
        search_prompts(asking(5, repeated))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_that_chooses_has_fresh_prompts_and_none_that_it_trains_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    experiment = load_experiment(path)
    config = experiment.shared
    held_out = distinct(read_prompts(config.prompts.eval, where="prompts.eval"))
    trained = distinct(read_prompts(config.prompts.train, where="prompts.train"))
    assert not {prompt.casefold() for prompt in trained} & {prompt.casefold() for prompt in held_out}
    if experiment.is_searched or config.evaluate.select != "last":
        found = fresh_prompts(config)
        assert found.num_reused == 0
        assert len(found.prompts) == config.evaluate.prompts
        assert not set(found.prompts) & set(search_prompts(config))
