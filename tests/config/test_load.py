import contextlib
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltune.config.distributions import Choice, Distribution, FloatRange, IntRange, LogFloatRange, Simplex
from rltune.config.experiment import RunConfig
from rltune.config.load import load_experiment, parse_experiment
from rltune.config.rules import Known
from rltune.config.yamlfile import write_yaml
from rltune.errors import ExperimentError

MIX = Path(__file__).parents[2] / "experiments" / "mix.yaml"
ONE_REWARD = "rewards: {aesthetic: {}}\n"


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ExperimentError) as caught:
        load_experiment(path, overrides)
    return str(caught.value)


def test_the_space_is_every_distribution_by_its_path_in_the_files_order() -> None:
    experiment = load_experiment(MIX)
    assert list(experiment.space.items()) == [
        ("model.lora.rank", Choice((2, 4, 8, 16))),
        ("estimator.k", IntRange(1, 12)),
        ("rewards.aesthetic.weight", Simplex()),
        ("rewards.alignment.weight", Simplex()),
        ("rewards.compressibility.weight", Simplex()),
        ("optim.lr", LogFloatRange(2e-4, 2e-3)),
    ]
    assert experiment.is_searched
    assert experiment.simplex_paths == tuple(f"rewards.{name}.weight" for name in experiment.shared.rewards)


def test_distributions_stand_in_options_and_in_lists() -> None:
    text = (
        ONE_REWARD
        + "optim: {betas: [0.9, {float: [0.95, 0.999]}]}\nestimator: {options: {a: {b: {int: [2, 6], step: 2}}}}"
    )
    experiment = parse_experiment(text)
    assert experiment.space == {"optim.betas.1": FloatRange(0.95, 0.999), "estimator.options.a.b": IntRange(2, 6, 2)}
    config = experiment.concrete({"optim.betas.1": 0.96, "estimator.options.a.b": 4})
    assert config.optim.betas == (0.9, 0.96)
    assert config.estimator.options == {"a": {"b": 4}}


def test_options_may_hold_mappings_that_are_no_distributions() -> None:
    experiment = parse_experiment("rewards: {aesthetic: {options: {choices: [1], at: {x: 1, y: 2}}}}")
    assert not experiment.is_searched
    assert experiment.concrete({}).rewards["aesthetic"].options == {"choices": [1], "at": {"x": 1, "y": 2}}


def test_one_reward_is_an_experiment() -> None:
    experiment = parse_experiment(ONE_REWARD, "runs/my first.yaml")
    assert not experiment.is_searched
    assert experiment.space == {}
    assert experiment.concrete({}) == experiment.shared
    assert experiment.shared == RunConfig.model_validate({"name": "my-first", "rewards": {"aesthetic": {"weight": 1}}})


def test_the_shared_run_has_equal_weights_and_each_first_value() -> None:
    shared = load_experiment(MIX).shared
    assert shared.weights == pytest.approx({"aesthetic": 1 / 3, "alignment": 1 / 3, "compressibility": 1 / 3})
    assert (shared.model.lora.rank, shared.estimator.k) == (2, 1)
    assert shared.optim.lr == pytest.approx(math.sqrt(2e-4 * 2e-3))
    assert shared.search.trials == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim.lr": None}, "values must be for"),
        ({"optim.eps": 1e-8}, "values must be for"),
        ({"rewards.aesthetic.weight": 0.5}, "must sum to 1"),
    ],
)
def test_concrete_wants_exactly_the_space(change: dict[str, Any], message: str) -> None:
    thirds = {f"rewards.{name}.weight": 1 / 3 for name in ("aesthetic", "alignment", "compressibility")}
    values = {"model.lora.rank": 4, "estimator.k": 3, "optim.lr": 1e-3, **thirds}
    experiment = load_experiment(MIX)
    assert experiment.concrete(values).estimator.k == 3
    changed = {path: value for path, value in {**values, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        experiment.concrete(changed)


def test_a_sampled_value_is_validated_like_a_written_one() -> None:
    experiment = parse_experiment(ONE_REWARD + "sampler: {steps: 20}\nestimator: {k: {int: [1, 4]}}", "a.yaml")
    with pytest.raises(ExperimentError, match=r"estimator\.k: K must not exceed the 20 sampling steps"):
        experiment.concrete({"estimator.k": 21})
    with pytest.raises(ExperimentError, match=r"estimator\.k: must be a whole number from 1 to 1000, got 'x'"):
        experiment.concrete({"estimator.k": "x"})


def test_values_do_not_change_the_experiment_or_each_other() -> None:
    text = "rewards: {a: &same {weight: {choice: [1, 2]}}, b: *same}"
    experiment = parse_experiment(text)
    before = experiment.to_yaml()
    config = experiment.concrete({"rewards.a.weight": 1, "rewards.b.weight": 2})
    assert config.weights == {"a": 1, "b": 2}
    assert experiment.to_yaml() == before


def test_an_experiment_travels_between_processes() -> None:
    experiment = load_experiment(MIX)
    assert pickle.loads(pickle.dumps(experiment)) == experiment


def test_what_a_worker_gets_is_the_same_run() -> None:
    config = load_experiment(MIX).shared
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


# ---- files


def test_a_missing_file_a_directory_and_bytes_are_answered_in_words(tmp_path: Path) -> None:
    assert message_of(tmp_path / "a.yaml").endswith("a.yaml: no such file; check the path")
    assert "this is a directory; name a YAML file in it" in message_of(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"name: caf\xe9\n")
    assert "not UTF-8 text, got the byte 0xe9 at offset 9; save it as UTF-8" in message_of(tmp_path / "b.yaml")


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(ONE_REWARD, encoding="utf-8-sig")
    assert load_experiment(tmp_path / "a.yaml").shared.name == "a"


def test_faults_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(ONE_REWARD + "\n# a comment\noptim:\n  batch: 8\n  lr:\n    log_float:\n    - 1e-4\n    - 3\n")
    assert message_of(path) == (
        f"{path}: 1 fault\n  {path}:9 optim.lr.log_float[1]: must be a number from 0 to 1, got 3.0; "
        "the default is 0.001"
    )


def test_prompt_files_must_exist(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    text = ONE_REWARD + f"prompts: {{train: {{choice: [builtin, '{prompts}']}}, eval: '{prompts}'}}"
    experiment = parse_experiment(text)
    assert experiment.concrete({"prompts.train": str(prompts)}).prompts.train == str(prompts)
    prompts.unlink()
    with pytest.raises(ExperimentError, match=r"prompts\.train\.choice\[1\]: no such file") as caught:
        parse_experiment(text)
    assert len(caught.value.faults) == 2
    assert experiment.concrete({"prompts.train": "builtin"})  # a worker need not have the file where it validates


def test_names_are_checked_only_against_what_the_caller_knows() -> None:
    text = "rewards: {mine: {}}\nestimator: {name: mine}\nsearch: {sampler: mine}\nevaluate: {judges: [mine]}"
    assert parse_experiment(text).shared.estimator.name == "mine"
    assert parse_experiment(text, known=Known(rewards=("mine",), judges=("drift",))).shared.rewards
    with pytest.raises(ExperimentError) as caught:
        parse_experiment(text, known=Known(("a",), ("b",), ("c",), ("d",)))
    assert len(caught.value.faults) == 4


# ---- overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.lr=0.5", "optim.lr", 0.5),
        ("optim.steps=7", "optim.steps", 7),
        ("seed=3", "seed", 3),
        ("model.lora.targets=[to_q, to_k]", "model.lora.targets", ("to_q", "to_k")),
        ("model.base=org/model=v2", "model.base", "org/model=v2"),
        ("optim=", "optim.lr", 1e-3),
        ("rewards.alignment.weight=2.0", "rewards", {"aesthetic", "alignment"}),
        (" optim.lr = 1e-2", "optim.lr", 1e-2),
    ],
)
def test_an_override_is_yaml_put_at_its_path(override: str, path: str, value: Any) -> None:
    found: Any = parse_experiment(ONE_REWARD + "optim: {lr: {float: [0.1, 0.2]}}", overrides=[override]).shared
    for key in path.split("."):
        found = getattr(found, key)
    assert (set(found) if path == "rewards" else found) == value


def test_an_override_may_be_a_distribution_and_the_last_one_wins() -> None:
    overrides = ["optim.lr=1", "optim.lr={log_float: [1e-4, 1e-3]}", "model.lora.rank.choice=[1, 2]"]
    experiment = parse_experiment(ONE_REWARD, overrides=overrides)
    assert experiment.space == {"optim.lr": LogFloatRange(1e-4, 1e-3), "model.lora.rank": Choice((1, 2))}
    assert not parse_experiment(ONE_REWARD, overrides=[*overrides, "optim.lr=1e-3", "model.lora.rank=2"]).is_searched


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "--set optim.lr: must be like a.b=value; write --set optim.lr=1e-3"),
        ("=3", "--set =3: must be like a.b=value"),
        ("optim..lr=3", "--set optim..lr=3: must be like a.b=value"),
        ("optim.lr=[1", "--set optim.lr: not valid YAML at column 3"),
        ("seed.x=1", "--set seed.x: seed is not a section, got 5; override seed as a whole"),
        ("optim.lr=fast", "--set optim.lr: must be a number from 0 to 1, got 'fast'"),
        ("optm.lr=1", "--set optm: unknown key, got 'optm'; did you mean 'optim'?"),
        ("optim.lr={flaot: [1, 2]}", "--set optim.lr.flaot: unknown distribution"),
        ("optim.lr={float: [0.1, 7]}", "--set optim.lr.float[1]: must be a number"),
    ],
)
def test_a_fault_of_an_override_says_so(override: str, message: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        parse_experiment(ONE_REWARD + "seed: 5\noptim:\n  lr: 1e-3", "a.yaml", [override])
    (fault,) = caught.value.faults
    assert str(fault).startswith(message)


LEAVES = {
    "optim.lr": st.floats(1e-12, 1),
    "optim.steps": st.integers(1, 10**9),
    "sampler.guidance": st.floats(0, 100),
    "model.lora.alpha": st.just("rank") | st.floats(1e-3, 1e3),
    "model.base": st.text(st.characters(codec="utf-8"), min_size=1),
    "objectives": st.just(["aesthetic"]),
}


@pytest.mark.long
@given(values=st.fixed_dictionaries({}, optional=LEAVES))
def test_any_value_survives_an_override_and_the_resolved_file(values: dict[str, Any]) -> None:
    overrides = [f"{path}={write_yaml({'x': value}).removeprefix('x:')}" for path, value in values.items()]
    experiment = parse_experiment(ONE_REWARD, "a.yaml", overrides)
    for path, value in values.items():
        found: Any = experiment.shared
        for key in path.split("."):
            found = getattr(found, key)
        assert found == (tuple(value) if isinstance(value, list) else value)
    assert parse_experiment(experiment.to_yaml(), "a.yaml") == experiment


def test_a_fault_inside_an_overridden_value_is_not_blamed_on_the_file() -> None:
    text = ONE_REWARD + "optim:\n  lr:\n    float:\n    - 0.1\n    - 0.2"
    with pytest.raises(ExperimentError, match=r"--set optim\.lr\.float\[1\]: must be"):
        parse_experiment(text, "a.yaml", ["optim.lr={float: [0.1, 7]}"])


# ---- any space that loads gives valid runs


@st.composite
def spaces(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    num_steps = draw(st.integers(2, 50))
    low = draw(st.integers(1, num_steps - 1))
    lr = sorted(draw(st.lists(st.floats(1e-8, 1), min_size=2, max_size=2, unique=True)))
    guidance = sorted(draw(st.lists(st.floats(0, 100), min_size=2, max_size=2, unique=True)))
    ranks = draw(st.lists(st.integers(1, 1024), min_size=1, max_size=5, unique=True))
    workers = draw(st.integers(1, 4))
    rewards = draw(st.integers(2, 5))
    raw: dict[str, Any] = {
        "name": "a",
        "model": {"lora": {"rank": {"choice": ranks}, "targets": {"choice": ["attention", "all"]}}},
        "sampler": {"steps": num_steps, "guidance": {"float": guidance}},
        "estimator": {"k": {"int": [low, draw(st.integers(low + 1, num_steps))]}, "draw": "uniform"},
        "rewards": {f"r{i}": {"weight": {"simplex": True}} for i in range(rewards)},
        "optim": {"lr": {"log_float": lr}, "batch": {"int": [workers, workers * 5], "step": workers}},
        "resources": {"workers": workers},
    }
    return raw, rewards


def sample(draw: st.DrawFn, distribution: Distribution) -> Any:
    match distribution:
        case Choice(options):
            return draw(st.sampled_from(options))
        case IntRange(low, high, step):
            return draw(st.sampled_from(range(low, high + 1, step)))
        case FloatRange(low, high) | LogFloatRange(low, high):
            return draw(st.floats(low, high))
        case Simplex():
            return None


@pytest.mark.long
@settings(deadline=None)  # the first example builds the schema
@given(data=st.data())
def test_any_sampled_value_of_a_valid_space_is_a_valid_run(data: st.DataObject) -> None:
    raw, num_rewards = data.draw(spaces())
    experiment = parse_experiment(write_yaml(raw), "a.yaml")
    assert parse_experiment(experiment.to_yaml(), "a.yaml") == experiment
    draw: Any = data.draw
    values = {path: sample(draw, distribution) for path, distribution in experiment.space.items()}
    cuts = sorted(data.draw(st.lists(st.floats(0, 1), min_size=num_rewards - 1, max_size=num_rewards - 1)))
    weights = [high - low for low, high in zip([0.0, *cuts], [*cuts, 1.0], strict=True)]
    values |= dict(zip(experiment.simplex_paths, weights, strict=True))
    config = experiment.concrete(values)
    assert (config.estimator.k, config.optim.lr) == (values["estimator.k"], values["optim.lr"])
    assert list(config.weights.values()) == weights


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["choice", "int", "float", "log_float", "simplex", "step", "x"]), inner)
    ),
    max_leaves=6,
)
PLACES = ["name", "model", "model.lora.rank", "model.lora.targets", "prompts.train", "sampler.steps", "estimator.k"]
PLACES += ["estimator.name", "estimator.activation_gib", "rewards.aesthetic.loss", "rewards.aesthetic.target"]
PLACES += ["sampler.base_steps", "prompts.images_per_prompt", "optim.queries", "regularize", "regularize.drift"]
PLACES += ["estimator.options", "estimator.options.a", "rewards", "rewards.aesthetic", "rewards.alignment.weight"]
PLACES += [
    "optim.betas",
    "optim.lr",
    "evaluate.judges",
    "objectives",
    "constraints",
    "constraints.drift.max",
    "new.key",
]


@pytest.mark.long
@settings(deadline=None)
@given(changes=st.dictionaries(st.sampled_from(PLACES), JUNK, min_size=1, max_size=4))
def test_whatever_is_written_loads_or_is_answered_with_faults(changes: dict[str, Any]) -> None:
    overrides = [f"{path}={write_yaml({'x': value}).removeprefix('x:')}" for path, value in changes.items()]
    with contextlib.suppress(ExperimentError):
        assert isinstance(load_experiment(MIX, overrides).shared, RunConfig)
