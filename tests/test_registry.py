import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rltune.errors import UnknownNameError, UserError
from rltune.registry import Registry, suggest
from rltune.rewards.base import REWARDS, Card, Ready, RewardRegistry, has_gradient


@dataclass
class Thing:
    size: int = 1
    colour: str = "red"


@pytest.fixture
def things() -> Registry[Thing]:
    registry: Registry[Thing] = Registry("thing", "rltune.config")  # a package that registers nothing here
    registry.register("plain")(Thing)
    registry.register("other")(lambda: Thing(size=9))
    return registry


def test_what_is_registered_is_found_and_built(things: Registry[Thing]) -> None:
    assert things.names() == ("other", "plain")
    assert things.get("plain") is Thing
    assert things.build("plain", {"size": 3}) == Thing(size=3)
    assert things.build("other", {}) == Thing(size=9)


def test_a_name_is_given_once(things: Registry[Thing]) -> None:
    with pytest.raises(ValueError, match="thing 'plain' is registered twice"):
        things.register("plain")(Thing)
    assert things.get("plain") is Thing


def test_an_unknown_name_is_answered_with_the_nearest_and_all(things: Registry[Thing]) -> None:
    with pytest.raises(UnknownNameError, match="thing 'plane' is unknown; did you mean 'plain'\\? known: other, plain"):
        things.get("plane")
    with pytest.raises(UnknownNameError, match="thing 'xyz' is unknown; known: other, plain"):
        things.build("xyz", {})
    assert UnknownNameError.exit_code == 2


def test_an_unknown_option_is_refused_before_anything_is_built(things: Registry[Thing]) -> None:
    with pytest.raises(UserError, match="thing 'plain': option 'sise' is unknown; did you mean 'size'\\? known: size,"):
        things.check("plain", {"sise": 2})
    with pytest.raises(UserError, match="thing 'other': option 'size' is unknown; it takes none"):
        things.build("other", {"size": 2})
    things.check("plain", {"size": 2, "colour": "blue"})


def test_looking_a_name_up_imports_the_modules_of_the_package() -> None:
    assert {"aesthetic", "alignment", "brightness", "compressibility", "smoothness"} <= set(REWARDS.names())


def test_advice_names_only_what_is_near() -> None:
    assert suggest("brigthness", ("brightness", "drift")) == "did you mean 'brightness'? known: brightness, drift"
    assert suggest("q", ("brightness", "drift")) == "known: brightness, drift"


# ---- entry points: a package that is installed registers builders of its own

REWARD = """
from rltune.rewards.base import Card
from tests.test_registry import current

@current().register({name!r}, Card(scale="theirs"))
class Theirs:
    is_differentiable = True
"""
_current: list[RewardRegistry] = []


def current() -> RewardRegistry:
    """The registry under test: a fresh one, since that of the process has been loaded."""
    return _current[-1]


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution on ``sys.path``: modules, and the lines of its entry points."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(*points: str, group: str = "rltune.rewards", **modules: str) -> None:
        info = tmp_path / "their_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n" + "\n".join(points) + "\n")
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)

    return put


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> RewardRegistry:
    """A registry of rewards into which the built-in ones have gone and which has not looked for entry points."""
    registry = RewardRegistry()
    registry._builders = {name: REWARDS.get(name) for name in REWARDS.names()}
    registry._cards = {name: REWARDS.card(name) for name in REWARDS.names()}
    monkeypatch.setattr(sys.modules[__name__], "_current", [registry])
    monkeypatch.setitem(sys.modules, "tests.test_registry", sys.modules[__name__])
    return registry


def test_a_module_that_an_entry_point_names_registers_its_own(install: Install, fresh: RewardRegistry) -> None:
    install("sharpness = their_sharpness", their_sharpness=REWARD.format(name="their_sharpness"))
    assert set(fresh.names()) == {*REWARDS.names(), "their_sharpness"}
    assert fresh.card("their_sharpness") == Card(scale="theirs")
    assert fresh.build("their_sharpness", {}).is_differentiable


def test_entry_points_of_other_groups_are_left(install: Install, fresh: RewardRegistry) -> None:
    install("a = their_estimator", group="rltune.estimators", their_estimator="raise RuntimeError('imported')")
    assert fresh.names() == REWARDS.names()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError: "),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        (
            "from tests.test_registry import current\n@current().register('x')\ndef build(images): ...\n",
            "ValueError: reward 'x': must take images and prompts, or neither, and options with a default each",
        ),
    ],
)
def test_one_that_fails_is_named_once_and_the_others_are_loaded(
    install: Install, fresh: RewardRegistry, caplog: pytest.LogCaptureFixture, text: str, reason: str
) -> None:
    install("bad = their_bad", "good = their_good", their_bad=text, their_good=REWARD.format(name="their_good"))
    assert set(fresh.names()) == {*REWARDS.names(), "their_good"}
    assert fresh.get("brightness") is REWARDS.get("brightness")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    start = "the reward plug-in 'bad' of their-package (their_bad) is left out: "
    assert record.getMessage().startswith(start + reason)


def test_a_module_that_is_not_there_is_named(
    install: Install, fresh: RewardRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    install("gone = their_gone")
    assert fresh.names() == REWARDS.names()
    assert "'gone' of their-package (their_gone) is left out: ModuleNotFoundError" in caplog.text


def test_a_built_in_name_cannot_be_taken(
    install: Install, fresh: RewardRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    install("mine = their_brightness", their_brightness=REWARD.format(name="brightness"))
    assert fresh.get("brightness") is REWARDS.get("brightness")
    assert fresh.card("brightness") == REWARDS.card("brightness")
    (record,) = caplog.records
    assert record.getMessage().endswith("ValueError: reward 'brightness' is registered twice")


def test_a_built_in_takes_its_name_back_from_a_module_that_was_imported_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = RewardRegistry()

    class Theirs:
        is_differentiable = True

    registry.register("brightness", Card(scale="theirs"))(Theirs)
    own = REWARDS.get("brightness")
    registry.register("brightness", REWARDS.card("brightness"))(own)
    assert registry.get("brightness") is own
    assert registry.card("brightness") == REWARDS.card("brightness")
    (record,) = caplog.records
    assert "reward 'brightness' of" in record.getMessage()
    assert "is not used: rltune has one of that name" in record.getMessage()
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("brightness")(Theirs)
    assert has_gradient("brightness")


# ---- what a reward may be


def mean(images: Tensor, prompts: Sequence[str], *, factor: float = 1.0) -> Tensor:
    return factor * images.mean(dim=(1, 2, 3))


class Mean:
    """The mean again, with an option that it is built with."""

    def __init__(self, factor: float = 1.0, is_differentiable: bool = True) -> None:
        self.factor, self.is_differentiable = factor, is_differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return mean(images, prompts, factor=self.factor)


def build_mean(*, factor: float = 1.0) -> Mean:
    return Mean(factor)


@pytest.mark.parametrize("kind", [mean, Mean, build_mean])
def test_a_reward_is_a_function_a_class_or_what_a_function_builds(fresh: RewardRegistry, kind: Any) -> None:
    fresh.register("mine", Card(value_range=(0.0, 1.0), metric_unit="%"))(kind)
    assert "factor" in [option.name for option in fresh.options("mine")]
    reward = fresh.build("mine", {"factor": 2.0})
    images = torch.full((2, 3, 4, 4), 0.25)
    assert reward(images, ["a", "b"]).tolist() == reward.metric(images, ["a", "b"]).tolist() == [0.5, 0.5]
    assert (reward.value_range, reward.metric_unit) == ((0.0, 1.0), "%")
    assert (reward.is_differentiable, reward.sees_group, reward.features, reward.score_of) == (True, False, None, None)
    assert reward.to(torch.device("cpu")) is reward
    with pytest.raises(UserError, match=r"reward 'mine': option 'images' is unknown; .*known: factor"):
        fresh.build("mine", {"images": 1})


@pytest.mark.parametrize(
    "kind",
    [
        lambda images: images,
        lambda images, prompts, factor: images,
        lambda *, factor: factor,
        type("Sized", (), {"__init__": lambda self, width, height: None}),
    ],
)
def test_what_takes_something_else_is_refused(fresh: RewardRegistry, kind: Any) -> None:
    with pytest.raises(ValueError, match="reward 'mine': must take images and prompts, or neither, and options with"):
        fresh.register("mine")(kind)
    assert "mine" not in fresh.names()


def test_what_is_built_may_not_say_otherwise_than_its_card(fresh: RewardRegistry) -> None:
    fresh.register("mine")(Mean)
    with pytest.raises(ValueError, match="'mine': it has is_differentiable = False, and its card says otherwise"):
        fresh.build("mine", {"is_differentiable": False})


def test_what_a_class_states_goes_before_the_card(fresh: RewardRegistry) -> None:
    class Grouped(Mean):
        sees_group = True
        value_range = property(lambda self: (0.0, self.factor))

    fresh.register("mine", Card(value_range=(0.0, 9.0)))(Grouped)
    assert fresh.card("mine") == Card(value_range=(0.0, 9.0), sees_group=True)
    assert fresh.build("mine", {"factor": 3.0}).value_range == (0.0, 3.0)


def test_an_object_that_moves_may_be_another_afterwards() -> None:
    class Moving(Mean):
        def to(self, device: torch.device) -> "Moving":
            return Moving(self.factor + 1)

    reward = Ready(Moving(), Card())
    images = torch.full((1, 3, 2, 2), 0.5)
    assert reward.to(torch.device("cpu")) is reward
    assert reward(images, ["a"]).tolist() == [1.0]
