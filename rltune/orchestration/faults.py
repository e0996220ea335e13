"""How often a trial's workers are started again after they failed: decided here alone, for a Ray Train job.

Ray Train starts workers again and knows what ended them; what it gives up on, Ray Tune does not try again. Tune starts
again only what Train cannot: the processes that drive a job. The ``warm`` executor has no job, and there Tune starts a
gang again, as often.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train import TrainingFailedError, UserCallback, WorkerGroupError

from rltune.errors import RunError, StorageError
from rltune.orchestration.ray_private import cause_of
from rltune.orchestration.recovery import memory_kills
from rltune.runs.store import write_atomically

MEMORY_KILL = "low on memory"
"""In what Ray says of what it killed to free memory; pages of advice follow."""
KEPT = "is_kept"
"""Key of a report: 1 where a checkpoint that Ray Train does not know of was published before it."""
MAX_STARTS = 3
"""Starts in a row, none of which came to a checkpoint, after which a trial that ends in an exception has failed."""
MAX_DEATHS = 6
"""The same where a worker died, or its node: several may go one after another."""
MAX_LOSSES = 20
"""Starts over a whole trial, however far each came."""
MAX_STARTUPS = 10
"""Tries, of a minute each, to find room for a trial's workers."""
MAX_STARTUPS_GROWING = 60
"""The same where an autoscaler is to bring it: a cloud may have no machine with a GPU for a while."""


class FaultWatch(UserCallback):  # type: ignore[misc]  # ray has no types
    """Ends a trial that fails again and again without having come any further; runs in its job's controller.

    Ray Train's own limit counts deaths and faults alike, whatever was done in between: one that lets a trial outlive
    the loss of many nodes would start a broken one as often.

    Args:
        on_memory_kill: Called with what Ray says of a worker that it killed to free memory: the worker itself has no
            time for it.
    """

    def __init__(self, on_memory_kill: Callable[[str], None]) -> None:
        self._on_memory_kill = on_memory_kill
        self._num_in_a_row = 0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Note that the trial has come to another checkpoint."""
        if checkpoint is not None or any(row.get(KEPT) for row in metrics):
            self._num_in_a_row = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Let Ray Train start the workers again, or end the job.

        Raises:
            StorageError: The run folder cannot be written: nothing would be better the next time.
            RunError: It has failed often enough.
        """
        if kills := memory_kills(worker_exceptions.values()):
            self._on_memory_kill(kills[0])
        for error in worker_exceptions.values():
            is_storage, what = str(error).rpartition("StorageError: ")[1:]
            if is_storage:
                raise StorageError(last_line(what))
        self._num_in_a_row += 1
        has_died = any(is_death(error) for error in worker_exceptions.values())  # others fail only because one is gone
        if self._num_in_a_row >= (MAX_DEATHS if has_died else MAX_STARTS):
            first = worker_exceptions[min(worker_exceptions)]
            raise RunError(
                f"{last_line(str(first))} (started {self._num_in_a_row} times without reaching a checkpoint)"
            )


def is_death(error: BaseException) -> bool:
    """Whether a worker died, of which Ray Train says that its health check failed."""
    return isinstance(cause_of(error), RayActorError)


def record_fault(failure_file: Path, error: TrainingFailedError) -> None:
    """Write down why Ray Train gave a trial up, unless one of its workers has.

    Raises:
        StorageError: It was no fault of the trial's.
        OSError: The file cannot be written.
    """
    cause = getattr(error, "controller_failure", None)  # what a callback raised, or why no worker could start
    if isinstance(cause, StorageError):
        raise cause from error
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        cause = error.worker_failures[min(error.worker_failures)]
    if not failure_file.exists():
        failure_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(failure_file, f"{last_line(str(cause or error))}\n")


def last_line(text: str) -> str:
    """Return the line of a traceback that says what happened: the last, unless Ray has put its advice there."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if killed := [line for line in lines if MEMORY_KILL in line]:
        return killed[-1]
    return lines[-1] if lines else text


@contextmanager
def memory_kills_told() -> Iterator[None]:
    """Say what happened where Ray has killed what drives a trial to free memory, which Tune does not look for.

    Raises:
        RunError: It has.
    """
    try:
        yield
    except RuntimeError as error:
        if MEMORY_KILL not in str(error):
            raise
        raise RunError(
            f"memory ran out, and Ray ended a trial's driver ({last_line(str(error))}); free some, or lower "
            "resources.concurrent: the same command resumes"
        ) from error
