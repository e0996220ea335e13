import re
from typing import Any

import pytest

from rltune.errors import UserError
from rltune.orchestration.plan import Plan, make_plan
from rltune.training.setup import NUM_CALIBRATION_IMAGES
from tests.runs import SEARCHED, experiment

FIXED = {"rewards": {"brightness": {}}, "optim": {"steps": 10, "batch": 4}}


def plan(cpus: float, gpus: float = 0, *, trials: int = 100, **resources: Any) -> Plan:
    asked = experiment(search={"trials": trials}, resources=resources)
    return make_plan(asked, {"CPU": cpus, "GPU": gpus, "memory": 1e9})


@pytest.mark.parametrize(
    ("cpus", "gpus", "resources", "num_concurrent", "per_worker"),
    [
        (2, 0, {}, 2, 0),
        (2.9, 0, {}, 2, 0),
        (8, 0, {"workers": 2}, 4, 0),
        (7, 0, {"workers": 2}, 3, 0),
        (16, 4, {}, 4, 1),  # auto: a GPU each
        (3, 4, {}, 3, 1),  # a worker also takes a CPU
        (16, 8, {"workers": 4}, 2, 1),
        (16, 8, {"gpus_per_worker": 0}, 16, 0),
        (16, 8, {"gpus_per_worker": 2}, 4, 2),
        (16, 1, {"gpus_per_worker": 0.5}, 2, 0.5),
        (16, 1, {"gpus_per_worker": 0.1}, 10, 0.1),  # 1 // 0.1 is 9
        (16, 1, {"gpus_per_worker": 0.2}, 5, 0.2),
        (16, 1, {"gpus_per_worker": 0.25, "workers": 2}, 2, 0.25),
        (16, 2, {"gpus_per_worker": 0.6}, 2, 0.6),  # 1.2 of 2 GPUs are left, but no 0.6 of one
        (16, 3, {"gpus_per_worker": 0.5, "workers": 4}, 1, 0.5),
        (16, 4, {"concurrent": 3}, 3, 1),
    ],
)
def test_as_many_trials_run_at_a_time_as_fit(
    cpus: float, gpus: float, resources: dict[str, Any], num_concurrent: int, per_worker: float
) -> None:
    made = plan(cpus, gpus, **resources)
    assert (made.num_concurrent, made.num_gpus_per_worker) == (num_concurrent, per_worker)
    assert made.num_workers == resources.get("workers", 1)


def test_no_more_trials_at_a_time_than_there_are() -> None:
    assert plan(64, trials=3).num_concurrent == 3


def test_images_are_counted_as_by_hand() -> None:
    evaluate = {"every": 4, "prompts": 3, "images_per_prompt": 2}
    made = make_plan(experiment(evaluate=evaluate, search={"trials": 5}), {"CPU": 2})
    # 10 steps of 4 images; evaluated after 4, 8 and 10 steps on 3 x 2 images; the base once, and its calibration
    assert (made.num_steps, made.images_per_step, made.num_evaluations, made.images_per_evaluation) == (10, 4, 3, 6)
    assert made.num_images == 5 * (10 * 4 + 3 * 6) + 6 + NUM_CALIBRATION_IMAGES


@pytest.mark.parametrize(("every", "num_evaluations"), [(1, 10), (5, 2), (6, 2), (10, 1), (11, 1)])
def test_the_end_is_always_evaluated(every: int, num_evaluations: int) -> None:
    made = make_plan(experiment(FIXED, evaluate={"every": every}), {"CPU": 2})
    assert made.num_evaluations == num_evaluations


def test_without_distributions_there_is_one_trial() -> None:
    made = make_plan(experiment(FIXED, search={"trials": 9}), {"CPU": 8})
    assert (made.num_trials, made.num_concurrent) == (1, 1)
    assert make_plan(experiment(SEARCHED), {"CPU": 8}).num_trials == 4


@pytest.mark.parametrize(
    ("cpus", "gpus", "resources", "message"),
    [
        (1, 0, {"workers": 2}, "resources: a trial needs 2 CPUs and 0 GPUs, the cluster has 1 and 0; lower"),
        (0, 0, {}, "a trial needs 1 CPUs and 0 GPUs, the cluster has 0 and 0"),
        (8, 0, {"gpus_per_worker": 1}, "a trial needs 1 CPUs and 1 GPUs, the cluster has 8 and 0"),
        (8, 2, {"gpus_per_worker": 1.0, "workers": 4}, "a trial needs 4 CPUs and 4 GPUs, the cluster has 8 and 2"),
        (8, 1, {"gpus_per_worker": 0.5, "workers": 4}, "a trial needs 4 CPUs and 2 GPUs, the cluster has 8 and 1"),
        (2, 0, {"concurrent": 3}, "resources.concurrent: 3 trials at a time need more than the cluster has, 2 fit"),
    ],
)
def test_what_can_never_run_is_refused(cpus: float, gpus: float, resources: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        plan(cpus, gpus, **resources)


def test_a_cluster_that_names_no_resource_has_none() -> None:
    with pytest.raises(UserError, match="the cluster has 0 and 0"):
        make_plan(experiment(), {})
