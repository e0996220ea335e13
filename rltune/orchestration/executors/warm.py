"""``warm``: workers keep base model and rewards loaded and take trial after trial."""

from typing import Any

from rltune.orchestration.executors.base import EXECUTORS
from rltune.orchestration.workload import Workload


@EXECUTORS.register("warm")
class WarmExecutor:
    """A gang of workers a slot."""

    is_fixed_size = True
    reuses_workers = True

    def trainable(self, workload: Workload) -> Any:
        """Return a slot: its own process, and a bundle of resources a worker."""
        from rltune.orchestration.gang import warm_trainable

        return warm_trainable(workload)
