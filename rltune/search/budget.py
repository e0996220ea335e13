"""What a sweep has spent of its time and of its GPUs', over all the times it was started. Read from events alone."""

import time

from rltune.runs.events import EVENTS_FILE, read_events
from rltune.runs.layout import RunFolder
from rltune.runs.usage import Spent, last_sign, spent


class Spending:
    """Counts on from what was spent before this process, interrupted trials and killed drivers included.

    Args:
        folder: The run.
        gpus_per_trial: GPUs that a trial holds now.
    """

    def __init__(self, folder: RunFolder, *, gpus_per_trial: float) -> None:
        self._before = spent_so_far(folder)
        self._gpus_per_trial = gpus_per_trial
        self._start = time.monotonic()
        self._running: dict[str, float] = {}
        self._ended_s = 0.0

    def begin(self, trial: str) -> None:
        """Note that a trial begins now."""
        self._running[trial] = time.monotonic()

    def end(self, trial: str, duration_s: float) -> None:
        """Note that a trial has ended after so long."""
        self._running.pop(trial, None)
        self._ended_s += duration_s

    @property
    def num_running(self) -> int:
        """Trials that have begun and not ended."""
        return len(self._running)

    @property
    def elapsed_s(self) -> float:
        """Seconds in which a process worked on the sweep."""
        return self._before.elapsed_s + time.monotonic() - self._start

    @property
    def gpu_s(self) -> float:
        """Seconds of trials times the GPUs they held, those running included."""
        now = time.monotonic()
        trials_s = self._ended_s + sum(now - start for start in self._running.values())
        return self._before.gpu_s + trials_s * self._gpus_per_trial


def spent_so_far(folder: RunFolder) -> Spent:
    """Return what a run has spent up to its last sign of life; nothing works on it now."""
    files = folder.path.glob(f"trials/*/{EVENTS_FILE}")
    trial_events = {file.parent.name: read_events(file) for file in files}
    return spent(read_events(folder.events_file), trial_events, now=last_sign(folder))
