"""Stopping rules against cases worked out by hand, and against what a resume must not change."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltune.runs.objectives import Objectives
from rltune.search.stopping import Rules, Rungs, broken_in_a_row, diverged, is_stalled
from tests.run_folders import experiment

BOTH = Objectives(("brightness", "drift"))
BASE = {"eval/brightness": 0.5, "eval/drift": 0.0, "eval/diversity": 1.0}
SPREAD = {"brightness": 0.1, "drift": 0.0, "diversity": 0.2}


def rules(*, search: dict[str, Any] | None = None, **sections: Any) -> Rules:
    """Rules of a search over ten steps with an evaluation at each."""
    sections = {"evaluate": {"every": 1, "judges": ["diversity", "drift"]}, **sections}
    shared = experiment(search={"trials": 4, **(search or {})}, **sections).shared
    return Rules(shared, BOTH, BASE, SPREAD)


def row(
    step: int, brightness: float = 0.5, drift: float = 0.0, diversity: float = 1.0, **more: float
) -> dict[str, Any]:
    return {
        "step": float(step),
        "eval/brightness": brightness,
        "eval/drift": drift,
        "eval/diversity": diversity,
        **more,
    }


# ---- rungs


def test_rungs_lie_at_grace_times_powers_of_the_reduction() -> None:
    rungs = Rungs(grace=2, reduction=3)
    steps = {step: rungs.record(f"{step}", step, np.array([0.0]), 0.0) for step in (1, 2, 3, 5, 6, 17, 18, 53, 54)}
    assert steps == {1: None, 2: 2, 3: 2, 5: 2, 6: 6, 17: 6, 18: 18, 53: 18, 54: 54}


def test_a_trial_is_judged_once_at_a_rung_at_its_first_report_there() -> None:
    rungs = Rungs(grace=2, reduction=2)
    first = [rungs.record("001", step, np.array([float(step)]), 0.0) for step in range(1, 10)]
    assert first == [None, 2, None, 4, None, None, None, 8, None]
    # what counts is the first report: 2 at rung 2, which both others beat
    rungs.record("002", 3, np.array([2.5]), 0.0)
    rungs.record("003", 2, np.array([2.75]), 0.0)
    assert rungs.decide("001", 2) == "rank 3 of 3 at step 2, of which the best 2 go on"


def test_the_best_part_goes_on() -> None:
    rungs = Rungs(grace=5, reduction=3)
    kept = {}
    for number, value in enumerate([5, 4, 3, 2, 9, 6, 7], start=1):
        trial = f"{number:03d}"
        rung = rungs.record(trial, 5, np.array([float(value)]), 0.0)
        assert rung == 5
        kept[trial] = rungs.decide(trial, rung) is None
    # three alone pass; then 2 of 4 and 5 go on (2 is last, 9 first), 2 of 6 (6 is second), 3 of 7 (7 is second)
    assert list(kept.values()) == [True, True, True, False, True, True, True]
    assert rungs.decide("004", 5) == "rank 7 of 7 at step 5, of which the best 3 go on"
    assert rungs.decide("001", 5) == "rank 4 of 7 at step 5, of which the best 3 go on"


def test_of_the_front_that_is_cut_those_that_are_spread_out_go_on() -> None:
    rungs = Rungs(grace=1, reduction=2)
    # 000 beats all. Of the rest, one front, two go on: row 001 is the best compromise, with a sum of 1.2 against 1.15,
    # 1 and 1; after it 999 and 1000 tie at sqrt(0.36 + 0.16) = 0.72: the earlier number
    points = {"000": [2.0, 2.0], "001": [0.6, 0.6], "002": [0.65, 0.5], "999": [0.0, 1.0], "1000": [1.0, 0.0]}
    for trial, values in points.items():
        rungs.record(trial, 1, np.array(values), 0.0)
    assert [rungs.decide(trial, 1) is None for trial in points] == [True, True, False, True, False]


def test_whom_nobody_dominates_goes_on() -> None:
    rungs = Rungs(grace=1, reduction=4)
    # the best quarter are two, four are on the front
    for number, values in enumerate([[0, 9], [1, 8], [2, 7], [3, 6], [0, 6], [1, 6], [2, 6], [0, 0]]):
        rungs.record(f"{number:03d}", 1, np.array(values, dtype=float), 0.0)
    assert [rungs.decide(f"{n:03d}", 1) is None for n in range(8)] == [True] * 4 + [False] * 4
    assert rungs.decide("007", 1) == "rank 8 of 8 at step 1, of which the best 4 go on"


def test_trials_that_break_constraints_fall_behind() -> None:
    rungs = Rungs(grace=1, reduction=2)
    for trial, value, violation in (("001", 1.0, 0.0), ("002", 9.0, 0.1), ("003", 0.0, -1.0), ("004", 8.0, 0.2)):
        rungs.record(trial, 1, np.array([value]), violation)
    assert [rungs.decide(f"{n:03d}", 1) is None for n in (1, 2, 3, 4)] == [True, False, True, False]


reports = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.integers(-3, 3), st.integers(-3, 3), st.integers(-1, 1)),
    min_size=1,
    max_size=24,
)


@pytest.mark.slow
@settings(deadline=None)
@given(reports, st.integers(2, 3), st.randoms(use_true_random=False))
def test_what_a_replay_in_any_order_rebuilds_decides_as_the_live_rungs(
    drawn: list[tuple[str, int, int, int]], reduction: int, random: Any
) -> None:
    live, rows = Rungs(1, reduction), dict[str, list[tuple[int, np.ndarray, float]]]()
    for trial, first, second, violation in drawn:  # each report of a trial is one step further
        step = len(rows.setdefault(trial, [])) + 1
        rows[trial].append((step, np.array([first, second], dtype=float), float(violation)))
        live.record(trial, *rows[trial][-1])
    waiting = {trial: list(steps) for trial, steps in rows.items()}
    rebuilt = Rungs(1, reduction)
    while waiting:  # any interleaving that keeps each trial's own order
        trial = random.choice(sorted(waiting))
        rebuilt.record(trial, *waiting[trial].pop(0))
        if not waiting[trial]:
            del waiting[trial]
    for rung in (1, reduction, reduction**2):
        for trial, steps in rows.items():
            if len(steps) >= rung:
                assert rebuilt.decide(trial, rung) == live.decide(trial, rung)


@pytest.mark.slow
@settings(deadline=None)
@given(reports)
def test_of_many_trials_the_best_part_or_the_front_would_go_on_and_no_more(
    drawn: list[tuple[str, int, int, int]],
) -> None:
    rungs = Rungs(1, 3)
    for number, (_, first, second, violation) in enumerate(drawn):
        rungs.record(f"{number:03d}", 1, np.array([first, second], dtype=float), float(violation))
    points = [(first, second) for _, first, second, violation in drawn if violation <= 0]
    num_front = sum(not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points) for x, y in points)
    num_kept = sum(rungs.decide(f"{number:03d}", 1) is None for number in range(len(drawn)))
    assert num_kept == (len(drawn) if len(drawn) <= 3 else max(-(-len(drawn) // 3), num_front))


# ---- rules of a single trial


def test_a_constraint_broken_in_a_row() -> None:
    history = {10: {"a.min": 0.1, "b.max": -1.0}, 30: {"a.min": 0.03, "b.max": 2.0}, 20: {"a.min": 0.2, "b.max": -1.0}}
    assert broken_in_a_row(history, 1) == "constraint a.min broken by 0.03 at step 30"
    assert broken_in_a_row(history, 3) == "constraint a.min broken by 0.03 at step 30, at 3 evaluations in a row"
    assert broken_in_a_row(history, 4) is None
    history[20] = {"a.min": 0.0, "b.max": 0.5}  # at 0 it holds
    assert broken_in_a_row(history, 2) == "constraint b.max broken by 2 at step 30, at 2 evaluations in a row"
    history[20] = {"a.min": 0.0, "b.max": -0.5}
    assert broken_in_a_row(history, 2) is None  # each at one of them, none at both


def test_divergence_is_to_lose_in_every_objective() -> None:
    reason = "diverged: every objective worse than the base model by 1.5 units of its scatter at step 7"
    assert diverged(np.array([-1.5, -4.0]), 7, 1.0) == reason
    assert diverged(np.array([-1.0, -4.0]), 7, 1.0) is None
    assert diverged(np.array([0.1, -9.0]), 7, 1.0) is None


def test_a_report_stops_a_trial_that_breaks_its_constraint() -> None:
    asked = rules(constraints={"diversity": {"min_ratio_to_base": 0.75}}, stop={"broken_constraint": 2})
    assert asked.on_report("001", row(1, diversity=0.5)) is None
    assert asked.on_report("001", row(1, diversity=0.5)) is None  # the same evaluation, after a resume
    assert asked.on_report("002", row(1, diversity=0.5)) is None
    assert asked.on_report("001", row(2, diversity=0.8)) is None
    assert asked.on_report("001", row(3, diversity=0.5)) is None
    assert asked.on_report("001", {"step": 4.0, "train/reward": 1.0}) is None  # not an evaluation
    expected = "constraint diversity.min_ratio_to_base broken by 0.15 at step 5, at 2 evaluations in a row"
    assert asked.on_report("001", row(5, diversity=0.6)) == expected


def test_step_0_is_the_base_model_and_the_last_step_the_end() -> None:
    asked = rules(constraints={"diversity": {"min": 2}}, stop={"broken_constraint": 2})
    assert asked.on_report("001", row(0)) is None
    assert asked.on_report("001", row(1)) is None
    assert asked.on_report("001", row(2, is_final=0.0)) is not None
    assert asked.on_report("002", row(9)) is None
    assert asked.on_report("002", row(10, is_final=1.0)) is None


def test_divergence_is_measured_in_the_spread_of_the_base_model() -> None:
    asked = rules()  # on by default, at one deviation; a spread of 0 counts as 1
    assert asked.on_report("001", row(1, brightness=0.3, drift=0.9)) is None
    assert asked.on_report("001", row(2, brightness=0.45, drift=2.0)) is None
    expected = "diverged: every objective worse than the base model by 1.25 units of its scatter at step 3"
    assert asked.on_report("001", row(3, brightness=0.3, drift=1.25)) == expected
    assert rules(stop={"diverged": None}).on_report("001", row(3, brightness=0.3, drift=1.25)) is None


# ---- rules of a sweep's trials together


def test_reports_are_compared_with_the_better_direction_up_and_the_feasible_first() -> None:
    asked = rules(
        search={"prune": True, "reduction": 2}, constraints={"diversity": {"min": 0.5}, "drift": {"max": 0.5}}
    )
    assert asked.on_report("001", row(1, brightness=0.7, drift=0.2)) is None
    assert asked.on_report("002", row(1, brightness=0.6, drift=0.3)) is None  # two alone
    # 004 beats 001 and 002; 003 is brightest, and has lost its diversity
    expected = "rank 3 of 3 at step 1, of which the best 2 go on"
    assert asked.on_report("003", row(1, brightness=0.9, drift=0.1, diversity=0.4)) == expected
    assert asked.on_report("004", row(1, brightness=0.8, drift=0.1)) is None
    assert asked.on_report("004", row(1, brightness=0.8, drift=0.1)) is None
    assert asked.on_report("002", row(2, brightness=0.6, drift=0.3)) is None  # first at its rung


def test_violations_add_up_in_deviations() -> None:
    constraints = {"diversity": {"min": 0.5}, "brightness": {"min": 0.5}}
    asked = rules(search={"prune": True, "reduction": 2}, constraints=constraints)
    asked.replay("001", [row(1, brightness=0.48)])  # 0.02 / 0.1 = 0.2 deviations
    asked.replay("002", [row(1, brightness=0.45, diversity=0.4)])  # 0.05 / 0.1 + 0.1 / 0.2 = 1
    # 0.03 / 0.2 = 0.15: first of three, though in raw numbers 001 breaks less
    assert asked.on_report("003", row(1, diversity=0.47)) is None
    # 0.18 / 0.2 = 0.9: third of four, and the last in raw numbers
    expected = "rank 3 of 4 at step 1, of which the best 2 go on"
    assert asked.on_report("004", row(1, diversity=0.32)) == expected


def test_without_pruning_nobody_is_compared() -> None:
    asked = rules()
    assert all(asked.on_report(f"{n:03d}", row(1, brightness=0.9 - n / 100)) is None for n in range(20))


@pytest.mark.slow
def test_a_replayed_run_goes_on_as_if_it_had_not_been_broken_off() -> None:
    sections: dict[str, Any] = {
        "search": {"prune": True, "reduction": 2},
        "constraints": {"diversity": {"min": 0.5}},
        "stop": {"broken_constraint": 3},
    }
    rng = np.random.default_rng(0)
    rows = {f"{n:03d}": [row(step, *rng.normal([0.6, 0.1, 0.6], 0.1)) for step in range(1, 10)] for n in range(1, 13)}
    order = [(trial, step) for step in range(9) for trial in rows]
    for cut in (1, 7, 30, 61):
        live, again = rules(**sections), rules(**sections)
        for trial, step in order[:cut]:
            live.on_report(trial, rows[trial][step])
        for trial, steps in reversed(rows.items()):  # trials in another order, one after another
            again.replay(trial, [steps[step] for name, step in order[:cut] if name == trial])
        rest = order[cut:]
        assert [live.on_report(t, rows[t][s]) for t, s in rest] == [again.on_report(t, rows[t][s]) for t, s in rest]


# ---- a whole sweep


def test_a_sweep_ends_when_its_time_or_its_budget_is_over() -> None:
    asked = rules(stop={"hours": 2, "gpu_hours": 5})
    assert asked.out_of_budget(elapsed_s=7199, gpu_s=17999) is None
    assert asked.out_of_budget(elapsed_s=7200) == "stop.hours: 2 of 2 hours are over"
    assert asked.out_of_budget(gpu_s=5 * 3600 + 360) == "stop.gpu_hours: 5.1 of 5 GPU-hours are spent"
    assert rules().out_of_budget(elapsed_s=1e9, gpu_s=1e9) is None
    assert rules().stalled([1.0] * 99) is None


def test_a_sweep_ends_when_the_hypervolume_stalls() -> None:
    asked = rules(stop={"stalled_trials": 3})
    expected = "stop.stalled_trials: the hypervolume grew by no more than 0.01 of itself, to 2.01, in the last 3 trials"
    assert asked.stalled([1.0, 2.0, 2.0, 2.01, 2.01]) == expected
    assert asked.stalled([1.0, 1.9, 2.0, 2.0, 2.01]) is None
    assert asked.stalled([2.0, 2.0, 2.0]) is None  # the base model and two trials


@pytest.mark.parametrize(
    ("volumes", "num", "tolerance", "expected"),
    [
        ([1.0, 1.0], 1, 0.0, True),
        ([1.0, 1.1], 1, 0.0, False),
        ([1.0, 1.5], 1, 0.5, True),
        ([1.0, 1.75], 1, 0.5, False),
        ([1.0], 1, 0.0, False),
        ([0.0, 0.0, 0.0], 2, 0.5, True),
        ([0.0, 0.0, 0.1], 2, 0.5, False),
    ],
)
def test_growth_is_relative(volumes: list[float], num: int, tolerance: float, expected: bool) -> None:
    assert is_stalled(volumes, num, tolerance) is expected
