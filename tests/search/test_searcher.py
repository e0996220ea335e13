import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from rltune.config.distributions import Choice, FloatRange, IntRange, LogFloatRange, Simplex
from rltune.config.load import Experiment
from rltune.runs.layout import TrialSpec
from rltune.runs.objectives import Objectives
from rltune.runs.results import TrialResult
from rltune.search.searcher import (
    FAILED,
    HELD_BY_CONSTRAINTS,
    SAMPLERS,
    Search,
    is_finite,
    make_sampler,
    simplex_uniforms,
    simplex_weights,
    to_optuna,
    values_of,
)
from tests.run_folders import experiment

every_sampler = pytest.mark.parametrize(
    "sampler", [pytest.param(name, marks=pytest.mark.long if name == "gp" else ()) for name in SAMPLERS]
)
"""Optuna's Gaussian process takes a second a trial."""
SLOW_GP = pytest.param("gp", 1, marks=pytest.mark.long)
BOTH = Objectives(("brightness", "drift"))
SPACE: dict[str, Any] = {
    "name": "mix",
    "model": {"lora": {"rank": {"choice": [2, 4, 8]}, "targets": {"choice": ["attention", "all"]}}},
    "sampler": {"steps": 12, "guidance": {"float": [1.0, 5.0]}},
    "estimator": {"k": {"int": [1, 12]}},
    "rewards": {name: {"weight": {"simplex": True}} for name in ("brightness", "smoothness", "aesthetic")},
    "optim": {"lr": {"log_float": [1e-4, 1e-2]}, "batch": {"int": [4, 16], "step": 4}},
    "objectives": ["brightness", "drift"],
}


def asked(sampler: str = "random", **search: Any) -> Experiment:
    return experiment(SPACE, search={"sampler": sampler, "trials": 12, **search})


def toy(spec: TrialSpec) -> TrialResult:
    """More brightness costs drift; the learning rate is best at 1e-3."""
    values = spec.values
    miss = math.log10(values["optim.lr"] / 1e-3) ** 2
    metrics = {"eval/brightness": values["rewards.brightness.weight"] - miss, "eval/drift": values["estimator.k"] / 12}
    constraints = {"drift.max": metrics["eval/drift"] - 0.75}
    return TrialResult(spec.id, "ok", spec.values, spec.params, metrics=metrics, constraints=constraints)


def failed(spec: TrialSpec) -> TrialResult:
    return TrialResult(spec.id, "failed", spec.values, spec.params, reason="it died")


# ---- weights on the simplex


@pytest.mark.parametrize("num", [2, 3, 4])
def test_weights_are_uniform_on_the_simplex(num: int) -> None:
    uniforms = np.random.default_rng(0).random((20_000, num - 1))
    weights = np.array([simplex_weights(row) for row in uniforms])
    assert weights.shape == (20_000, num)
    assert (weights >= 0).all()
    assert np.allclose(weights.sum(axis=1), 1, rtol=0, atol=1e-15 * num)
    for i in range(num):
        # every marginal of Dirichlet(1, .., 1) is Beta(1, n - 1); the seed is fixed, so the p-values are too
        assert stats.kstest(weights[:, i], stats.beta(1, num - 1).cdf).pvalue > 0.01
    expected = (np.eye(num) * num - 1) / (num**2 * (num + 1))
    # standard error of a covariance of 20 000 draws: below 0.08 / sqrt(20 000) = 6e-4 for every n here
    assert np.allclose(np.cov(weights.T), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("uniforms", "weights"),
    [
        ([0.0], [0, 1]),
        ([1.0], [1, 0]),
        ([0.25], [0.25, 0.75]),
        ([0.0, 0.0], [0, 0, 1]),
        ([1.0, 0.3], [1, 0, 0]),
        ([0.0, 1.0], [0, 1, 0]),
        ([0.75, 0.5], [0.5, 0.25, 0.25]),  # 1 - sqrt(1 - 0.75) = 0.5, then half of what is left
        ([1.0, 1.0, 1.0], [1, 0, 0, 0]),
        ([0.875, 0.75, 0.5], [0.5, 0.25, 0.125, 0.125]),  # cube root, square root, itself
    ],
)
def test_weights_at_known_points(uniforms: Sequence[float], weights: Sequence[float]) -> None:
    assert simplex_weights(uniforms) == pytest.approx(weights, abs=1e-15)


# ---- distributions


def test_every_kind_of_distribution_has_its_counterpart() -> None:
    space = {
        "a": Choice((2, "x", None, True)),
        "b": IntRange(1, 9, 2),
        "c": FloatRange(0.5, 2.5),
        "d": LogFloatRange(1e-4, 1e-2),
        "rewards.x.weight": Simplex(),
        "rewards.y.weight": Simplex(),
        "rewards.z.weight": Simplex(),
    }
    assert to_optuna(space) == {
        "a": CategoricalDistribution((2, "x", None, True)),
        "b": IntDistribution(1, 9, step=2),
        "c": FloatDistribution(0.5, 2.5),
        "d": FloatDistribution(1e-4, 1e-2, log=True),
        "simplex[0]": FloatDistribution(0, 1),
        "simplex[1]": FloatDistribution(0, 1),
    }


def test_values_stand_under_the_paths_of_the_experiment() -> None:
    params = {
        "model.lora.rank": 8,
        "model.lora.targets": "all",
        "sampler.guidance": 2.0,
        "estimator.k": 3,
        "simplex[0]": 0.75,
        "simplex[1]": 0.5,
        "optim.lr": 1e-3,
        "optim.batch": 8,
    }
    values = values_of(params, asked())
    assert list(values) == list(asked().space)
    weights = {"brightness": 0.5, "smoothness": 0.25, "aesthetic": 0.25}
    assert {name: values[f"rewards.{name}.weight"] for name in weights} == pytest.approx(weights)
    assert all(values[name] == value for name, value in params.items() if not name.startswith("simplex"))


# ---- asking and telling


def is_told_as_failed(trial: FrozenTrial, sampler: str) -> bool:
    """Whether a sampler sees that a trial failed: Optuna's own look at those that completed, and at constraints."""
    if sampler not in HELD_BY_CONSTRAINTS:
        return trial.state == TrialState.FAIL
    assert trial.state == TrialState.COMPLETE
    return trial.constraints[FAILED] > 0


@every_sampler
def test_every_sampler_asks_for_runs_that_are_valid_and_bears_failures(sampler: str) -> None:
    experiment_ = asked(sampler)
    search = Search(experiment_, BOTH)
    seen = []
    num_trials = 7 if sampler == "gp" else 12  # the first 5 are drawn at random, and the others take a second each
    for turn in range(num_trials):
        spec = search.ask()
        config = experiment_.concrete(spec.values)  # raises if it were not a valid run
        assert config.model.lora.rank in (2, 4, 8)
        assert config.optim.batch % 4 == 0
        assert 1e-4 <= config.optim.lr <= 1e-2
        assert sum(config.weights.values()) == pytest.approx(1, abs=1e-12)
        search.tell(failed(spec) if turn % 4 == 2 else toy(spec))
        seen.append(spec)
    assert [spec.id for spec in seen] == [f"{n:03d}" for n in range(1, num_trials + 1)]
    if sampler not in ("nsga2", "nsga3"):  # a child may be like its parent in all
        assert len({tuple(spec.values.values()) for spec in seen}) == num_trials
    assert [is_told_as_failed(trial, sampler) for trial in search.study.trials] == [
        turn % 4 == 2 for turn in range(num_trials)
    ]


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3"])
def test_a_genetic_search_breeds_within_the_trials_it_has(sampler: str) -> None:
    def values(name: str, num_trials: int) -> list[Any]:
        search = Search(asked(name, trials=num_trials), BOTH)
        specs = []
        for _ in range(num_trials):
            specs.append(search.ask())
            search.tell(toy(specs[-1]))
        return [spec.values for spec in specs]

    bred, drawn = values(sampler, 20), values("random", 20)
    assert bred[:4] == drawn[:4]  # the first population, a fifth of the trials, is drawn at random
    assert bred != drawn


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "num_trials", "num_seeds"), [("tpe", 40, 3), pytest.param("gp", 10, 1, marks=pytest.mark.long)]
)
def test_samplers_of_optuna_learn_from_failures(sampler: str, num_trials: int, num_seeds: int) -> None:
    """The best learning rate is 1e-2, and trials fail above 1e-3: half of what is drawn at random does."""
    failures = []
    for seed in range(num_seeds):
        search = Search(asked(sampler, seed=seed), BRIGHTNESS)
        for turn in range(num_trials):
            spec = search.ask()
            over = math.log10(spec.values["optim.lr"] / 1e-3)
            search.tell(failed(spec) if over > 0 else replace(bright(spec, over), constraints={"drift.max": -0.1}))
            failures += [over > 0] if turn >= num_trials // 2 else []
    # a search that learns from what completed alone goes above 1e-3 nearly always
    assert np.mean(failures) < 0.45


@pytest.mark.parametrize("sampler", HELD_BY_CONSTRAINTS)
def test_a_failure_is_told_with_the_worst_values_and_waits_for_there_to_be_any(sampler: str) -> None:
    live = Search(asked(sampler), BOTH)
    specs = [live.ask() for _ in range(4)]
    good = [
        replace(toy(spec), metrics={"eval/brightness": b, "eval/drift": d})
        for spec, b, d in zip(specs[1:], (2.0, 3.0, 4.0), (0.1, 0.3, 0.5), strict=True)
    ]
    results = [failed(specs[0]), good[0], good[1], failed(specs[3])]
    for result in results:
        live.tell(result)
    for search in (live, Search(asked(sampler), BOTH, results=results)):
        told = {trial.user_attrs["trial"]: trial for trial in search.study.trials}
        assert told["001"].values == [2.0, 0.1]  # of all that had ended by then: one
        assert told["004"].values == [2.0, 0.3]  # the least brightness, and the most drift, which is minimised
        assert told["001"].constraints == told["004"].constraints == {"drift.max": 0.0, FAILED: 1.0}
        assert told["002"].constraints == {**good[0].constraints, FAILED: -1.0}
        assert all(trial.state == TrialState.COMPLETE for trial in told.values())


def test_several_trials_may_be_out_at_once_and_end_in_any_order() -> None:
    search = Search(asked("tpe"), BOTH)
    specs = [search.ask() for _ in range(8)]
    for spec in reversed(specs):
        search.tell(toy(spec))
    told = {trial.user_attrs["trial"]: trial.values for trial in search.study.trials}
    assert told == {spec.id: list(BOTH.raw_D(toy(spec).metrics)) for spec in specs}


def test_the_study_knows_directions_values_and_constraints() -> None:
    search = Search(asked(), BOTH)
    assert [direction.name for direction in search.study.directions] == ["MAXIMIZE", "MINIMIZE"]
    spec = search.ask()
    result = toy(spec)
    search.tell(result)
    (trial,) = search.study.trials
    assert trial.params == spec.params
    assert trial.values == [result.metrics["eval/brightness"], result.metrics["eval/drift"]]
    assert trial.constraints == result.constraints
    assert trial.user_attrs["trial"] == "001"


def stopped(spec: TrialSpec, step: float) -> TrialResult:
    result = toy(spec)
    return replace(result, state="stopped", metrics={**result.metrics, "step": step}, reason="it fell behind")


def test_a_stopped_trial_tells_what_it_was_by_then() -> None:
    live = Search(asked(), BOTH)
    specs = [live.ask(), live.ask()]
    results = [stopped(specs[0], 20.0), replace(stopped(specs[1], 75.0), constraints={})]
    for result in results:
        live.tell(result)
    for search in (live, Search(asked(), BOTH, results=results)):
        for trial, result in zip(search.study.trials, results, strict=True):
            assert trial.state == TrialState.COMPLETE
            assert trial.values == [result.metrics["eval/brightness"], result.metrics["eval/drift"]]
            assert trial.constraints == result.constraints


@pytest.mark.long
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "grid"])
def test_a_search_that_may_learn_from_stopped_trials_alone_goes_on(sampler: str) -> None:
    search = Search(asked(sampler), BOTH)
    for turn in range(10):
        spec = search.ask()
        search.tell(stopped(spec, 10.0 * (1 + turn)) if turn != 9 else toy(spec))
    assert [trial.state for trial in search.study.trials] == [TrialState.COMPLETE] * 10


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "sign"), [("brightness", 1), ("drift", -1)])
def test_a_search_moves_to_where_the_objective_is_better(objective: str, sign: int) -> None:
    misses = []
    for seed in range(3):
        search = Search(asked("tpe", seed=seed), Objectives((objective,)))
        for turn in range(40):
            spec = search.ask()
            miss = abs(math.log10(spec.values["optim.lr"] / 1e-3))
            metrics = {f"eval/{objective}": -sign * miss}
            search.tell(replace(toy(spec), metrics=metrics, constraints={}))
            misses += [miss] if turn >= 20 else []
    # uniform draws miss by 0.5 on average; a search in the wrong direction misses by nearly 1
    assert np.mean(misses) < 0.3


def test_the_seed_decides_the_draws() -> None:
    def draws(seed: int) -> list[Mapping[str, Any]]:
        search = Search(asked(seed=seed), BOTH)
        return [search.ask().values for _ in range(3)]

    assert draws(0) == draws(0)
    assert draws(0) != draws(1)


# ---- settings with a condition


CONDITIONAL: dict[str, Any] = {
    "name": "mix",
    "sampler": {"steps": 12},
    "estimator": {
        "k": {"int": [1, 12], "when": {"estimator.name": ["alignprop", "draft"]}},
        "name": {"choice": ["alignprop", "draft", "refl"]},
        "draw": {"choice": ["fixed", "uniform"], "when": {"estimator.name": "alignprop"}},
    },
    "rewards": {name: {"weight": {"simplex": True}} for name in ("brightness", "smoothness")},
    "optim": {"lr": {"log_float": [1e-4, 1e-2]}},
    "objectives": ["brightness"],
}
BRIGHTNESS = Objectives(("brightness",))


def conditional(sampler: str, **search: Any) -> Experiment:
    raw: dict[str, Any] = copy.deepcopy(CONDITIONAL)
    if sampler == "grid":
        for reward in raw["rewards"].values():
            reward["weight"] = 1.0
        raw["optim"]["lr"] = {"choice": [1e-3, 2e-3]}
    return experiment(raw, search={"sampler": sampler, "trials": 30, **search})


def bright(spec: TrialSpec, brightness: float) -> TrialResult:
    return TrialResult(spec.id, "ok", spec.values, spec.params, metrics={"eval/brightness": brightness})


def score(values: Mapping[str, Any]) -> float:
    """Best with alignprop at K = 4 and a learning rate of 1e-3; ReFL is behind by 1."""
    miss = abs(math.log10(values["optim.lr"] / 1e-3))
    behind = {"alignprop": 0.0, "draft": 0.3, "refl": 1.0}[values["estimator.name"]]
    return -miss - behind - (abs(values["estimator.k"] - 4) / 11 if "estimator.k" in values else 0)


@every_sampler
def test_every_sampler_asks_for_a_setting_exactly_where_it_is_searched(sampler: str) -> None:
    asked_ = conditional(sampler)
    search = Search(asked_, BRIGHTNESS)
    results, specs = [], []
    num_trials = 7 if sampler == "gp" else 30  # a Gaussian process takes a second a trial, the first 5 aside
    for turn in range(num_trials):
        spec = search.ask()
        name = spec.values["estimator.name"]
        assert ("estimator.k" in spec.values) == (name in ("alignprop", "draft"))
        assert ("estimator.draw" in spec.values) == (name == "alignprop")
        config = asked_.concrete(spec.values)
        assert config.estimator.k == spec.values.get("estimator.k")
        specs.append(spec)
        if turn < num_trials - 2:  # two are out when the sweep is killed
            results.append(failed(spec) if turn % 7 == 3 else bright(spec, score(spec.values)))
            search.tell(results[-1])
    assert {"alignprop", "draft"} <= {spec.values["estimator.name"] for spec in specs}
    if sampler == "grid":
        assert asked_.grid_values is not None
        assert [spec.values for spec in specs] == list(asked_.grid_values)[:num_trials]
    again = Search(asked_, BRIGHTNESS, results=results, unfinished=specs[-2:])
    assert [trial.params for trial in again.study.trials] == [trial.params for trial in search.study.trials[:-2]]
    assert [again.ask(), again.ask()] == specs[-2:]
    new = again.ask()
    assert new.id == f"{num_trials + 1:03d}"
    asked_.concrete(new.values)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "num_seeds"), [("tpe", 4), SLOW_GP])
def test_a_setting_with_a_condition_is_learned_too(sampler: str, num_seeds: int) -> None:
    misses = []
    for seed in range(num_seeds):
        search = Search(conditional(sampler, seed=seed), BRIGHTNESS)
        for turn in range(20):
            spec = search.ask()
            search.tell(bright(spec, score(spec.values)))
            misses += [abs(spec.values["estimator.k"] - 4)] if turn >= 10 and "estimator.k" in spec.values else []
    # uniform draws miss by (3 + 2 + 1 + 0 + 1 + .. + 8) / 12 = 3.5 on average
    assert np.mean(misses) < 2.5


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3"])
def test_a_resumed_genetic_search_goes_on_breeding(sampler: str) -> None:
    """A generation of 6 that lies together: children keep most of their parents' genes."""
    drawn = Search(conditional("random"), BRIGHTNESS)
    results = []
    for _ in range(6):
        spec = drawn.ask()
        params = {**spec.params, "optim.lr": 1.5e-3, "estimator.name": "draft"}
        results.append(bright(replace(spec, params=params, values=values_of(params, conditional("random"))), 1.0))
    search = Search(conditional(sampler), BRIGHTNESS, results=results)
    specs = []
    for _ in range(6):
        specs.append(search.ask())
        search.tell(bright(specs[-1], 0.0))
    inherited = [spec.values["estimator.name"] == "draft" for spec in specs]
    # one of 6 parameters mutates on average, to one of 3 options; drawn at random, a third would be the parents'
    assert sum(inherited) >= 4
    assert sum(spec.values["optim.lr"] == pytest.approx(1.5e-3) for spec in specs) >= 3


def test_a_grid_is_not_built_to_take_its_first_trials() -> None:
    """10^9 combinations are some 200 GB."""
    space = {name: {"int": [1, 1000]} for name in ("batch", "steps", "queries")}
    raw = {"name": "mix", "rewards": {"brightness": {}}, "optim": space, "evaluate": {"every": 1}}
    asked_ = experiment(raw, search={"sampler": "grid", "trials": 4})
    assert asked_.num_trials == 4
    search = Search(asked_, BRIGHTNESS)
    specs = [search.ask() for _ in range(4)]
    assert [spec.values["optim.queries"] for spec in specs] == [1, 2, 3, 4]
    again = Search(asked_, BRIGHTNESS, results=[bright(spec, 0.0) for spec in specs])
    assert again.ask().values == {"optim.batch": 1, "optim.steps": 1, "optim.queries": 5}


# ---- points to try first


@pytest.mark.parametrize(
    ("weights", "uniforms"),
    [
        ([0.25, 0.75], [0.25]),
        ([1, 0], [1.0]),
        ([0, 1], [0.0]),
        ([0.5, 0.25, 0.25], [0.75, 0.5]),  # 1 - (1 - 1/2)^2, then half of what is left
        ([1, 0, 0], [1.0, 0.0]),
        ([0, 0, 1], [0.0, 0.0]),
        ([0.5, 0.25, 0.125, 0.125], [0.875, 0.75, 0.5]),  # 1 - (1 - 1/2)^3, 1 - (1 - 1/2)^2, 1/2
        ([0.5000001, 0.2500001, 0.2500001], [0.75, 0.5]),  # a sum of 1 up to rounding
        ([], []),
    ],
)
def test_weights_are_turned_back_into_what_they_are_drawn_from(
    weights: Sequence[float], uniforms: Sequence[float]
) -> None:
    assert simplex_uniforms(weights) == pytest.approx(uniforms, abs=1e-6)


@pytest.mark.parametrize("num", [2, 3, 5])
def test_weights_come_back_from_what_they_are_turned_into(num: int) -> None:
    for weights in np.random.default_rng(0).dirichlet(np.ones(num), size=200):
        # of what is left after a share, the power is known to 1e-16: its root to 1e-16 / 0.02^3 for 5 weights
        apart = (0.9 * weights + 0.1 / num).tolist()
        assert simplex_weights(simplex_uniforms(apart)) == pytest.approx(apart, abs=1e-11)
        # where next to nothing is left, only to 1e-16^(1 / (n - 1))
        close = (1e-6 * weights + (1 - 1e-6) * np.eye(num)[0]).tolist()
        assert simplex_weights(simplex_uniforms(close)) == pytest.approx(
            close, abs=2 * 1e-16 ** (1 / (num - 1)) + 1e-15
        )


POINTS = [
    {
        "rewards.brightness.weight": 0.2,
        "rewards.smoothness.weight": 0.3,
        "rewards.aesthetic.weight": 0.5,
        "optim.lr": 1e-2,
        "model.lora.rank": 8,
        "model.lora.targets": "all",
        "sampler.guidance": 2,
        "estimator.k": 12,
        "optim.batch": 16,
    },
    {"optim.lr": 3e-4},
]


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "grid"])
def test_points_are_tried_first_in_their_order(sampler: str) -> None:
    search = Search(asked(sampler, points=POINTS), BOTH)
    specs = []
    for _ in range(4):
        specs.append(search.ask())
        search.tell(toy(specs[-1]))
    assert specs[0].values == pytest.approx(POINTS[0], abs=1e-15)
    assert isinstance(specs[0].values["sampler.guidance"], float)
    assert specs[1].values["optim.lr"] == 3e-4
    assert set(specs[1].values) == set(POINTS[0])  # the rest is drawn
    assert all(spec.values["optim.lr"] not in (1e-2, 3e-4) for spec in specs[2:])


def test_a_resumed_search_goes_on_at_the_point_where_it_was() -> None:
    experiment_ = asked(points=POINTS)
    spec = Search(experiment_, BOTH).ask()
    assert Search(experiment_, BOTH, results=[toy(spec)]).ask().values["optim.lr"] == 3e-4
    again = Search(experiment_, BOTH, unfinished=[spec])
    assert again.ask() == spec
    assert again.ask().values["optim.lr"] == 3e-4
    assert again.ask().values["optim.lr"] not in (1e-2, 3e-4)


def test_a_point_may_name_a_setting_with_a_condition() -> None:
    points = [{"estimator.name": "draft", "estimator.k": 11}, {"estimator.name": "refl"}]
    search = Search(conditional("tpe", points=points), BRIGHTNESS)
    first, second = search.ask(), search.ask()
    assert (first.values["estimator.name"], first.values["estimator.k"]) == ("draft", 11)
    assert second.values["estimator.name"] == "refl"
    assert "estimator.k" not in second.values


# ---- prior_results of another run


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "num_seeds"), [("tpe", 3), SLOW_GP])
def test_lessons_lead_the_first_draws_to_the_optimum(sampler: str, num_seeds: int) -> None:
    """The learning rate is best at 1e-3; uniform draws from two decades around it miss by half a decade on average."""
    misses: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(num_seeds):
        prior = Search(asked("random", seed=100 + seed), BRIGHTNESS)
        prior_results = []
        for _ in range(30):
            spec = prior.ask()
            miss = abs(math.log10(spec.values["optim.lr"] / 1e-3))
            prior_results.append(replace(bright(spec, -miss), trial=f"other/{spec.id}"))
        for is_warm in (True, False):
            search = Search(asked(sampler, seed=seed), BRIGHTNESS, prior_results=prior_results if is_warm else [])
            for _ in range(5):
                spec = search.ask()
                miss = abs(math.log10(spec.values["optim.lr"] / 1e-3))
                search.tell(bright(spec, -miss))
                misses[is_warm].append(miss)
    assert np.mean(misses[True]) < 0.25
    assert np.mean(misses[False]) > 0.35


def test_lessons_are_no_trials_of_this_run() -> None:
    spec = Search(asked(), BOTH).ask()
    prior_results = [replace(toy(spec), trial="other/007"), replace(failed(spec), trial="other/008")]
    search = Search(asked(), BOTH, prior_results=prior_results)
    assert search.ask().id == "001"
    assert [trial.state for trial in search.study.trials[:2]] == [TrialState.COMPLETE, TrialState.FAIL]
    assert [trial.user_attrs["trial"] for trial in search.study.trials] == ["other/007", "other/008", "001"]


# ---- resuming


def resumed(specs: Sequence[TrialSpec], unfinished: Sequence[TrialSpec] = (), *, sampler: str = "random") -> Search:
    results = [failed(spec) if spec.id == "002" else toy(spec) for spec in specs]
    return Search(asked(sampler), BOTH, results=results, unfinished=unfinished)


@pytest.fixture
def first() -> list[TrialSpec]:
    search = Search(asked(), BOTH)
    return [search.ask() for _ in range(5)]


@every_sampler
def test_a_resumed_search_knows_what_ended_before(first: list[TrialSpec], sampler: str) -> None:
    search = resumed(first, sampler=sampler)
    trials = {trial.user_attrs["trial"]: trial for trial in search.study.trials}
    for spec in first:
        trial = trials[spec.id]
        assert trial.params == spec.params
        assert is_told_as_failed(trial, sampler) == (spec.id == "002")
        if spec.id != "002":
            assert trial.state == TrialState.COMPLETE
            assert trial.values == list(BOTH.raw_D(toy(spec).metrics))
            assert {name: trial.constraints[name] for name in toy(spec).constraints} == toy(spec).constraints
    for number in range(6, 10):
        spec = search.ask()
        assert spec.id == f"{number:03d}"
        search.tell(toy(spec))


def test_a_live_study_and_the_rebuilt_one_are_the_same(first: list[TrialSpec]) -> None:
    live = Search(asked(), BOTH)
    results = []
    for turn in range(5):
        spec = live.ask()
        results.append(failed(spec) if turn == 1 else toy(spec))
        live.tell(results[-1])
    rebuilt = Search(asked(), BOTH, results=results)
    for old, new in zip(live.study.trials, rebuilt.study.trials, strict=True):
        assert (old.state, old.params, old.values, old.constraints, old.distributions, old.user_attrs) == (
            new.state,
            new.params,
            new.values,
            new.constraints,
            new.distributions,
            new.user_attrs,
        )
    assert [trial.number for trial in live.study.best_trials] == [trial.number for trial in rebuilt.study.best_trials]


def test_a_resumed_search_draws_what_the_first_did_not(first: list[TrialSpec]) -> None:
    search = resumed(first)
    before = {spec.values["optim.lr"] for spec in first}
    after = {search.ask().values["optim.lr"] for _ in range(5)}
    assert len(after) == 5
    assert not before & after


@pytest.mark.parametrize("num_ended", [0, 2])
def test_the_first_trials_of_a_resumed_surrogate_are_those_of_a_search_that_never_stopped(num_ended: int) -> None:
    whole = Search(asked("surrogate"), BOTH)
    specs = [whole.ask() for _ in range(8)]
    ended = [toy(spec) for spec in specs[:num_ended]]
    search = Search(asked("surrogate"), BOTH, results=ended, unfinished=[specs[num_ended]])
    assert [search.ask() for _ in specs[num_ended:]] == specs[num_ended:]


def test_unfinished_trials_come_first_with_the_same_knobs(first: list[TrialSpec]) -> None:
    unfinished = [first[2], first[4]]
    search = resumed([first[0], first[1], first[3]], unfinished)
    again = [search.ask(), search.ask()]
    assert again == unfinished
    new = search.ask()
    assert new.id == "006"
    assert new.values["optim.lr"] not in {spec.values["optim.lr"] for spec in first}
    for spec in again:
        search.tell(toy(spec))
    trials = {trial.user_attrs["trial"]: trial for trial in search.study.trials}
    for spec in unfinished:  # the study has the knobs that were really run
        assert trials[spec.id].params == spec.params
        assert trials[spec.id].values == list(BOTH.raw_D(toy(spec).metrics))


def test_ids_go_on_after_the_greatest_that_was_ever_given() -> None:
    spec = Search(asked(), BOTH).ask()
    assert Search(asked(), BOTH, results=[toy(replace(spec, id="041"))]).ask().id == "042"
    search = Search(asked(), BOTH, results=[toy(spec)], unfinished=[replace(spec, id="1200")])
    assert [search.ask().id for _ in range(2)] == ["1200", "1201"]


def test_the_largest_seed_can_be_resumed(first: list[TrialSpec]) -> None:
    search = Search(asked(seed=2**32 - 1), BOTH, results=[toy(spec) for spec in first])
    assert search.ask().id == "006"


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="sampler must be one of surrogate, tpe, gp, nsga2, nsga3, random, quasi_random, grid, got 'bayes'",
    ):
        make_sampler("bayes", 0, 12, {})


def test_an_objective_that_is_missing_or_not_finite_is_noticed() -> None:
    assert is_finite({"eval/brightness": 1.0, "eval/drift": 0.0, "eval/other": 2.0}, BOTH)
    assert not is_finite({"eval/brightness": 1.0, "eval/drift": 0.0, "eval/other": math.nan}, BOTH)
    assert not is_finite({"eval/brightness": 1.0}, BOTH)
    assert not is_finite({"eval/brightness": 1.0, "eval/drift": math.nan}, BOTH)
    assert not is_finite({"eval/brightness": math.inf, "eval/drift": 0.0}, BOTH)
