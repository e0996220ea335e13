"""What an executor is: how the trials of a sweep get their workers. One file an executor; ray is imported inside.

A trial is a ``JobSpec``; whoever runs it calls ``job.run_trial`` on every worker, with a ``job.TrialReporter`` that
brings each report to Tune, so that the same numbers come out whichever executor ran it.
"""

from typing import Any, Protocol

from rltune.orchestration.workload import Workload
from rltune.registry import Registry


class Executor(Protocol):
    """A way to run trials."""

    @property
    def reuses_workers(self) -> bool:
        """Whether what Tune runs takes another trial when one has ended (``reset_config``)."""
        ...

    @property
    def is_fixed_size(self) -> bool:
        """Whether a trial cannot go on with fewer workers (``resources.min_workers``)."""
        ...

    def trainable(self, workload: Workload) -> Any:
        """Return what Ray Tune runs for a trial.

        It finds the ``JobSpec`` under ``tuning.SPEC`` of its config. Its reports are those of the trial's main worker:
        ``is_final`` 1 with the last, ``is_preempted`` where it left for a stop file, ``STORAGE_ERROR`` where nothing
        can go on. A trial that fails leaves ``failure.txt``; what raises is started again.
        """
        ...


EXECUTORS: Registry[Executor] = Registry("executor", "rltune.orchestration.executors")
