"""Ray Tune's side of a sweep: what suggests trials, drives one, and records how it ends."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.train import TrainingFailedError
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from rltune.errors import StorageError, writing
from rltune.orchestration.faults import last_line, record_fault
from rltune.orchestration.job import make_trainer
from rltune.orchestration.job_spec import STORAGE_ERROR, JobSpec
from rltune.orchestration.ray_private import HEAD_NODE

SPEC = "spec"
"""Key of the ``JobSpec`` in a Tune trial's config."""


def train_trainable() -> Any:
    """Return what Tune runs for the ``train`` executor: a driver that waits for its Ray Train job."""
    # no CPU of its own, or drivers would take those their workers wait for; the head outlives spot nodes
    return tune.with_resources(drive, {"CPU": 0, HEAD_NODE: 0.001})


def drive(config: dict[str, Any]) -> None:
    """Run one trial as a Ray Train job and wait for it: the Tune trainable. Uses no CPU of its own.

    What Ray Train gives up on is recorded as the trial's failure and not raised: Tune would start all of it again.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    spec: JobSpec = config[SPEC]
    try:
        with writing(spec.run_dir):
            try:
                make_trainer(spec, callbacks=[TuneReportCallback()]).fit()
            except TrainingFailedError as error:
                failure = spec.folder.failure_file(spec.trial)
                spec.folder.bring(failure)
                record_fault(failure, error)
                spec.folder.publish(failure)
    except StorageError as error:
        tune.report({STORAGE_ERROR: str(error)})


class Suggester(Searcher):  # type: ignore[misc]  # ray has no types
    """Gives Tune one trial after another.

    Args:
        suggest: Returns the next trial, or None when no more are wanted.
        first: The base model's trial if it is still to be run. Others are suggested beside it: they wait for what it
            measures once they have loaded.
        num_trials: How many trials ``suggest`` will be asked for.
    """

    def __init__(self, suggest: Callable[[], JobSpec | None], *, first: JobSpec | None, num_trials: int) -> None:
        super().__init__()
        self._suggest = suggest
        self._first = first
        self._num_left = num_trials

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's config, or FINISHED."""
        if self._first is not None:
            spec, self._first = self._first, None
            return {SPEC: spec}
        if self._num_left == 0:
            return Searcher.FINISHED
        suggested = self._suggest()
        self._num_left = self._num_left - 1 if suggested else 0
        return {SPEC: suggested} if suggested else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: results are recorded by ``Recorder``."""

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        """Accept whatever Tune knows of metrics: nothing."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the run folder is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class StoppingScheduler(FIFOScheduler):  # type: ignore[misc]  # ray has no types
    """Asks after every report of a trial whether it is to be stopped.

    Tune's own schedulers look at one metric, and start from nothing after a restart; ours asks the sweep, whose rules
    know all objectives and are rebuilt from the run folder.
    """

    def __init__(self, is_to_stop: Callable[[JobSpec, Mapping[str, Any]], bool]) -> None:
        super().__init__()
        self._is_to_stop = is_to_stop

    def set_search_properties(self, metric: Any, mode: Any, **spec: Any) -> bool:
        """Accept whatever Tune knows of metrics: nothing."""
        return True

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return Tune's word for going on or for stopping."""
        is_over = self._is_to_stop(trial.config[SPEC], result)
        return str(FIFOScheduler.STOP if is_over else FIFOScheduler.CONTINUE)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the run folder is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Recorder(TrialProgressCallback):  # type: ignore[misc]  # ray has no types
    """Calls back with every trial's end: its spec, its last report, Ray's error text, its duration in seconds.

    A progress callback by class, since Tune adds one that prints where it finds none; this one prints nothing.

    Args:
        on_end: Called with it.
        logs: Where Ray's logs are, for a trial of which nothing is known.
    """

    def __init__(self, on_end: Callable[[JobSpec, Mapping[str, Any], str, float], None], *, logs: str) -> None:
        super().__init__()
        self._on_end, self._logs = on_end, logs
        self._started: dict[str, float] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Print nothing."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note when the trial started."""
        self._started.setdefault(trial.trial_id, time.monotonic())

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Pass on the last report."""
        self._end(trial, "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Pass on what went wrong."""
        self._end(trial, _last_line(trial) or f"the trial died without a word; see {self._logs}")

    def _end(self, trial: Any, error: str) -> None:
        duration_s = time.monotonic() - self._started.get(trial.trial_id, time.monotonic())
        self._on_end(trial.config[SPEC], trial.last_result or {}, error, duration_s)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _last_line(trial: Any) -> str:
    """Return the line of a trial's traceback that says what happened; empty where there is none."""
    file = Path(trial.error_file or "")
    # where Ray writes it first; ``get_error`` looks where it is copied to, later or, of a driver that died, never
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else str(trial.get_error() or "")
    return last_line(text)
