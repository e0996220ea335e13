import numpy as np
import pytest

from rltune.config.experiment import RunConfig
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.metrics import violations
from rltune.runs.objectives import Front, Objectives, find_front
from rltune.runs.results import TrialResult
from tests.run_folders import result

BOTH = Objectives(("brightness", "drift"))
SPREAD = {"brightness": 0.1, "drift": 0.5}


def front_of(*results: TrialResult, objectives: Objectives = BOTH, spread: dict[str, float] = SPREAD) -> Front:
    front = find_front(results, objectives, spread)
    assert front is not None
    return front


def names(front: Front) -> list[str]:
    return [member.trial for member in front.members]


BASE = result(BASE_TRIAL, 0.5, 0.0)


def test_drift_is_minimised_and_everything_else_maximised() -> None:
    objectives = Objectives(("aesthetic", "drift", "diversity", "brightness"))
    assert objectives.signs_D.tolist() == [1, -1, 1, 1]
    signed = BOTH.signed_ND([result("001", 0.7, 0.2), result("002", 0.6, 0.3)])
    assert signed.tolist() == [[0.7, -0.2], [0.6, -0.3]]
    assert BOTH.raw_D(result("001", 0.7, 0.2).metrics).tolist() == [0.7, 0.2]
    assert BOTH.signed_ND([]).shape == (0, 2)


def constrained(**constraints: dict[str, float]) -> RunConfig:
    return RunConfig.model_validate({"rewards": {"brightness": {}}, "constraints": constraints})


@pytest.mark.parametrize(
    ("bound", "base", "value", "violation"),
    [
        ({"min": 0.4}, 0.0, 0.3, 0.1),
        ({"min": 0.4}, 0.0, 0.4, 0.0),
        ({"max": -0.2}, 0.0, -0.5, -0.3),
        ({"max": -0.2}, 0.0, 0.1, 0.3),
        ({"min_ratio_to_base": 0.5}, 0.8, 0.4, 0.0),
        ({"min_ratio_to_base": 0.5}, 0.8, 0.3, 0.1),
        ({"min_ratio_to_base": 1.25}, 0.8, 0.9, 0.1),
        ({"min_ratio_to_base": 0.5}, 0.0, -0.1, 0.1),
        ({"min_ratio_to_base": 0.5}, -10.0, -20.0, 0.0),  # 20 kB where the base needs 10: just within
        ({"min_ratio_to_base": 0.5}, -10.0, -25.0, 5.0),
        ({"min_ratio_to_base": 0.5}, -10.0, -5.0, -15.0),
        ({"min_ratio_to_base": 2.0}, -10.0, -10.0, 5.0),  # twice as good: half the cost
    ],
)
def test_a_violation_is_how_far_a_bound_is_overstepped(
    bound: dict[str, float], base: float, value: float, violation: float
) -> None:
    broken = violations(constrained(brightness=bound), {"eval/brightness": value}, {"eval/brightness": base})
    assert broken == {f"brightness.{next(iter(bound))}": pytest.approx(violation, abs=1e-12)}


def test_every_bound_counts_on_its_own() -> None:
    config = constrained(brightness={"min": 0.2, "max": 0.4}, drift={"max": 0.5})
    broken = violations(config, {"eval/brightness": 0.5, "eval/drift": 0.1}, {})
    assert broken == pytest.approx({"brightness.min": -0.3, "brightness.max": 0.1, "drift.max": -0.4})


def test_there_is_no_front_before_the_base_model_has_a_result() -> None:
    assert find_front([], BOTH, SPREAD) is None
    assert find_front([result("001", 0.6, 0.1)], BOTH, SPREAD) is None
    assert find_front([result(BASE_TRIAL, reason="out of memory"), result("001", 0.6, 0.1)], BOTH, SPREAD) is None


def test_a_base_model_that_failed_before_and_was_measured_since_counts() -> None:
    front = front_of(result(BASE_TRIAL, reason="out of memory"), BASE, result("001", 0.6, 0.1))
    assert names(front) == ["001", BASE_TRIAL]


def test_the_front_is_what_nothing_dominates_best_in_the_first_objective_first() -> None:
    low, high, dominated = result("001", 0.6, 0.1), result("002", 0.9, 0.4), result("003", 0.55, 0.2)
    # the base has no drift: nothing dominates it
    assert names(front_of(BASE, low, dominated, high)) == ["002", "001", BASE_TRIAL]


def test_the_base_model_leaves_the_front_when_it_is_dominated() -> None:
    only = Objectives(("brightness",))
    assert names(front_of(BASE, result("001", 0.6), objectives=only)) == ["001"]
    assert names(front_of(BASE, result("001", 0.4), objectives=only)) == [BASE_TRIAL]
    assert names(front_of(BASE, result("001", 0.5), objectives=only)) == [BASE_TRIAL, "001"]  # equal: both


def test_failed_and_infeasible_trials_are_not_on_it() -> None:
    broken = result("001", 0.9, 0.1, constraints={"diversity.min": 0.01})
    kept = result("002", 0.6, 0.2, constraints={"diversity.min": -0.01})
    front = front_of(BASE, broken, kept, result("003", reason="nan"))
    assert names(front) == ["002", BASE_TRIAL]
    alone = front_of(BASE, kept)
    assert front.hypervolume == alone.hypervolume  # nor do they count


def test_the_base_model_is_there_whatever_the_constraints_say() -> None:
    base = result(BASE_TRIAL, 0.5, 0.0, constraints={"brightness.min": 0.2})
    assert names(front_of(base)) == [BASE_TRIAL]


def test_the_base_model_alone_has_volume_one_and_no_knee() -> None:
    front = front_of(BASE, result("001", reason="nan"))
    assert front.hypervolume == 1.0
    assert front.knee is None
    assert front.best("brightness") is BASE


def test_the_hypervolume_is_as_by_hand() -> None:
    # in deviations above the reference (0.4, drift 0.5): base (1, 1), then (0.6 - 0.4) / 0.1 = 2 and
    # (0.5 - 0.1) / 0.5 = 0.8, then 5 and 0.2
    front = front_of(BASE, result("001", 0.6, 0.1), result("002", 0.9, 0.4))
    assert front.reference_D == pytest.approx([0.4, 0.5])
    # rectangles from the right: 5 x 0.2, then 2 x (0.8 - 0.2), then 1 x (1 - 0.8)
    assert front.hypervolume == pytest.approx(5 * 0.2 + 2 * 0.6 + 1 * 0.2)


def test_a_trial_worse_than_the_reference_adds_nothing() -> None:
    # a gain in brightness for a drift of more than one deviation: on the front, beyond the reference point
    front = front_of(BASE, result("001", 0.9, 0.6))
    assert names(front) == ["001", BASE_TRIAL]
    assert front.hypervolume == 1.0


def test_a_spread_of_zero_counts_in_the_objectives_own_unit() -> None:
    front = front_of(BASE, result("001", 2.5, 0.5), spread={"brightness": 0.0, "drift": 0.0})
    assert front.reference_D == pytest.approx([-0.5, 1.0])
    # base (1, 1), trial (1 + 2, 1 - 0.5)
    assert front.hypervolume == pytest.approx(3 * 0.5 + 1 * 0.5)


def test_the_knee_is_the_trained_member_furthest_out() -> None:
    ends = result("001", 1.0, 1.0), result("003", 0.6, 0.0)
    bulge = result("002", 0.9, 0.2)
    front = front_of(result(BASE_TRIAL, 0.5, 0.0), *ends, bulge)
    assert front.knee is bulge
    assert front.best("brightness") is ends[0]
    assert front.best("drift") is ends[1]


def test_knee_and_best_are_never_the_base_model_while_there_is_a_trained_member() -> None:
    only = result("001", 0.9, 0.3)
    front = front_of(BASE, only)
    assert BASE_TRIAL in names(front)
    assert front.knee is only
    assert front.best("drift") is only  # the base has no drift at all


def test_every_member_is_finite_when_there_is_one_objective() -> None:
    front = front_of(BASE, result("001", 0.7), result("002", 0.8), objectives=Objectives(("brightness",)))
    assert names(front) == ["002"]
    assert front.knee is not None
    assert front.knee.trial == "002"
    assert front.hypervolume == pytest.approx(4.0)  # (0.8 - 0.4) / 0.1
    assert np.isfinite(front.reference_D).all()
