"""What every node of a cluster sees, asked before the first trial: rltune, its version, the run's storage.

A trial would find out once its workers are up, minutes later, and of a node without rltune no more would be heard than
that workers died there. So what runs on a node here is pickled by value and needs no rltune: functions in functions.
"""

import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rltune import __version__
from rltune.errors import RunError, UserError, writing
from rltune.orchestration.nodes import Node, WorkerNeed
from rltune.runs.objects import ObjectStore

ANSWER_S = 90.0
"""In which a node answers whose processes are slow to start."""
NAMED = 5
"""Nodes that a message names; of more it says how many."""
Look = Callable[[str], str]
"""Runs on a node, whose id it is given, and says what is wrong there with the storage; empty where nothing is."""


@dataclass(frozen=True)
class View:
    """What a node sees."""

    node: Node
    version: str = ""
    """Of rltune there."""
    no_rltune: str = ""
    """Why it cannot be imported there; empty where it can."""
    no_storage: str = ""
    """What is wrong there with the storage; empty where nothing is, or it was not asked for."""
    no_answer: str = ""
    """Why nothing is known of it; empty where it answered."""
    clock_s: float = 0.0
    """How far its clock is ahead of ours at least; negative where it is behind."""
    gib: Mapping[str, float] = field(default_factory=dict)
    """Memory, and what its disk and its shared memory have room for, in GiB: ``memory``, ``disk``, ``shm``."""


@contextmanager
def folder_probe(folder: Path) -> Iterator[Look]:
    """Write a file into a folder, and return what says on another node whether it is there and can be answered.

    It is gone when the block ends.

    Raises:
        StorageError: The folder cannot be written here.
    """
    place, text = folder / f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex
    with writing(folder):
        place.mkdir(parents=True)
        (place / "token").write_text(text)
    where = str(place)

    def look(node: str) -> str:
        import pathlib
        import time

        here = pathlib.Path(where)
        for wait_s in (0.5, 1.5, 0.0):  # a network file system may know of a new file a moment later
            try:
                if (here / "token").read_text() == text:
                    break
                fault = "another one is there"
            except OSError as error:
                fault = error.strerror or str(error)
            time.sleep(wait_s)
        else:
            return f"what was written there cannot be read ({fault})"
        try:
            (here / node).write_text(text)
        except OSError as error:
            return f"it can be read there but not written ({error.strerror or error})"
        return ""

    try:
        yield look
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def store_probe(store: ObjectStore) -> Iterator[Look]:
    """Do the same at an address: whether a node may read, write and delete there.

    Raises:
        StorageError: It cannot be written from here.
    """
    uri, key, text = store.uri, f".probe/{uuid.uuid4().hex}", uuid.uuid4().hex
    store.write(key, text.encode())

    def look(node: str) -> str:
        try:
            from rltune.runs.objects import open_store

            there = open_store(uri)
            if (there.read(key) or b"").decode() != text:
                return "what was written there cannot be read"
            there.write(f"{key}-{node}", b"")
            there.delete(f"{key}-{node}")
        except Exception as error:  # noqa: BLE001  # a node without rltune or credentials says so
            return str(error)
        return ""

    try:
        yield look
    finally:
        store.delete(key)


def _question() -> Callable[[str, Look | None], dict[str, Any]]:
    """Return what is asked on a node."""

    def ask(node: str, look: Look | None) -> dict[str, Any]:
        import os
        import shutil
        import tempfile
        import time

        found: dict[str, Any] = {"time": time.time(), "version": "", "no_rltune": "", "no_storage": ""}
        try:
            import rltune

            found["version"] = rltune.__version__
        except Exception as error:  # noqa: BLE001  # whatever keeps it from being imported
            found["no_rltune"] = f"{type(error).__name__}: {error}"
        if look is not None:
            found["no_storage"] = look(node)
        gib = {"memory": float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))}
        gib["disk"] = float(shutil.disk_usage(tempfile.gettempdir()).free)
        if os.path.isdir("/dev/shm"):
            gib["shm"] = float(shutil.disk_usage("/dev/shm").total)
        found["gib"] = {name: size / 2**30 for name, size in gib.items()}
        return found

    return ask


def survey(nodes: Sequence[Node], look: Look | None = None, *, timeout_s: float = ANSWER_S) -> tuple[View, ...]:
    """Return what nodes of the cluster that we are connected to see, by a small task on each, all at a time.

    Args:
        nodes: Which.
        look: Says what is wrong with the storage; left out, it is not asked for.
        timeout_s: In which a node has to answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_question())
    asked_at, end = time.time(), time.monotonic() + timeout_s
    waiting = {}
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node.id, soft=False)
        waiting[task.options(scheduling_strategy=place, name="survey").remote(node.id, look)] = node
    views = {}
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=max(end - time.monotonic(), 0.0))
        if not done:
            break
        node = waiting.pop(done[0])
        try:
            views[node.id] = _view(node, ray.get(done[0]), asked_at)
        except Exception as error:  # noqa: BLE001  # ray raises whatever its layers raise
            views[node.id] = View(node, no_answer=str(error).strip().splitlines()[0])
    for task_left, node in waiting.items():
        ray.cancel(task_left, force=True)
        views[node.id] = View(node, no_answer=f"nothing in {timeout_s:.0f} s")
    return tuple(views[node.id] for node in nodes)


def _view(node: Node, found: Mapping[str, Any], asked_at: float) -> View:
    its_time, now = found["time"], time.time()
    ahead_s = its_time - now if its_time > now else min(its_time - asked_at, 0.0)
    return View(
        node, found["version"], found["no_rltune"], found["no_storage"], clock_s=ahead_s, gib=dict(found["gib"])
    )


def faults_of(views: Sequence[View], storage: Path | str | None = None) -> list[str]:
    """Return what keeps trials from running on nodes, with what to do, nodes with the same fault together."""
    faults: dict[str, list[str]] = {}
    for view in views:
        for text in _faults(view, storage):
            faults.setdefault(text, []).append(view.node.name or view.node.id)
    return [f"{_named(names)}: {text}" for text, names in faults.items()]


def _faults(view: View, storage: Path | str | None) -> Iterator[str]:
    if view.no_answer:
        yield f"no answer ({view.no_answer}); it hangs, is overloaded or was lost: see 'ray status'"
        return
    if view.no_rltune:
        yield (
            f"rltune cannot be imported ({view.no_rltune}); install rltune {__version__} there, in the Python that "
            "runs 'ray start'"
        )
    elif view.version != __version__:
        yield f"rltune {view.version} is installed, here it is {__version__}; install the same on all nodes"
    if view.no_storage and isinstance(storage, str):
        yield f"--storage: cannot be used there: {view.no_storage}"
    elif view.no_storage:
        yield (
            f"--storage: {storage} is not the same folder as here: {view.no_storage}; name one that all nodes mount at "
            "the same path"
        )


def _named(found: Sequence[str]) -> str:
    names = sorted(found)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"node{'s' if len(names) > 1 else ''} {', '.join(names[:NAMED])}{more}"


def check_nodes(nodes: Sequence[Node], need: WorkerNeed, folder: Path | ObjectStore) -> None:
    """Check that a run can be worked on wherever its processes may come to: workers, and their drivers on the head.

    Args:
        nodes: Of the cluster that we are connected to.
        need: What a worker takes; nodes that hold none are not asked, unless one is the head.
        folder: Of the run, or what it lies on.

    Raises:
        UserError: rltune or the storage is not there on some node; nothing was started.
        RunError: Nodes do not answer.
    """
    asked = [node for node in nodes if node.is_head or node.num_fitting(need)]
    storage: Path | str = folder.parent if isinstance(folder, Path) else folder.uri
    if len(nodes) == 1 and isinstance(folder, Path):
        views = survey(asked)
    else:
        with folder_probe(folder) if isinstance(folder, Path) else store_probe(folder) as look:
            views = survey(asked, look)
    if not (faults := faults_of(views, storage)):
        return
    is_silence = all(view.no_answer for view in views if any(_faults(view, storage)))
    kind = RunError if is_silence else UserError
    raise kind("the cluster cannot run this yet\n" + "\n".join(f"  {fault}" for fault in faults))
