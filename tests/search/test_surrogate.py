import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from rltune.config.load import Experiment
from rltune.runs.layout import TrialSpec
from rltune.runs.objectives import Objectives
from rltune.runs.results import TrialResult
from rltune.search.features import Conditions, Features
from rltune.search.searcher import Search, simplex_weights
from rltune.search.surrogate import STARTUP, SurrogateSampler, _ends, _probability, even_spread
from tests.run_folders import experiment

NAMES = ("brightness", "smoothness", "aesthetic")
OBJECTIVES = Objectives(NAMES)


def asked(seed: int = 0) -> Experiment:
    rewards = {name: {"weight": {"simplex": True}} for name in NAMES}
    optim = {"lr": {"log_float": [1e-4, 1e-2]}}
    lora = {"rank": {"choice": [2, 4, 8]}, "targets": {"choice": ["attention", "all"]}}
    raw = {"name": "mix", "rewards": rewards, "optim": optim, "model": {"lora": lora}, "objectives": list(NAMES)}
    return experiment(raw, search={"sampler": "surrogate", "trials": 30, "seed": seed})


def weights(spec: TrialSpec) -> list[float]:
    return [spec.values[f"rewards.{name}.weight"] for name in NAMES]


def miss(spec: TrialSpec, best: float) -> float:
    return math.log10(spec.values["optim.lr"] / best)


def told(spec: TrialSpec, best: float = 1e-3) -> TrialResult:
    """Every reward grows as its weight does, most at the best learning rate and with attention alone."""
    rise = math.exp(-2 * miss(spec, best) ** 2) * (1.0 if spec.values["model.lora.targets"] == "attention" else 0.6)
    metrics = {f"eval/{name}": rise * math.sqrt(w) for name, w in zip(NAMES, weights(spec), strict=True)}
    return TrialResult(spec.id, "ok", spec.values, spec.params, metrics=metrics)


@pytest.mark.long
@pytest.mark.parametrize("best", [3e-4, 3e-3])
def test_it_asks_near_the_best_knobs_for_all_kinds_of_weights(best: float) -> None:
    misses, attention, drawn = [], [], []
    for seed in range(2):
        search = Search(asked(seed), OBJECTIVES)
        for turn in range(24):
            spec = search.ask()
            search.tell(told(spec, best))
            if turn >= 12:
                misses.append(abs(miss(spec, best)))
                attention.append(spec.values["model.lora.targets"] == "attention")
                drawn.append(weights(spec))
    # uniform draws miss by (0.52^2 + 1.48^2) / 4 = 0.61 on average, and take attention half of the time
    assert np.median(misses) < 0.2
    assert np.mean(attention) > 0.8
    # each weight is above a half somewhere, and each is below a tenth
    assert (np.max(drawn, axis=0) > 0.5).all()
    assert (np.min(drawn, axis=0) < 0.1).all()


@pytest.mark.long
def test_it_keeps_to_where_constraints_hold() -> None:
    """Higher learning rates are better up to 1e-2, and break the constraint above 1e-3."""
    search = Search(asked(), OBJECTIVES)
    broken = []
    for _ in range(24):
        spec = search.ask()
        over = miss(spec, 1e-3)
        metrics = {f"eval/{name}": w * (over + 1) for name, w in zip(NAMES, weights(spec), strict=True)}
        broken.append(over > 0)
        search.tell(TrialResult(spec.id, "ok", spec.values, spec.params, metrics=metrics, constraints={"max": over}))
    assert any(broken[:12])
    # uniform draws break it half of the time, and a search that does not know of it nearly always
    assert np.mean(broken[12:]) < 0.35


def test_while_all_trials_are_infeasible_it_moves_to_where_one_may_be_feasible() -> None:
    search = Search(asked(), OBJECTIVES)
    overs = []
    for _ in range(12):
        spec = search.ask()
        overs.append(miss(spec, 1e-4))  # from 0 to 2
        metrics = {f"eval/{name}": overs[-1] for name in NAMES}
        broken = {"max": overs[-1] + 0.1}
        search.tell(TrialResult(spec.id, "ok", spec.values, spec.params, metrics=metrics, constraints=broken))
    assert np.median(overs[STARTUP:]) < 0.3


@pytest.mark.slow
def test_a_search_that_is_rebuilt_from_results_asks_like_another_one() -> None:
    search = Search(asked(), OBJECTIVES)
    results = []
    for _ in range(10):
        spec = search.ask()
        results.append(told(spec))
        search.tell(results[-1])
    out = search.ask()
    first = Search(asked(), OBJECTIVES, results=results, unfinished=[out])
    second = Search(asked(), OBJECTIVES, results=results, unfinished=[out])
    assert first.ask() == second.ask() == out
    assert first.ask() == second.ask()


@pytest.mark.slow
def test_trials_that_run_at_the_same_time_are_apart() -> None:
    search = Search(asked(), OBJECTIVES)
    for _ in range(15):
        search.tell(told(search.ask()))
    drawn = np.array([weights(search.ask()) for _ in range(4)])
    apart = np.linalg.norm(drawn[:, None] - drawn[None], axis=2)[np.triu_indices(4, 1)]
    # the knobs are known by now; what is still worth a trial is another weighting. The simplex is 1.41 wide
    assert apart.min() > 0.05


def sampler(distributions: dict[str, Any], names: list[str] | None = None) -> SurrogateSampler:
    return SurrogateSampler(3, distributions, names or [], simplex_weights)


def test_what_is_minimised_is_sought_low() -> None:
    distributions = {"x": FloatDistribution(0.0, 1.0)}
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler(distributions))
    asked_at = []
    for _ in range(STARTUP + 8):
        trial = study.ask(distributions)
        asked_at.append(trial.params["x"])
        # both are best at 0.2
        study.tell(trial, [(asked_at[-1] - 0.2) ** 2, -abs(asked_at[-1] - 0.2)])
    assert np.abs(np.array(asked_at[STARTUP:]) - 0.2).max() < 0.15


def test_a_stopped_trial_counts_for_the_share_of_its_steps() -> None:
    search = Search(asked(), OBJECTIVES)
    num_steps = asked().shared.optim.steps
    specs = [search.ask(), search.ask()]
    whole, cut = told(specs[0]), told(specs[1])
    cut = replace(cut, state="stopped", metrics={**cut.metrics, "step": num_steps / 4}, reason="it fell behind")
    for result in (whole, cut):
        search.tell(result)
    again = Search(asked(), OBJECTIVES, results=[whole, cut])
    for study in (search.study, again.study):
        assert [trial.user_attrs.get("share", 1.0) for trial in study.trials] == [1.0, 0.25]


SQUARE = {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)}


def searched(num: int, ends: Callable[[float, float, int], bool], *, seed: int = 3) -> np.ndarray:
    """Ask for points of a square, of which x + y is the worth where trials end: (x, y, whether it failed) each."""
    study = optuna.create_study(direction="maximize", sampler=SurrogateSampler(seed, SQUARE))
    rows = []
    for turn in range(num):
        trial = study.ask(SQUARE)
        x, y = trial.params["x"], trial.params["y"]
        has_failed = not ends(x, y, turn)
        study.tell(trial, None if has_failed else x + y, state=TrialState.FAIL if has_failed else None)
        rows.append((x, y, has_failed))
    return np.array(rows)


@pytest.mark.slow
def test_it_learns_where_trials_fail_and_finds_the_best_beside_it() -> None:
    """Worth rises to the corner (1, 1), where trials fail: those of x + y > 1.4, 18 % of the square."""
    reached, best = [], []
    for seed in range(3):
        rows = searched(24, lambda x, y, turn: x + y <= 1.4, seed=seed)
        reached += rows[12:, :2].sum(axis=1).tolist()
        best.append(max(x + y for x, y, has_failed in rows if not has_failed))
    # a search that learns nothing from failures goes to the corner, 2.0, and stays there
    assert np.mean(reached) < 1.5
    assert np.mean(best) > 1.33


CONDITIONAL = {
    "kind": CategoricalDistribution(["lora", "prompt"]),
    "light": CategoricalDistribution(["", "dim", "warm"]),
    "is_long": CategoricalDistribution([False, True]),
    "word": CategoricalDistribution([1, 2]),
    "lr": FloatDistribution(0.0, 1.0),
}
CONDITIONS: dict[str, Conditions] = {
    "light": [("kind", ["prompt"])],
    "is_long": [("kind", ["prompt"])],
    "word": [("is_long", [True])],
    "lr": [("kind", ["lora"])],
}


def test_what_does_not_count_makes_no_difference() -> None:
    space = Features(CONDITIONAL, [], simplex_weights, CONDITIONS)
    words = {"kind": "prompt", "light": "dim", "is_long": False, "word": 1, "lr": 0.2}
    same, longer = words | {"word": 2, "lr": 0.7}, words | {"is_long": True}
    other = longer | {"word": 2}
    lora = words | {"kind": "lora"}
    columns = space.columns(np.array([space.units(params) for params in (words, same, longer, other, lora)]))
    assert (columns[0] == columns[1]).all()
    assert len({tuple(row) for row in columns.tolist()}) == 4
    tried = [space.tried(params) for params in (words, same, longer, other, lora)]
    assert tried[0] == tried[1] == (("kind", "prompt"), ("light", "dim"), ("is_long", False))
    assert tried[4] == (("kind", "lora"), ("lr", 0.2))  # a word counts only where its own condition's does
    assert (space.columns(np.array([space.units(lora | {"light": "warm", "word": 2})])) == columns[4]).all()
    assert len(set(tried)) == 4
    free = Features(CONDITIONAL, [], simplex_weights)
    assert len({free.tried(params) for params in (words, same, longer, other, lora)}) == 5


@pytest.mark.slow
def test_nothing_is_tried_twice_until_all_has_been() -> None:
    """Nine templates, of three lights and of three that are no or one of two words; LoRAs are worth nothing."""
    distributions = {name: kind for name, kind in CONDITIONAL.items() if name != "lr"}
    distributions["kind"] = CategoricalDistribution(["prompt", "lora"])
    space = Features(distributions, [], simplex_weights, CONDITIONS)
    study = optuna.create_study(
        direction="maximize", sampler=SurrogateSampler(3, distributions, [], simplex_weights, CONDITIONS)
    )
    tried = []
    for _ in range(12):
        trial = study.ask(distributions)
        tried.append(space.tried(trial.params))
        study.tell(trial, float(trial.params["kind"] == "prompt" and trial.params["light"] == "dim"))
    assert len(set(tried[:10])) == 10  # and the one LoRA
    assert set(tried[10:]) <= set(tried[:10])


def test_what_failed_is_not_tried_again_while_something_is_left() -> None:
    """Six settings, of which one fails each time; once all were tried, the search leaves that one alone."""
    distributions = {"rank": CategoricalDistribution([1, 4, 16]), "method": CategoricalDistribution(["sum", "best"])}
    study = optuna.create_study(direction="maximize", sampler=SurrogateSampler(3, distributions))
    tried = []
    for _ in range(STARTUP + 6):
        trial = study.ask(distributions)
        tried.append((trial.params["rank"], trial.params["method"]))
        has_failed = tried[-1] == (16, "best")
        study.tell(
            trial, None if has_failed else float(trial.params["rank"]), state=TrialState.FAIL if has_failed else None
        )
    assert len(set(tried[:6])) == 6
    assert (16, "best") not in tried[STARTUP:]


@pytest.mark.slow
def test_a_search_knows_the_conditions_of_its_experiment() -> None:
    words = {"light": {"choice": ["", "dim", "warm"], "when": {"model.adapter.kind": "prompt"}}}
    optim = {"lr": {"log_float": [1e-4, 1e-2], "when": {"model.adapter.kind": "lora"}}}
    prompt = {"template": "{prompt}, {light}", "words": words}
    model = {"adapter": {"kind": {"choice": ["lora", "prompt"]}}, "prompt": prompt}
    raw = {"name": "mix", "rewards": {"aesthetic": {}}, "model": model, "optim": optim}
    search, tried = Search(experiment(raw, search={"sampler": "surrogate"}), Objectives(("aesthetic",))), []
    for _ in range(10):
        spec = search.ask()
        tried.append(tuple(spec.values.items()))
        metrics = {"eval/aesthetic": float(spec.values["model.adapter.kind"] == "prompt")}
        search.tell(TrialResult(spec.id, "ok", spec.values, spec.params, metrics=metrics))
    assert len(set(tried)) == 10  # three templates, each once, and LoRAs


def test_the_first_trials_are_spread_evenly_though_some_fail() -> None:
    rows = searched(STARTUP, lambda x, y, turn: turn % 3 == 0)
    shift = np.random.default_rng(3).random(2)
    assert rows[:, :2] == pytest.approx(np.array([even_spread(number, shift) for number in range(STARTUP)]))


def test_where_all_have_failed_it_looks_where_it_knows_least() -> None:
    """Only 1.4 % of the square do not fail, a corner: 70 draws at random, on average."""
    rows = searched(STARTUP + 8, lambda x, y, turn: x < 0.12 and y > 0.88)
    assert rows[:STARTUP, 2].all()
    assert not rows[STARTUP:, 2].all()


def test_a_failure_that_is_no_property_of_the_settings_closes_nothing() -> None:
    """Of 20 trials spread evenly one was lost with its node; or all those of x > 0.5 failed."""
    space = Features(SQUARE, [], simplex_weights)
    points = np.array([even_spread(n, np.array([0.1, 0.7])) for n in range(20)])

    def probability(failed: Sequence[int], at: np.ndarray) -> np.ndarray:
        trials: dict[bool, list[FrozenTrial]] = {True: [], False: []}
        for n, point in enumerate(points):
            state = TrialState.FAIL if n in failed else TrialState.COMPLETE
            value = None if n in failed else 1.0
            trial = create_trial(state=state, value=value, params=space.values(point), distributions=SQUARE)
            trial.number = n
            trials[n in failed].append(trial)
        return _probability([_ends(space, trials[False], trials[True])], space.columns(at))

    assert probability([7], points[[7]]) > 0.5
    right = np.flatnonzero(points[:, 0] > 0.5).tolist()
    assert (probability(right, np.array([[0.9, 0.2], [0.8, 0.5], [0.9, 0.8]])) < 0.1).all()
    assert (probability(right, np.array([[0.1, 0.2], [0.2, 0.5], [0.1, 0.8]])) > 0.9).all()


def test_the_even_spread_steps_by_the_golden_ratio_and_leaves_no_gap() -> None:
    golden = (1 + math.sqrt(5)) / 2
    line = [float(even_spread(n, np.array([0.25]))[0]) for n in range(5)]
    assert line == pytest.approx([(0.25 + (n + 1) / golden) % 1 for n in range(5)])
    square = np.array([even_spread(n, np.array([0.1, 0.7])) for n in range(64)])
    # a point in every one of 4 x 4 cells; of random draws, 64 (15/16)^64 / 4 = 0.26 of a cell would be empty
    assert len({tuple(cell) for cell in (square * 4).astype(int)}) == 16


@pytest.mark.slow
def test_every_kind_of_setting_is_drawn_over_its_whole_range() -> None:
    distributions = {
        "choice": CategoricalDistribution(("a", None, True)),
        "order": CategoricalDistribution((8, 2, 4)),
        "int": IntDistribution(3, 9, step=3),
        "float": FloatDistribution(-1.0, 1.0),
        "log": FloatDistribution(1e-4, 1e-2, log=True),
        "one": IntDistribution(5, 5),
    }
    study = optuna.create_study(direction="minimize", sampler=sampler(distributions))
    for _ in range(30):
        trial = study.ask(distributions)  # refuses what lies outside
        value = abs(trial.params["float"] - 0.5) + abs(trial.params["order"] - 4) + (trial.params["choice"] != "a")
        study.tell(trial, value)
    trials = study.trials
    assert {trial.params["int"] for trial in trials} == {3, 6, 9}
    assert {trial.params["choice"] for trial in trials} == {"a", None, True}
    assert min(trial.params["log"] for trial in trials) < 4e-4
    assert max(trial.params["log"] for trial in trials) > 2.5e-3
    best = study.best_trial.params
    assert (best["order"], best["choice"]) == (4, "a")
    assert best["float"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.long
def test_what_a_stopped_trial_reached_is_taken_for_its_share_of_the_steps() -> None:
    """Stopped trials are poor at every rate; ended ones say which rate is best, and the two do not contradict."""
    results = []
    drawn = Search(asked(), OBJECTIVES)
    for turn in range(16):
        spec = drawn.ask()
        whole = told(spec, 3e-3)
        drawn.tell(whole)
        if turn % 2:
            metrics = {name: 0.2 * value for name, value in whole.metrics.items()}
            whole = replace(whole, state="stopped", metrics={**metrics, "step": 5.0})
        results.append(whole)
    rebuilt = Search(asked(), OBJECTIVES, results=results)
    live = Search(asked(), OBJECTIVES)
    for result in results:
        live.ask()
        live.tell(result)
    num_steps = asked().shared.optim.steps
    for search in (rebuilt, live):
        shares = [trial.user_attrs.get("share") for trial in search.study.trials]
        assert shares == [None, 5.0 / num_steps] * 8
    misses = []
    for _ in range(6):
        spec = rebuilt.ask()
        misses.append(abs(miss(spec, 3e-3)))
        rebuilt.tell(told(spec, 3e-3))
    assert np.median(misses) < 0.2
