import re
from typing import Any

import pytest

from rltune.errors import UserError
from rltune.orchestration.nodes import Node, WorkerNeed
from rltune.orchestration.workload import Workload, work_out
from rltune.training.setup import NUM_CALIBRATION_IMAGES
from tests.run_folders import SEARCHED, experiment

FIXED = {"rewards": {"brightness": {}}, "optim": {"steps": 10, "batch": 4}}


def plan(cpus: float, gpus: float = 0, *, trials: int = 100, **resources: Any) -> Workload:
    """On a single node."""
    return plan_on(Node(cpus, gpus), trials=trials, **resources)


def plan_on(*nodes: Node, trials: int = 100, **resources: Any) -> Workload:
    return work_out(experiment(search={"trials": trials}, resources=resources), nodes)


def node(cpus: float, gpus: float, *accelerators: str) -> Node:
    return Node(cpus, gpus, frozenset(accelerators))


H100, A100, NO_GPU = node(16, 8, "H100"), node(16, 4, "A100"), node(8, 0)


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
    assert plan(64, trials=3).num_concurrent == 4  # the base model is one more


def test_images_are_counted_as_by_hand() -> None:
    evaluate = {"every": 4, "prompts": 3, "images_per_prompt": 2}
    made = work_out(experiment(evaluate=evaluate, search={"trials": 5}), [Node(2)])
    # 10 steps of 4 images; evaluated after 4, 8 and 10 steps on 3 x 2 images; the base once, and its calibration
    assert (made.num_steps, made.images_per_step, made.num_evaluations, made.images_per_evaluation) == (10, 4, 3, 6)
    assert made.num_images == 5 * (10 * 4 + 3 * 6) + 6 + NUM_CALIBRATION_IMAGES


@pytest.mark.parametrize(("every", "num_evaluations"), [(1, 10), (5, 2), (6, 2), (10, 1), (11, 1)])
def test_the_end_is_always_evaluated(every: int, num_evaluations: int) -> None:
    made = work_out(experiment(FIXED, evaluate={"every": every}), [Node(2)])
    assert made.num_evaluations == num_evaluations


def test_without_distributions_there_is_one_trial() -> None:
    made = work_out(experiment(FIXED, search={"trials": 9}), [Node(8)])
    assert (made.num_trials, made.num_concurrent) == (1, 2)  # the base model beside it
    assert work_out(experiment(SEARCHED), [Node(8)]).num_trials == 4


# ---- several nodes


@pytest.mark.parametrize(
    ("nodes", "resources", "num_concurrent", "num_nodes"),
    [
        # a worker spans no nodes: three CPUs are left over on each
        ((node(7, 0), node(7, 0)), {"cpus_per_worker": 4}, 2, 2),
        ((node(7, 0), node(7, 0)), {"cpus_per_worker": 4, "workers": 2}, 1, 2),
        # its trial may
        ((node(1, 0), node(1, 0), node(1, 0)), {"workers": 3}, 1, 3),
        ((node(2, 1), node(2, 1), node(2, 1), node(2, 1)), {"workers": 2}, 2, 4),
        # three GPUs in all, but only one place for two of them
        ((node(4, 1), node(4, 2)), {"gpus_per_worker": 2}, 1, 1),
        # 0.6 of a GPU is left on every node, and none of them is a whole 0.6
        ((node(9, 2), node(9, 2)), {"gpus_per_worker": 0.7}, 4, 2),
        # CPUs without a GPU beside them are of no use, nor the other way round
        ((node(32, 0), node(2, 8)), {}, 2, 1),
        ((node(32, 0), node(2, 8)), {"gpus_per_worker": 0}, 34, 2),
        ((node(0, 8), node(3, 0)), {"gpus_per_worker": 0}, 3, 1),
        # by type of accelerator
        ((H100, A100, NO_GPU), {}, 12, 2),
        ((H100, A100, NO_GPU), {"accelerator": "A100"}, 4, 1),
        ((H100, A100, NO_GPU), {"accelerator": "H100", "workers": 3}, 2, 1),
        ((H100, A100, NO_GPU), {"accelerator": "H100", "gpus_per_worker": 0}, 16, 1),
        # elastic: as many as fit at full size, one if only a smaller size fits
        ((node(2, 0), node(3, 0)), {"workers": 2, "min_workers": 1}, 2, 2),
        ((node(1, 0), node(1, 0)), {"workers": 4, "min_workers": 2}, 1, 2),
    ],
)
def test_workers_are_packed_onto_nodes(
    nodes: tuple[Node, ...], resources: dict[str, Any], num_concurrent: int, num_nodes: int
) -> None:
    made = plan_on(*nodes, **resources)
    assert (made.num_concurrent, made.num_nodes) == (num_concurrent, num_nodes)


def test_what_a_worker_takes_is_said() -> None:
    made = plan_on(H100, workers=4, min_workers=2, cpus_per_worker=3, accelerator="H100")
    assert made.worker == WorkerNeed(3, 1.0, "H100")
    assert (made.min_workers, made.num_workers) == (2, 4)
    assert plan(4, workers=2).min_workers == 2


def test_an_accelerator_that_cannot_be_known_is_not_refused() -> None:
    assert plan_on(Node(8, 4, None), accelerator="H100").num_concurrent == 4


def test_nodes_that_an_autoscaler_brings_count() -> None:
    coming = {"nodes": "autoscale", "workers": 2, "gpus_per_worker": 1, "accelerator": "H100", "concurrent": 3}
    made = plan_on(NO_GPU, **coming)
    assert (made.num_concurrent, made.num_slots, made.num_nodes, made.is_growing) == (3, 6, 0, True)
    assert made.precision == "bf16"
    assert plan_on(*[H100] * 2, **coming).num_slots == 16  # there are more already
    assert not plan_on(H100, workers=2).is_growing


@pytest.mark.parametrize(
    ("nodes", "resources", "message"),
    [
        (
            [node(1, 0)],
            {"workers": 2},
            "resources: a trial needs 2 workers with 1 CPU each, and the cluster has room for 1: 1 node of 1 CPU and "
            "0 GPUs; lower resources.workers, or attach",
        ),
        (
            [node(0, 0)],
            {},
            "a trial needs 1 worker with 1 CPU each, and the cluster has room for 0: no node with a CPU",
        ),
        ([], {}, "no node with a CPU or GPU; attach to a larger cluster"),
        (
            [node(8, 0)],
            {"gpus_per_worker": 1},
            "with 1 CPU and 1 GPU each, and the cluster has room for 0: 1 node of 8",
        ),
        (
            [node(8, 2)],
            {"gpus_per_worker": 1.0, "workers": 4},
            "room for 2: 1 node of 8 CPUs and 2 GPUs; lower resources.",
        ),
        ([node(8, 1)], {"gpus_per_worker": 0.5, "workers": 4}, "needs 4 workers with 1 CPU and 0.5 GPUs each, and"),
        # enough in all, not on one node
        ([node(2, 0), node(2, 0)], {"cpus_per_worker": 4}, "room for 0: 2 nodes of 2 CPUs and 0 GPUs; lower "),
        (
            [node(4, 1)] * 3,
            {"gpus_per_worker": 2},
            "room for 0: 3 nodes of 4 CPUs and 1 GPU; lower resources.workers or",
        ),
        (
            [H100, node(16, 1, "A100"), node(16, 1, "A100"), NO_GPU],
            {"accelerator": "A100", "workers": 3},
            "needs 3 workers with 1 CPU and 1 GPU on a node with A100 each, and the cluster has room for 2: 1 node of "
            "16 CPUs and 8 GPUs (H100), 2 nodes of 16 CPUs and 1 GPU (A100), 1 node of 8 CPUs and 0 GPUs; lower",
        ),
        ([node(1, 0)], {"workers": 4, "min_workers": 2}, "a trial needs 2 workers with 1 CPU each"),
        (
            [H100, A100, NO_GPU],
            {"accelerator": "h100"},
            "resources.accelerator: no node of the cluster has 'h100', it has A100, H100; write one of them, or leave",
        ),
        (
            [NO_GPU],
            {"accelerator": "H100"},
            "no node of the cluster has 'H100', it names none on any node, or leave it",
        ),
        (
            [node(2, 0)],
            {"concurrent": 3},
            "resources.concurrent: 3 trials at a time need more than the cluster has, 2 fit",
        ),
    ],
)
def test_what_can_never_run_is_refused(nodes: list[Node], resources: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        plan_on(*nodes, **{"concurrent": "auto", **resources})


def test_a_trial_is_one_of_the_kind_that_trains_whichever_comes_first() -> None:
    model = {"adapter": {"kind": {"choice": ["prompt", "lora"]}}}
    made = work_out(experiment(FIXED, model=model, evaluate={"every": 5}, search={"trials": 4}), [Node(2)])
    assert (made.num_steps, made.num_evaluations) == (10, 2)
    alone = work_out(experiment(FIXED, model={"adapter": {"kind": "prompt"}}, evaluate={"every": 5}), [Node(2)])
    assert (alone.num_steps, alone.num_evaluations) == (0, 1)
