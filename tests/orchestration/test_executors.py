"""What every executor promises; another one joins by its file alone."""

from collections.abc import Iterator

import pytest

from rltune.config.load import parse_experiment
from rltune.errors import ExperimentError
from rltune.orchestration.executors.base import EXECUTORS, Executor
from rltune.orchestration.known import known_names
from rltune.orchestration.nodes import Node
from rltune.orchestration.workload import Workload, work_out
from tests.run_folders import experiment


@pytest.fixture(params=EXECUTORS.names())
def executor(request: pytest.FixtureRequest) -> Executor:
    return EXECUTORS.build(request.param, {})


def workload(**resources: object) -> Workload:
    return work_out(experiment(resources=resources), [Node(8, 4)])


def test_what_tune_runs_takes_what_the_workload_says(executor: Executor) -> None:
    """Nothing of its own that a worker waits for, or a full cluster would stand still."""
    trainable = executor.trainable(workload(workers=3, cpus_per_worker=2, gpus_per_worker=1))
    asked = getattr(trainable, "_resources", None) or trainable.default_resource_request({})
    own, *workers = asked.bundles
    assert own.get("CPU", 0) == 0
    assert own.get("GPU", 0) == 0
    assert workers in ([], [{"CPU": 2, "GPU": 1}] * 3)  # else Ray Train asks for them itself


def test_it_says_whether_it_can_be_reused_and_resized(executor: Executor) -> None:
    assert isinstance(executor.reuses_workers, bool)
    assert isinstance(executor.is_fixed_size, bool)


def test_one_of_a_fixed_size_is_refused_where_workers_may_go(executor: Executor) -> None:
    name = next(name for name in EXECUTORS.names() if type(EXECUTORS.build(name, {})) is type(executor))
    text = f"rewards: {{brightness: }}\nresources: {{executor: {name}, workers: 2, min_workers: 1}}"
    if not executor.is_fixed_size:
        assert parse_experiment(text, known=known_names()).shared.resources.executor == name
        return
    with pytest.raises(ExperimentError, match=f"workers of the {name} executor neither come nor go, got 1"):
        parse_experiment(text, known=known_names())


@pytest.fixture
def another() -> Iterator[None]:
    """An executor of another package, which registers itself."""

    @EXECUTORS.register("slurm")
    class Slurm:
        is_fixed_size = True
        reuses_workers = False

    yield
    del EXECUTORS._builders["slurm"]


@pytest.mark.usefixtures("another")
def test_one_that_registers_itself_can_be_named_at_once() -> None:
    text = "rewards: {brightness: }\nresources: {executor: slurm}"
    assert parse_experiment(text, known=known_names()).shared.resources.executor == "slurm"
    with pytest.raises(ExperimentError, match=r"unknown executor, got 'slurn'; did you mean 'slurm'\? known: slurm, t"):
        parse_experiment(text.replace("slurm", "slurn"), known=known_names())
