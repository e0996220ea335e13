"""A user's own function or class as a reward: what it is given, and what is said of its faults."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from rltune.errors import RunError, UserError
from rltune.rewards.mixture import features, measure, score
from rltune.rewards.own import build_own, check_own, own_card
from rltune.rewards.wrappers import Frugal

PROMPTS = ("a cat", "two dogs", "a fox")
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SOURCE = """
import torch

def redness(images, prompts, *, blue=0.0):
    return images[:, 0].mean(dim=(1, 2)) - blue * images[:, 2].mean(dim=(1, 2))

def contrast(images, prompts):
    return images.square().sin().mean(dim=(1, 2, 3)) * 2

def lengths(images, prompts):
    assert not torch.is_grad_enabled()
    return torch.tensor([len(prompt) for prompt in prompts])
lengths.is_differentiable = False

def raises(images, prompts):
    raise KeyError("sky")

def column(images, prompts):
    return redness(images, prompts)[:, None]

def listed(images, prompts):
    return redness(images, prompts).tolist()

def detached(images, prompts):
    return redness(images, prompts).detach()

class Redness:
    is_differentiable = True
    value_range = (0.0, 1.0)
    metric_unit = "%"

    def __init__(self, factor=1.0):
        if factor < 0:
            raise RuntimeError("factor is negative")
        self.factor = factor

    def __call__(self, images, prompts):
        return self.factor * redness(images, prompts)

    def metric(self, images, prompts):
        return 100 * self(images, prompts)

    def features(self, images, prompts):
        return images.flatten(1)

    def to(self, device):
        self.device = device

class Contrast(Redness):
    def __call__(self, images, prompts):
        return contrast(images, prompts)

class Wrong(Redness):
    def __call__(self, images, prompts):
        return [1.0]

class Raising(Redness):
    def metric(self, images, prompts):
        raise ValueError("no metric")

class Bare:
    def __call__(self, images, prompts):
        return redness(images, prompts)

class Uncallable:
    def metric(self, images, prompts):
        return redness(images, prompts)

class Opaque(Bare):
    is_differentiable = False
    sees_group = True

class Featureless(Redness):
    features = None
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's module in the current folder, forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "own_scores.py").write_text(SOURCE)
    importlib.invalidate_caches()


def red(blue: float = 0.0) -> torch.Tensor:
    return torch.stack([image[0].mean() - blue * image[2].mean() for image in IMAGES])


def test_a_function_is_given_its_options_by_keyword() -> None:
    reward = build_own("mine", "own_scores:redness", {"blue": 0.5})
    torch.testing.assert_close(reward(IMAGES, PROMPTS), red(0.5))
    torch.testing.assert_close(reward.metric(IMAGES, PROMPTS), red(0.5))
    assert reward.is_differentiable
    assert reward.to(torch.device("cpu")) is reward


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "redness",
            {"green": 1},
            r"own_scores:redness\(images, prompts, \*, blue=0\.0\) .* \{'green': 1\}: got an unexp",
        ),
        ("redness", {"images": 1}, r"own_scores:redness.*multiple values for argument 'images'"),
        ("Redness", {"colour": 1}, r"own_scores:Redness\(factor=1\.0\) .*'colour'"),
    ],
)
def test_options_are_checked_before_anything_is_called(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^reward 'mine': {message}"):
        check_own("mine", f"own_scores:{name}", options)
    check_own("mine", f"own_scores:{name}", {})


def test_what_does_not_say_what_it_takes_is_not_checked() -> None:
    check_own("mine", "builtins:max", {"anything": 1})


def test_an_unknown_option_of_a_function_is_told_by_its_name() -> None:
    with pytest.raises(RunError, match=r"^reward 'mine': it failed with TypeError: .*'green'"):
        build_own("mine", "own_scores:redness", {"green": 1})(IMAGES, PROMPTS)


def test_a_function_without_gradient_is_called_without_and_may_give_whole_numbers() -> None:
    reward = build_own("mine", "own_scores:lengths", {})
    scores = reward(IMAGES.clone().requires_grad_(), PROMPTS)
    assert not reward.is_differentiable
    assert scores.dtype == torch.float32
    assert scores.tolist() == [5, 8, 5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"it failed with KeyError: 'sky'"),
        ("column", r"must return a tensor of shape \(3,\), got one of \(3, 1\)"),
        ("listed", r"must return a tensor of shape \(3,\), got a list"),
        ("detached", r"its scores have no gradient; write it with torch operations"),
        ("Wrong", r"must return a tensor of shape \(3,\), got a list"),
    ],
)
def test_a_fault_of_the_users_code_names_the_reward(name: str, message: str) -> None:
    reward = build_own("mine", f"own_scores:{name}", {})
    with pytest.raises(RunError, match=f"^reward 'mine': {message}"):
        score("mine", reward, IMAGES.clone().requires_grad_(), PROMPTS)


def test_detached_scores_do_where_nobody_asks_for_gradient() -> None:
    assert build_own("mine", "own_scores:detached", {})(IMAGES, PROMPTS).tolist() == red().tolist()


def test_a_class_is_built_with_its_options_and_is_itself_the_reward() -> None:
    reward = build_own("mine", "own_scores:Redness", {"factor": 2.0}).to(torch.device("cpu"))
    torch.testing.assert_close(score("mine", reward, IMAGES, PROMPTS), 2 * red())
    torch.testing.assert_close(measure("mine", reward, IMAGES, PROMPTS), 200 * red())
    assert (reward.value_range, reward.metric_unit) == ((0.0, 1.0), "%")
    assert torch.equal(features(reward, IMAGES, PROMPTS), IMAGES.flatten(1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Redness", {"colour": 1}, r"own_scores:Redness cannot be built: TypeError: .*'colour'.* \{'colour': 1\}"),
        ("Redness", {"factor": -1.0}, r"own_scores:Redness cannot be built: RuntimeError: factor is negative"),
        ("Uncallable", {}, "own_scores:Uncallable must be called as a function of images and prompts is"),
    ],
)
def test_a_class_that_is_no_reward_is_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^reward 'mine': {message}"):
        build_own("mine", f"own_scores:{name}", options)


def test_a_class_may_leave_out_all_but_its_call() -> None:
    reward = build_own("mine", "own_scores:Bare", {}).to(torch.device("cpu"))
    torch.testing.assert_close(score("mine", reward, IMAGES, PROMPTS), red())
    torch.testing.assert_close(measure("mine", reward, IMAGES, PROMPTS), red())
    assert (reward.value_range, reward.metric_unit) == ((-math.inf, math.inf), "")
    assert (reward.is_differentiable, reward.sees_group) == (True, False)


@pytest.mark.parametrize(
    ("name", "known"),
    [("redness", (True, False)), ("lengths", (False, False)), ("Bare", (True, False)), ("Opaque", (False, True))],
)
def test_what_it_states_is_known_before_it_is_built_and_after(name: str, known: tuple[bool, bool]) -> None:
    card, reward = own_card("mine", f"own_scores:{name}"), build_own("mine", f"own_scores:{name}", {})
    assert (card.is_differentiable, card.sees_group) == known
    assert (reward.is_differentiable, reward.sees_group) == known


def test_a_metric_that_fails_names_the_reward() -> None:
    with pytest.raises(RunError, match=r"^reward 'mine': it failed with ValueError: no metric"):
        measure("mine", build_own("mine", "own_scores:Raising", {}), IMAGES, PROMPTS)


@pytest.mark.parametrize("name", ["redness", "Featureless"])
def test_what_has_no_features_says_so(name: str) -> None:
    with pytest.raises(UserError, match="the reward has no features"):
        features(build_own("mine", f"own_scores:{name}", {}), IMAGES, PROMPTS)


@pytest.mark.parametrize("name", ["contrast", "Contrast"])
def test_parts_of_a_users_reward_have_the_gradient_of_the_whole(name: str) -> None:
    # each part is computed a second time, which PyTorch cuts short by an exception of its own unless told otherwise
    slopes = []
    for micro_batch in (None, 2, 1):
        images = IMAGES.clone().requires_grad_()
        reward = Frugal(build_own("mine", f"own_scores:{name}", {}), name="mine", micro_batch=micro_batch)
        reward(images, PROMPTS).square().sum().backward()
        slopes.append(images.grad)
    assert slopes[0] is not None
    assert slopes[0].abs().max() > 0
    torch.testing.assert_close(slopes[1], slopes[0])
    torch.testing.assert_close(slopes[2], slopes[0])


def test_a_function_that_runs_out_of_memory_is_given_fewer_images() -> None:
    sizes: list[int] = []

    def greedy(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("full")
        return images[:, 0].mean(dim=(1, 2))

    sys.modules["own_scores_of_memory"] = type(sys)("own_scores_of_memory")
    sys.modules["own_scores_of_memory"].greedy = greedy  # type: ignore[attr-defined]
    reward = Frugal(build_own("mine", "own_scores_of_memory:greedy", {}), name="mine")
    torch.testing.assert_close(reward(IMAGES, PROMPTS), red())
    assert sizes == [3, 1, 1, 1]
