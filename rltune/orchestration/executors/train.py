"""``train``: each trial is a Ray Train job of its own, which survives a worker, a node, and grows and shrinks."""

from typing import Any

from rltune.orchestration.executors.base import EXECUTORS
from rltune.orchestration.workload import Workload


@EXECUTORS.register("train")
class TrainExecutor:
    """A driver that waits for its Ray Train job."""

    is_fixed_size = False
    reuses_workers = False  # a driver of Ray Train that was stopped cannot be used again

    def trainable(self, workload: Workload) -> Any:
        """Return a driver that takes no CPU of its own."""
        from rltune.orchestration.tuning import train_trainable

        return train_trainable()
