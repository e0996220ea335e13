"""A sweep as a whole, where Ray Tune would run: no cluster is started."""

import json
from pathlib import Path
from typing import Any

import pytest

from rltune.orchestration import sweep as sweep_module
from rltune.orchestration.cluster import Cluster
from rltune.orchestration.inspection import Inputs
from rltune.orchestration.nodes import Node
from rltune.orchestration.plan import Plan
from rltune.orchestration.sweep import Sweep
from rltune.orchestration.trials import Trials
from rltune.orchestration.workload import work_out
from rltune.runs.layout import RunFolder
from tests.orchestration import test_trials
from tests.orchestration.test_trials import trials_of
from tests.run_folders import experiment

SEARCH = {"trials": 8, "sampler": "random"}


def sweep_of(folder: RunFolder, *, is_own: bool = True, **sections: Any) -> Sweep:
    """A sweep of a run that ``trials_of`` has begun."""
    asked = experiment(**({"search": SEARCH} | sections))
    cluster = Cluster(address="127.0.0.1:1", is_own=is_own, dashboard_url="", nodes=test_trials.NODES)
    return Sweep(Plan(asked, folder, work_out(asked, cluster.nodes), Inputs({})), cluster)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [{"hours": 2.0}, {"gpu_hours": 5.0}], ids=["hours", "gpu_hours"])
def test_a_budget_that_is_spent_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: dict[str, float]
) -> None:
    sections = {"stop": stop, "resources": {"workers": 2, "gpus_per_worker": 1, "precision": "fp32"}}
    monkeypatch.setattr("tests.orchestration.test_trials.NODES", (Node(4.0, 4.0),))
    folder = trials_of(tmp_path, **sections).folder
    started = {"event": "driver_started", "trials_at_once": 2, "workers": 2, "gpus_per_worker": 1, "last_sign": 4000}
    folder.events_file.write_text(
        json.dumps({"time": 0, **started}) + "\n" + json.dumps({"time": 36000, "event": "driver_ended"})
    )
    file = folder.trial_events_file("001")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"time": 0, "event": "suggested"}) + "\n")
    monkeypatch.setattr(Sweep, "_run_tune", lambda *_, **__: pytest.fail("Ray Tune was started"))
    sweep = sweep_of(folder, **sections)
    sweep.run()
    assert sweep.trials.over.startswith(f"stop.{next(iter(stop))}: ")


@pytest.mark.slow
def test_what_was_chosen_is_measured_by_the_workers_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.orchestration.test_trials.NODES", (Node(4.0, 4.0), Node(4.0, 4.0)))
    alive: list[float] = []
    rows = lambda: [{"Alive": True, "Resources": {"CPU": cpus, "GPU": cpus}} for cpus in alive]  # noqa: E731
    monkeypatch.setattr("ray.nodes", rows)
    asked: list[Any] = []
    monkeypatch.setattr(sweep_module, "unconfirmed", lambda *_: [])
    monkeypatch.setattr(sweep_module, "measure", lambda *_, num_workers: asked.append(num_workers))
    monkeypatch.setattr(Trials, "chosen", [])
    folder = trials_of(tmp_path, resources={"gpus_per_worker": 0}).folder
    attached = sweep_of(folder, is_own=False, resources={"gpus_per_worker": 0})
    for alive in ([4.0, 4.0], [4.0], [1.0], []):  # noqa: B007  # nodes are lost
        attached.confirm()
    assert asked == [(1, 8), (1, 4), 1, 1]
    sweep_of(folder, resources={"gpus_per_worker": 0}).confirm()  # our own machine is there or nothing is
    alive = [4.0, 4.0]
    sweep_of(folder, is_own=False, resources={"gpus_per_worker": 0.5, "precision": "fp32"}).confirm()
    assert asked[4:] == [8, 8]  # Ray Train does not shrink by halves of a GPU
