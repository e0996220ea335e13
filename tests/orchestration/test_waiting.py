"""A start that takes long says what it waits for."""

from pathlib import Path

import pytest

from rltune.orchestration import waiting
from rltune.orchestration.nodes import Node, WorkerNeed
from rltune.orchestration.waiting import StartWatch, why_waiting
from rltune.runs.events import append_event, read_notices
from rltune.runs.layout import RunFolder

NEED = WorkerNeed(2, 1.0)
NODES = (Node(8.0, 2.0), Node(8.0, 2.0))


@pytest.mark.parametrize(
    ("nodes", "free", "says"),
    [
        (
            (),
            {},
            "waits for room for 2 workers with 2 CPUs and 1 GPU each: the nodes that are alive hold 0 (no node with a "
            "CPU or GPU)",
        ),
        (
            NODES,
            {"CPU": 9.0, "GPU": 1.0},
            "waits for 2 workers with 2 CPUs and 1 GPU each: 1 GPUs are free in the cluster; its workers are just "
            "starting, or others have the rest: 'ray status' says which",
        ),
        (NODES, {"CPU": 3.0}, "3 CPUs, 0 GPUs are free in the cluster"),
        (NODES, {"CPU": 4.0, "GPU": 2.0}, "has room for 2 workers with 2 CPUs and 1 GPU each, and they have not"),
    ],
)
def test_what_is_waited_for(nodes: tuple[Node, ...], free: dict[str, float], says: str) -> None:
    assert says in why_waiting(NEED, 2, nodes, free)


def test_a_trial_without_workers_is_told_of_until_they_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now, reasons = [0.0], ["room", "room", "a node"]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    folder = RunFolder(tmp_path)
    append_event(folder.trial_events_file("001"), "worker_started")  # of an earlier start
    watch = StartWatch(folder, lambda: reasons.pop(0))
    for trial in ("001", "002", "003"):
        watch.begin(trial)
    append_event(folder.trial_events_file("002"), "worker_started")
    watch.end("003")
    now[0] = waiting.PATIENCE_S - 1
    watch.look()
    assert len(reasons) == 3
    for now[0] in (60.0, 70.0, 80.0):
        watch.look()
    assert read_notices(folder.trial_dir("001")) == ["room", "a node"]  # what is said again is not written again
    assert read_notices(folder.trial_dir("002")) == read_notices(folder.trial_dir("003")) == []
    append_event(folder.trial_events_file("001"), "worker_started")
    watch.look()
    watch.look()
    assert not reasons
