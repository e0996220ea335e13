"""An experiment's rewards in whole runs: the user's own, aliases, wrappers, trust, mixtures, and rewards of groups."""

import importlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.errors import NonFiniteError, RunError, UserError
from rltune.rewards.base import REWARDS
from rltune.rewards.mixture import Calibration
from rltune.rewards.scalarise import Chebyshev
from rltune.runs.events import read_notices
from rltune.training import model_cache as loading
from rltune.training import setup
from rltune.training.evaluation import ImageSet, sample_and_score
from rltune.training.reference import load_base
from rltune.training.rewards import build_mixture, build_rewards, odd_targets, try_reward
from rltune.training.setup import base_key, build_run, calibration_size, check_options
from tests.training.runs import Make, adapted_run, adapters, metrics, train, train_in_processes

CPU = torch.device("cpu")
DDPO = {"name": "ddpo", "k": None, "draw": None, "options": {"min_count": 2}}
SOURCE = """
import torch

def redness(images, prompts, *, blue=0.0):
    return images[:, 0].mean(dim=(1, 2)) - blue * images[:, 2].mean(dim=(1, 2))

def lengths(images, prompts):
    return images.detach().flatten(1).mean(dim=1).round(decimals=3) + torch.tensor([len(p) for p in prompts])
lengths.is_differentiable = False

def raises(images, prompts):
    raise KeyError("sky")

def column(images, prompts):
    return redness(images, prompts)[:, None]

def listed(images, prompts):
    return redness(images, prompts).tolist()

def detached(images, prompts):
    return redness(images, prompts).detach()

def hole(images, prompts):
    return redness(images, prompts) / torch.tensor([0.0 if "two" in prompt else 1.0 for prompt in prompts]) * 0

class Redness:
    is_differentiable = True
    value_range = (0.0, 1.0)
    metric_unit = "%"

    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self, images, prompts):
        return self.factor * redness(images, prompts)

    def metric(self, images, prompts):
        return 100 * self(images, prompts)

    def to(self, device):
        return self

class Late(Redness):
    def __init__(self):
        super().__init__()
        self.is_differentiable = False

def spread(images, prompts):
    return ((images - images.mean(dim=0)) ** 2).mean(dim=(1, 2, 3))
spread.sees_group = True
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the user's module in it, which is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for name in ("my_rewards",):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    importlib.invalidate_caches()
    return tmp_path


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model is loaded."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_model", load)


def short(make_config: Make, rewards: Mapping[str, Any], **sections: Any) -> RunConfig:
    """Two rounds and one evaluation."""
    optim = {"steps": 2, **sections.pop("optim", {})}
    evaluate = {"every": 2, "prompts": 2, "images_per_prompt": 2, **sections.pop("evaluate", {})}
    return make_config(rewards=dict(rewards), optim=optim, evaluate=evaluate, **sections)


def moved(root: Path, step: int = 2) -> dict[str, Tensor]:
    """The adapters that start at 0."""
    return {name: values for name, values in adapters(root, step).items() if ".lora_B." in name}


def check_trained(root: Path, step: int = 2) -> None:
    assert any(bool(values.any()) for values in moved(root, step).values())
    for row in metrics(root):
        assert all(math.isfinite(value) for value in row.values())


def is_equal(first: Path, second: Path, step: int = 2) -> bool:
    one, two = adapters(first, step), adapters(second, step)
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


SMOOTH = {"eps": 1.0, "lr": 0.5}
"""With a large eps Adam's step is nearly linear in the gradient, so that rounding does not become a whole lr."""


def difference(first: Path, second: Path) -> float:
    """Of two runs' adapters, relative to the largest."""
    one, two = moved(first), moved(second)
    largest = max(values.abs().max().item() for values in one.values())
    assert largest > 0
    return max((one[name] - two[name]).abs().max().item() for name in one) / largest


# ---- the user's own


@pytest.mark.slow
@pytest.mark.parametrize(
    "section",
    [
        {"reward": "my_rewards:redness"},
        {"reward": "my_rewards:redness", "options": {"blue": 0.5}, "micro_batch": 1},
        {"reward": "my_rewards:Redness", "options": {"factor": 2.0}},
        {"reward": "my_rewards:Redness", "micro_batch": 2},
    ],
    ids=["function", "options", "class", "parts"],
)
def test_a_users_reward_trains(make_config: Make, folder: Path, section: dict[str, Any]) -> None:
    reporter = train(short(make_config, {"mine": section}), folder)
    check_trained(folder)
    first, last = reporter.reports[0], reporter.reports[-1]
    assert last["gain/mine"] == pytest.approx(last["eval/mine"] - first["eval/mine"], abs=1e-9)
    is_percent = section["reward"].endswith("Redness")  # what is reported is its metric, what is trained its score
    assert (last["eval/mine"] > 2) == is_percent
    assert metrics(folder)[0]["train/mine"] < 2


@pytest.mark.long
def test_a_users_reward_without_gradient_trains_a_policy_alone(make_config: Make, folder: Path) -> None:
    rewards = {"mine": {"reward": "my_rewards:lengths"}}
    policy: dict[str, Any] = {"sampler": {"eta": 1.0}, "prompts": {"images_per_prompt": 2}, "estimator": DDPO}
    train(short(make_config, rewards, **policy), folder / "policy")
    check_trained(folder / "policy")
    watched = {"mine": {"reward": "my_rewards:lengths", "weight": 0}, "brightness": {}}
    train(short(make_config, watched), folder / "watched")
    check_trained(folder / "watched")


def test_a_users_reward_without_gradient_is_refused_before_anything_is_loaded(
    make_config: Make, folder: Path, unloaded: None
) -> None:
    config = short(make_config, {"mine": {"reward": "my_rewards:lengths"}})
    message = r"^rewards\.mine: my_rewards:lengths says that it has no gradient, .* give it weight 0 to watch it only"
    with pytest.raises(UserError, match=message):
        check_options(config)
    with pytest.raises(UserError, match=message):
        train(config, folder)
    with pytest.raises(UserError, match=r"reward 'mine': reward 'my_rewards:green': module 'my_rewards' .* has no"):
        train(short(make_config, {"mine": {"reward": "my_rewards:green"}}), folder)
    with pytest.raises(UserError, match=r"reward 'mine': reward 'my_reward:redness': there is no module 'my_reward'"):
        train(short(make_config, {"mine": {"reward": "my_reward:redness"}}), folder)


@pytest.mark.slow
def test_an_instance_without_gradient_is_refused_once_it_is_built(make_config: Make, folder: Path) -> None:
    with pytest.raises(UserError, match="mine: one with a positive weight has no gradient, which alignprop needs"):
        train(short(make_config, {"mine": {"reward": "my_rewards:Late"}}), folder)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("raises", RunError, "reward 'mine': it failed with KeyError: 'sky'"),
        ("column", RunError, r"reward 'mine': must return a tensor of shape \(4,\), got one of \(4, 1\)"),
        ("listed", RunError, r"reward 'mine': must return a tensor of shape \(4,\), got a list"),
        ("detached", RunError, "reward 'mine': its scores have no gradient"),
        ("hole", NonFiniteError, "reward 'mine': not finite, got nan for 'two red birds'"),
    ],
)
def test_a_fault_of_a_users_reward_ends_the_run_in_words(
    make_config: Make, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: type[Exception], message: str
) -> None:
    monkeypatch.setattr(setup, "NUM_CALIBRATION_IMAGES", 4)
    with pytest.raises(kind, match=message):
        train(short(make_config, {"mine": {"reward": f"my_rewards:{name}"}}), folder)


# ---- names


@pytest.mark.slow
def test_a_reward_stands_in_an_experiment_as_often_as_it_has_names(make_config: Make, folder: Path) -> None:
    rewards = {
        "warm": {"reward": "my_rewards:redness"},
        "cold": {"reward": "my_rewards:redness", "options": {"blue": 1.0}, "negate": True},
        "lit": {"reward": "brightness"},
    }
    config = short(
        make_config,
        rewards,
        objectives=["warm", "lit", "smoothness"],
        constraints={"cold": {"min": -1.0}},
        evaluate={"judges": ["smoothness", "drift"]},
    )
    report = train(config, folder).reports[-1]
    check_trained(folder)
    run = build_run(config)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    red, green, blue = images.double().mean(dim=(2, 3)).unbind(dim=1)
    expected = {"warm": red, "cold": blue - red, "lit": (red + green + blue) / 3}
    for name, values in expected.items():
        assert run.rewards[name](images, ["", ""]).tolist() == pytest.approx(values.tolist(), abs=1e-6)
    assert {key.removeprefix("eval/") for key in report if key.startswith("eval/") and not key.endswith("_se")} == {
        "warm", "cold", "lit", "smoothness", "drift", "domination", "collapse"
    }  # fmt: skip


# ---- what is done to a reward


@pytest.mark.long
def test_everything_at_once_trains(make_config: Make, folder: Path) -> None:
    words = {"positive": "Realistic photo", "negative": "Cartoon", "k": 0.5}
    rewards = {
        "match": {"reward": "alignment", "relative": words, "trust": {"reference": "builtin"}, "micro_batch": 2},
        "dim": {"reward": "brightness", "negate": True, "loss": "hinge", "target": -0.1, "standardise": False},
        "mild": {"reward": "smoothness", "negate": True, "loss": "target", "target": 0.01, "weight": 0.5},
    }
    reporter = train(short(make_config, rewards), folder)
    check_trained(folder)
    row = metrics(folder)[0]
    assert row["train/dim"] < 0 < row["train/mild"]
    # in its own unit, and no higher than the target
    assert row["train/dim_z"] == pytest.approx(row["train/dim"], abs=1e-6)
    assert reporter.reports[0]["eval/dim"] < 0
    base = load_base(next((folder / "base").iterdir()))
    assert base is not None
    dim, mild = base.calibration["dim"].values, base.calibration["mild"].values
    assert max(dim) < -0.1
    assert min(mild) >= 0.01
    below, reached = read_notices(folder / "trial")
    assert below.startswith(f"rewards.dim.target: none of {len(dim)} images of the base model reaches it, the best is ")
    assert reached.startswith(f"rewards.mild.target: all {len(mild)} images of the base model reach it already, ")


def test_a_target_is_in_the_unit_that_is_reported(make_config: Make) -> None:
    rewards = {
        "presence": {"loss": "hinge", "target": 0.9},
        "gone": {"reward": "presence", "negate": True, "loss": "target", "target": -0.25},
        "compressibility": {"loss": "hinge", "target": -1.5},
        "aesthetic": {"loss": "hinge", "target": 6.5},
        "brightness": {},
    }
    config = make_config(rewards=rewards)
    units = {name: Calibration(0.0, 1.0) for name in rewards}
    shapes = build_mixture(config, build_rewards(config, (), CPU), units, CPU, num_pixels=64 * 64).shapes
    bits = (1500 - 625) * 8 / 64**2  # a pixel, beyond the 625 bytes of a header; 0.35 and 2.0 are what was measured
    targets = {"presence": math.log(0.9), "gone": -math.log(0.25), "compressibility": -(bits - 0.35) / 2.0}
    for name, target in (targets | {"aesthetic": 6.5, "brightness": 0.0}).items():
        assert shapes[name].target == pytest.approx(target, abs=1e-12), name
    for name, wrong in (("presence", 1.5), ("presence", -0.1), ("gone", 0.25)):
        section = config.rewards[name].model_copy(update={"target": wrong})
        with pytest.raises(UserError, match=rf"rewards\.{name}\.target: reward 'presence': a target is a chance"):
            try_reward(name, section)


FAR = "the best is 2.5 standard deviations below"


@pytest.mark.parametrize(
    ("loss", "target", "weight", "said"),
    [
        ("hinge", 0.1, 1.0, "all 2 images of the base model reach it already, no image gains by more"),
        ("target", 0.05, 1.0, "all 2 images of the base model reach it already, training goes down to it"),
        ("hinge", 0.2, 1.0, ""),
        ("hinge", 0.3, 1.0, ""),
        # mean 0.2, deviation 0.1
        (
            "hinge",
            0.55,
            1.0,
            "none of 2 images of the base model reaches it, the best is 2.5 standard deviations below",
        ),
        (
            "target",
            0.55,
            1.0,
            "none of 2 images of the base model reaches it, the best is 2.5 standard deviations below",
        ),
        ("hinge", 0.55, 0.0, ""),
    ],
)
def test_a_target_that_all_base_images_stand_on_one_side_of_is_said(
    make_config: Make, loss: str, target: float, weight: float, said: str
) -> None:
    rewards = {"brightness": {"loss": loss, "target": target, "weight": weight}, "contrast": {}}
    config = make_config(rewards=rewards)
    unit = Calibration(0.2, 0.1, (0.1, 0.3))
    mixture = build_mixture(config, build_rewards(config, (), CPU), dict.fromkeys(rewards, unit), CPU)
    assert odd_targets(mixture) == ([f"rewards.brightness.target: {said}"] if said else [])


@pytest.mark.long
def test_trust_of_a_constant_weight_is_no_trust(make_config: Make, folder: Path, base_dir: Path) -> None:
    trusts = {
        "none": {},
        "one": {"reference": "builtin", "slope": 0.0, "offset": 0.0},
        "some": {"reference": "builtin"},
    }
    for name, trust in trusts.items():
        rewards = {"alignment": {"trust": trust}, "brightness": {}}
        train(short(make_config, rewards), folder / name, base_dir=folder / "base")
    assert is_equal(folder / "none", folder / "one")
    assert not is_equal(folder / "none", folder / "some")
    assert len(list((folder / "base").iterdir())) == 1


@pytest.mark.slow
def test_trust_in_a_reward_that_says_nothing_of_what_it_sees_is_refused(make_config: Make, folder: Path) -> None:
    for reference in ("builtin", str(folder / "kept.safetensors")):
        torch.manual_seed(0)
        from safetensors.torch import save_file

        save_file({"features": torch.randn(4, 3)}, folder / "kept.safetensors")
        rewards = {"lit": {"reward": "brightness", "trust": {"reference": reference}}}
        with pytest.raises(UserError, match=r"^rewards\.lit\.trust: the reward has no features to measure trust by"):
            train(short(make_config, rewards), folder, base_dir=folder / "base")


def test_references_that_do_not_fit_are_refused_with_the_rewards_name(make_config: Make, folder: Path) -> None:
    from safetensors.torch import save_file

    width = REWARDS.build("alignment", {}).features(torch.zeros(1, 3, 8, 8), [""]).shape[1]  # type: ignore[attr-defined]
    kept = {
        "narrow": torch.randn(4, 3),
        "holes": torch.full((4, width), torch.nan),
        "nothing": torch.zeros(4, width),
    }
    messages = {"narrow": f"3 wide, the reward's are {width}", "holes": "finite", "nothing": "not all zero"}
    (folder / "empty").mkdir()
    for name, features in kept.items():
        save_file({"features": features}, folder / f"{name}.safetensors")
    for reference, message in [*((f"{n}.safetensors", m) for n, m in messages.items()), ("empty", "neither 'builtin'")]:
        config = short(make_config, {"match": {"reward": "alignment", "trust": {"reference": reference}}})
        rewards = build_rewards(config, (), CPU)
        with pytest.raises(UserError, match=rf"^rewards\.match\.trust: .*{message}"):
            build_mixture(config, rewards, {"match": Calibration(0.0, 1.0)}, CPU)


def test_no_trust_is_measured_in_a_reward_that_is_only_watched(make_config: Make) -> None:
    config = short(make_config, {"lit": {"reward": "brightness", "trust": {"reference": "builtin"}, "weight": 0},
                                 "smoothness": {}})  # fmt: skip
    units = {"lit": Calibration(0.0, 1.0), "smoothness": Calibration(0.0, 1.0)}
    assert build_mixture(config, build_rewards(config, (), CPU), units, CPU).trusts == {}


@pytest.mark.long
@pytest.mark.parametrize("method", [pytest.param("sum", marks=pytest.mark.long), "gradient_balance"])
def test_a_reward_in_parts_is_the_same_to_rounding(make_config: Make, folder: Path, method: str) -> None:
    words = {"positive": "Realistic photo", "negative": "Cartoon", "k": 0.5}
    for name, micro_batch in (("whole", None), ("parts", 1), ("uneven", 3)):
        rewards = {
            "alignment": {"micro_batch": micro_batch},
            # twice the same tower: what the first term keeps, the second finds
            "match": {"reward": "alignment", "relative": words, "micro_batch": micro_batch},
            "mine": {"reward": "my_rewards:redness", "micro_batch": micro_batch},
        }
        config = short(make_config, rewards, optim=SMOOTH, mixture={"method": method})
        train(config, folder / name, base_dir=folder / "base")
    # float32, convolutions over another number of images
    assert difference(folder / "whole", folder / "parts") < 1e-4
    assert difference(folder / "whole", folder / "uneven") < 1e-4


# ---- mixtures

TWO: dict[str, Any] = {"brightness": {"weight": 0.75}, "smoothness": {"weight": 0.25}}
METHODS = ("sum", "chebyshev", "win_rate", "non_dominated", "gradient_balance", "min_norm")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("standardise", [True, False])
def test_a_mixture_trains_and_its_number_is_what_it_says(
    make_config: Make, folder: Path, base_dir: Path, method: str, standardise: bool
) -> None:
    rewards = {name: {**section, "standardise": standardise} for name, section in TWO.items()}
    mixture = {"method": method, "ideal": 2.0, "rho": 0.5}
    train(short(make_config, rewards, mixture=mixture, optim={"steps": 1}), folder, base_dir=base_dir)
    check_trained(folder, 1)
    (row,) = metrics(folder)
    means = {name: row[f"train/{name}_z"] for name in TWO}
    assert (means["brightness"] == pytest.approx(row["train/brightness"], abs=1e-6)) == (not standardise)
    weighted = 0.75 * means["brightness"] + 0.25 * means["smoothness"]
    if method in ("sum", "gradient_balance", "min_norm"):
        assert row["train/reward"] == pytest.approx(weighted, rel=1e-4, abs=1e-5)  # float32
    elif method == "chebyshev":
        # the least of two terms is below each, for every image and so on average
        lags = [0.75 * (means["brightness"] - 2), 0.25 * (means["smoothness"] - 2)]
        assert row["train/reward"] <= min(lags) + 0.5 * sum(lags) + 1e-5
    elif method == "win_rate":
        assert 0 < row["train/reward"] < 1


@pytest.mark.long
def test_methods_differ(make_config: Make, folder: Path, base_dir: Path) -> None:
    for method in METHODS:
        train(short(make_config, TWO, mixture={"method": method}), folder / method, base_dir=base_dir)
    for i, method in enumerate(METHODS):
        for other in METHODS[:i]:
            assert not is_equal(folder / method, folder / other), (method, other)


@pytest.mark.long
@pytest.mark.parametrize(
    "method",
    [
        *(pytest.param(name, marks=pytest.mark.long) for name in ("sum", "chebyshev", "min_norm")),
        "win_rate",
        "gradient_balance",
    ],
)
def test_micro_batches_of_a_mixture_add_up_to_the_whole_batch(
    make_config: Make, folder: Path, base_dir: Path, method: str
) -> None:
    for name, micro_batch in (("whole", 4), ("split", 1)):
        optim = {**SMOOTH, "micro_batch": micro_batch}
        train(short(make_config, TWO, mixture={"method": method}, optim=optim), folder / name, base_dir=base_dir)
    assert difference(folder / "whole", folder / "split") < 1e-4  # float32, convolutions over another number of images


@pytest.mark.long
def test_a_cap_that_is_the_worst_of_every_image_is_no_fault(make_config: Make, folder: Path, base_dir: Path) -> None:
    rewards = {"brightness": {"loss": "hinge", "target": -9.0}, "smoothness": {}}
    config = short(make_config, rewards, mixture={"method": "chebyshev", "rho": 0.0})
    assert train(config, folder / "alone", base_dir=base_dir).reports[-1]["eval/drift"] == 0
    config = short(make_config, rewards, mixture={"method": "chebyshev", "rho": 0.1})
    assert train(config, folder / "both", base_dir=base_dir).reports[-1]["eval/drift"] > 0


def test_chebyshevs_options_reach_it(make_config: Make) -> None:
    units = {name: Calibration(0.0, 1.0) for name in TWO}
    config = short(make_config, TWO, mixture={"method": "chebyshev", "ideal": 1.5, "rho": 0.25})
    assert build_mixture(config, build_rewards(config, (), CPU), units, CPU).scalarise == Chebyshev(ideal=1.5, rho=0.25)
    config = short(make_config, TWO, mixture={"method": "chebyshev"})
    assert build_mixture(config, build_rewards(config, (), CPU), units, CPU).scalarise == Chebyshev()


@pytest.mark.slow
@pytest.mark.parametrize("standardise", [True, False])
def test_a_win_rate_compares_with_the_scores_that_were_kept(make_config: Make, folder: Path, standardise: bool) -> None:
    rewards = {"brightness": {"standardise": standardise}}
    config = short(make_config, rewards, mixture={"method": "win_rate"}, optim={"steps": 1})
    train(config, folder / "first", base_dir=folder / "base")
    train(config, folder / "again", base_dir=folder / "base")  # now the base model's scores come from the file
    assert is_equal(folder / "first", folder / "again", 1)
    base = load_base(folder / "base" / base_key(config))
    assert base is not None
    unit = base.calibration["brightness"]
    assert isinstance(unit.values, tuple)
    assert len(unit.values) == setup.NUM_CALIBRATION_IMAGES
    assert unit.mean == pytest.approx(sum(unit.values) / len(unit.values))
    mixture = build_mixture(config, build_rewards(config, (), CPU), base.calibration, CPU)
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scale = unit.std if standardise else 1.0
    expected = [
        sum(1 / (1 + math.exp(-(float(image.mean()) - value) / scale)) for value in unit.values) / len(unit.values)
        for image in images
    ]
    assert mixture(images, [""] * 3).total_B.tolist() == pytest.approx(expected, abs=1e-5)  # float32


@pytest.mark.slow
def test_a_calibration_is_the_same_from_the_file(make_config: Make, folder: Path) -> None:
    config = short(make_config, TWO, optim={"steps": 1})
    from rltune.training.loop import _reference

    run = build_run(config)
    measured, loaded = _reference(run, folder), _reference(run, folder)
    assert loaded.calibration == measured.calibration


# ---- rewards of groups

GROUP: dict[str, Any] = {"variety": {"reward": "diversity_pixels"}}
PAIRS = {"prompts": {"images_per_prompt": 2}}


@pytest.mark.slow
def test_a_reward_of_groups_trains(make_config: Make, folder: Path) -> None:
    config = short(make_config, GROUP, **PAIRS, optim={"micro_batch": 2})
    report = train(config, folder).reports[-1]
    check_trained(folder)
    # the judge measures the same distance, of pictures in 8 bits
    assert report["eval/variety"] == pytest.approx(report["eval/diversity"], abs=2 / 255)


@pytest.mark.slow
def test_a_reward_of_groups_may_be_watched_where_there_are_none(make_config: Make, folder: Path) -> None:
    rewards = {"variety": {"reward": "diversity_pixels", "weight": 0}, "brightness": {}}
    report = train(short(make_config, rewards), folder).reports[-1]  # the base model's images stand alone: no spread
    check_trained(folder)
    assert report["eval/variety"] > 0
    assert [row["train/variety"] for row in metrics(folder)] == [0, 0]


def test_a_users_reward_of_groups_is_held_to_the_same_rules(make_config: Make, folder: Path, unloaded: None) -> None:
    mine = {"mine": {"reward": "my_rewards:spread"}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, r"^prompts\.images_per_prompt: my_rewards:spread compares the images of a prompt .* got 1 of each"),
        ({**PAIRS, "optim": {"micro_batch": 1}}, r"^optim\.micro_batch: .*, got 1 images a worker at a time; let it"),
        ({**PAIRS, "rewards": {"mine": {**mine["mine"], "micro_batch": 2}}}, r"^rewards\.mine\.micro_batch: .*leave"),
    ]  # fmt: skip
    for sections, message in cases:
        config = short(make_config, **{"rewards": mine, **sections})
        with pytest.raises(UserError, match=message):
            train(config, folder)


@pytest.mark.slow
def test_a_users_reward_of_groups_trains(make_config: Make, folder: Path) -> None:
    train(short(make_config, {"mine": {"reward": "my_rewards:spread"}}, **PAIRS, optim={"micro_batch": 2}), folder)
    check_trained(folder)


class Ranked:
    """One of two workers, which hand over nothing: their rows are put together by the test."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count, self.device = rank, count, CPU
        self.rows: list[Any] = []

    def gather(self, items: list[Any]) -> list[Any]:
        self.rows = self.rows or items  # the rows come first, an image's shape after them
        return items

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.slow
@pytest.mark.parametrize("each", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)])
def test_workers_share_prompts_and_say_the_same_of_groups(make_config: Make, each: int) -> None:
    config = short(make_config, {**GROUP, "mine": {"reward": "my_rewards:spread"}, "lit": {"reward": "brightness"}},
                   **PAIRS)  # fmt: skip
    run = adapted_run(config)
    prompts = ("a cat", "a dog", "a cat", "a cat", "a fox")  # one stands there more than once
    images = ImageSet(prompts, each, run.latent_shape)
    seen: dict[tuple[int, int], dict[int, dict[str, float]]] = {}
    for count, batch_size in ((1, 100), (1, 1), (2, 4), (2, 7), (7, 2)):
        rows: dict[int, dict[str, float]] = {}
        for rank in range(count):
            worker = Ranked(rank, count)
            if rank < len(prompts):
                sample_and_score(run.sampler, images, run.rewards, worker, batch_size=batch_size)  # type: ignore[arg-type]
            rows |= dict(worker.rows)
        seen[count, batch_size] = rows
    one = seen[1, 100]
    assert sorted(one) == list(range(5 * each))
    assert all(values["variety"] > 0 for values in one.values()) == (each > 1)
    for rows in seen.values():
        assert rows.keys() == one.keys()
        for number, values in rows.items():
            # float32, convolutions over another number of images
            assert values == pytest.approx(one[number], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_micro_batches_of_groups_add_up_to_the_whole_batch(make_config: Make, folder: Path) -> None:
    for name, micro_batch in (("whole", 4), ("split", 2)):
        optim = {**SMOOTH, "micro_batch": micro_batch}
        # every group of the batch has the same prompt, and is compared in itself alone
        prompts = {"train": ["a cat"], "images_per_prompt": 2}
        config = short(make_config, GROUP, prompts=prompts, optim=optim)
        train(config, folder / name, base_dir=folder / "base")
    assert difference(folder / "whole", folder / "split") < 1e-4  # float32, convolutions over another number of images


def test_groups_are_calibrated_as_they_are_trained(make_config: Make) -> None:
    for each, expected in ((1, (32, 1)), (2, (16, 2)), (3, (11, 3))):
        config = short(make_config, GROUP, prompts={"images_per_prompt": each}, optim={"batch": 6})
        assert calibration_size(config) == expected
        assert calibration_size(short(make_config, TWO, prompts={"images_per_prompt": each}, optim={"batch": 6})) == (
            32, 1
        )  # fmt: skip
        run = build_run(config)
        assert (len(run.calibration_images.prompts), run.calibration_images.images_per_prompt) == expected


def test_a_judge_does_not_change_what_rewards_are_calibrated_on(make_config: Make) -> None:
    config = short(make_config, TWO, **PAIRS, evaluate={"judges": ["diversity_pixels"]})
    assert build_run(config).calibration_images.images_per_prompt == 1


# ---- the name of the base model's measurements


@pytest.mark.parametrize(
    ("section", "is_shared"),
    [
        ({"weight": 0.5}, True),
        ({"trust": {"reference": "builtin", "slope": 1.0}}, True),
        ({"micro_batch": 2}, True),
        ({"standardise": False}, True),
        ({"loss": "hinge", "target": 0.5}, True),
        ({"reward": "my_rewards:redness"}, False),
        ({"options": {"model": "elsewhere"}}, False),
        ({"negate": True}, False),
        ({"relative": {"positive": "good", "negative": "bad"}}, False),
    ],
)
def test_what_a_reward_says_of_the_base_model_names_its_measurements(
    make_config: Make, section: dict[str, Any], is_shared: bool
) -> None:
    plain = base_key(short(make_config, {"alignment": {}}))
    assert (base_key(short(make_config, {"alignment": section})) == plain) == is_shared


@pytest.mark.parametrize(
    ("rewards", "is_shared"), [(TWO, True), (GROUP, False), ({"mine": {"reward": "my_rewards:spread"}}, False)]
)
def test_the_images_of_a_prompt_matter_to_rewards_of_groups_alone(
    make_config: Make, rewards: dict[str, Any], is_shared: bool
) -> None:
    one, two = (base_key(short(make_config, rewards, prompts={"images_per_prompt": each})) for each in (1, 2))
    assert (one == two) == is_shared


@pytest.mark.slow
def test_a_run_is_named_where_the_users_code_is_not(make_config: Make, folder: Path) -> None:
    config = short(make_config, {"mine": {"reward": "my_rewards:redness"}})
    (folder / "my_rewards.py").unlink()
    there = base_key(config)
    (folder / "my_rewards.py").write_text(SOURCE)
    train(config, folder, base_dir=folder / "base")
    assert [path.name for path in (folder / "base").iterdir()] == [there]


# ---- resuming


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rewards", "mixture"),
    [
        pytest.param(
            {"alignment": {"trust": {"reference": "builtin"}}, "brightness": {}},
            {"method": "gradient_balance"},
            marks=pytest.mark.long,
        ),
        ({"mine": {"reward": "my_rewards:redness", "micro_batch": 2}, "brightness": {}}, {"method": "win_rate"}),
        pytest.param({"brightness": {}, "smoothness": {}}, {"method": "min_norm"}, marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    make_config: Make, folder: Path, rewards: dict[str, Any], mixture: dict[str, Any]
) -> None:
    config = short(make_config, rewards, mixture=mixture, evaluate={"every": 1})
    train(config, folder / "whole", base_dir=folder / "base")
    torch.manual_seed(99)  # the process that resumes has another past
    checkpoint = folder / "whole" / "checkpoints" / "step-000001"
    train(config, folder / "half", base_dir=folder / "base", resume_from=checkpoint)
    assert is_equal(folder / "whole", folder / "half")


# ---- workers


@pytest.mark.long
def test_two_workers_take_the_steps_of_one(make_config: Make, folder: Path) -> None:
    rewards: dict[str, dict[str, Any]] = {
        "groups": {**GROUP, "mine": {"reward": "my_rewards:spread"}},
        "trust": {"alignment": {"trust": {"reference": "builtin"}, "micro_batch": 1}, "brightness": {"negate": True}},
    }
    method = {"groups": "win_rate", "trust": "gradient_balance"}
    # two of the four prompts are one, so that a batch holds its images twice
    prompts = {"train": ["a cat", "a dog", "a cat", "a fox"], "images_per_prompt": 2}
    configs = {
        name: short(
            make_config, section, prompts=prompts, optim={**SMOOTH, "batch": 8}, mixture={"method": method[name]}
        )
        for name, section in rewards.items()
    }
    train_in_processes(configs, folder / "two", 2)
    for name, config in configs.items():
        train(config, folder / "one" / name, base_dir=folder / "base")
        one, two = folder / "one" / name, folder / "two" / name
        assert difference(one, two) < 2e-4  # float32, another order of additions
        for first, second in zip(metrics(one), metrics(two), strict=True):
            for key in first:
                if key.startswith(("train/", "eval/")) and not key.endswith("_se"):
                    assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-5), key
