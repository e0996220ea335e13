"""Why a trial that was to start has not: said once it has taken longer than a start takes."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from rltune.beside import beside
from rltune.orchestration.nodes import Node, WorkerNeed, count_slots, describe
from rltune.orchestration.workload import Workload
from rltune.runs.events import note_event, read_events
from rltune.runs.layout import RunFolder

PATIENCE_S = 60.0
"""What a start may take before it is asked after."""
LOOK_S = 10.0


def why_waiting(need: WorkerNeed, fewest: int, nodes: tuple[Node, ...], free: dict[str, float]) -> str:
    """Return what a trial waits for whose workers have not started.

    Args:
        need: What a worker takes.
        fewest: Workers without which it does not start.
        nodes: Those that are alive.
        free: Resource -> what of it is free in the whole cluster, as Ray says it.
    """
    workers = f"{fewest} worker{'s' if fewest > 1 else ''} with {need}{' each' if fewest > 1 else ''}"
    room = count_slots(nodes, need)
    if room < fewest:
        return f"waits for room for {workers}: the nodes that are alive hold {room} ({describe(nodes)})"
    wanted = {"CPU": float(need.num_cpus), "GPU": need.num_gpus}
    short = [name for name, number in wanted.items() if free.get(name, 0.0) < number * fewest]
    if short:
        left = ", ".join(f"{free.get(name, 0.0):g} {name}s" for name in short)
        return (
            f"waits for {workers}: {left} are free in the cluster; its workers are just starting, or others have the "
            "rest: 'ray status' says which"
        )
    return f"has room for {workers}, and they have not started yet; 'ray status' and the dashboard say how far they are"


class StartWatch:
    """Trials that were handed out in this process and whose workers have not begun.

    Args:
        folder: The run.
        why: Returns what a trial waits for.
    """

    def __init__(self, folder: RunFolder, why: Callable[[], str]) -> None:
        self._folder, self._why = folder, why
        self._lock = threading.Lock()
        self._since: dict[str, tuple[float, int]] = {}

    def begin(self, trial: str) -> None:
        """Note that a trial is to start now."""
        with self._lock:
            self._since[trial] = time.monotonic(), self._num_starts(trial)

    def end(self, trial: str) -> None:
        """Note that a trial is over."""
        with self._lock:
            self._since.pop(trial, None)

    def look(self) -> None:
        """Tell of each trial that has waited too long, in its events, what it waits for."""
        with self._lock:
            waiting = dict(self._since)
        late = [trial for trial, (since, _) in waiting.items() if time.monotonic() - since >= PATIENCE_S]
        for trial in late:
            if self._num_starts(trial) > waiting[trial][1]:
                self.end(trial)
            else:
                note_event(self._folder.trial_dir(trial), self._why())

    def _num_starts(self, trial: str) -> int:
        return sum(event.event == "worker_started" for event in read_events(self._folder.trial_events_file(trial)))

    def looking(self) -> AbstractContextManager[None]:
        """Look now and then for as long as a block runs."""

        def look(over: threading.Event) -> None:
            while not over.wait(LOOK_S):
                self.look()

        return beside(look)


def start_watch(folder: RunFolder, workload: Workload) -> StartWatch:
    """Return a watch over the trials of a run on the cluster that we are connected to."""

    def why() -> str:
        import ray

        from rltune.orchestration.nodes import read_nodes

        return why_waiting(workload.worker, workload.min_workers, read_nodes(ray.nodes()), ray.available_resources())

    return StartWatch(folder, why)
