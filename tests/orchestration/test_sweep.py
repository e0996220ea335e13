"""A sweep as a whole, where Ray Tune would run: no cluster is started."""

import json
from pathlib import Path
from typing import Any

import pytest

from rltune.orchestration.cluster import Cluster
from rltune.orchestration.inspection import Inputs
from rltune.orchestration.nodes import Node
from rltune.orchestration.plan import Plan
from rltune.orchestration.sweep import Sweep
from rltune.orchestration.workload import work_out
from rltune.runs.layout import RunFolder
from tests.orchestration import test_trials
from tests.orchestration.test_trials import trials_of
from tests.run_folders import experiment

SEARCH = {"trials": 8, "sampler": "random"}


def sweep_of(folder: RunFolder, **sections: Any) -> Sweep:
    """A sweep of a run that ``trials_of`` has begun."""
    asked = experiment(**({"search": SEARCH} | sections))
    cluster = Cluster(address="127.0.0.1:1", is_own=True, dashboard_url="", nodes=test_trials.NODES)
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
