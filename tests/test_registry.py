from dataclasses import dataclass

import pytest

from rltune.errors import UnknownNameError, UserError
from rltune.registry import Registry, suggest


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
    from rltune.rewards.base import REWARDS

    assert {"aesthetic", "alignment", "brightness", "compressibility", "smoothness"} <= set(REWARDS.names())


def test_advice_names_only_what_is_near() -> None:
    assert suggest("brigthness", ("brightness", "drift")) == "did you mean 'brightness'? known: brightness, drift"
    assert suggest("q", ("brightness", "drift")) == "known: brightness, drift"
