"""The figures of a run at Ray's metrics endpoint, for Prometheus and Grafana: ``ray_rltune_hypervolume`` and others.

The driver reads them from the run folder, as ``rltune status`` does, so that workers have nothing to do with it.
"""

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

from rltune.beside import beside
from rltune.config.load import Experiment
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.status import RunStatus, StatusReader

logger = logging.getLogger(__name__)

EVERY_S = 10.0
"""Between readings; Ray hands metrics on as often."""
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "rltune_trials": ("Trials by state, the base model's among them.", ("run", "state")),
    "rltune_trials_planned": ("Trained trials that the run will have.", ("run",)),
    "rltune_front_size": ("Trials on the Pareto front.", ("run",)),
    "rltune_hypervolume": ("Hypervolume of the front.", ("run",)),
    "rltune_utilisation": ("Share of the time of all slots that was spent in training steps, 0 to 1.", ("run",)),
    "rltune_step_seconds": ("Mean time of an optimiser step so far.", ("run",)),
    "rltune_objective": ("Newest evaluation of an objective on held-out prompts.", ("run", "trial", "objective")),
    "rltune_k": ("How many sampling steps carry gradient.", ("run", "trial")),
    "rltune_step": ("Optimiser steps done.", ("run", "trial")),
}
"""Name, without the ``ray_`` that Ray puts before it -> what it is and its tags."""
STATES = ("starting", "running", "interrupted", "done", "stopped", "failed")

Sample = tuple[str, Mapping[str, str], float]
"""Name, tags without the run's, value."""


def samples(status: RunStatus, experiment: Experiment) -> Iterator[Sample]:
    """Yield what is to be shown of a run at a moment."""
    counts = Counter(trial.state for trial in status.trials)
    yield from (("rltune_trials", {"state": state}, float(counts[state])) for state in STATES)
    yield "rltune_trials_planned", {}, float(status.num_trials)
    if status.front is not None:
        on_it = sum(member.is_feasible for member in status.front.members if member.trial != BASE_TRIAL)
        yield "rltune_front_size", {}, float(on_it)
        yield "rltune_hypervolume", {}, status.front.hypervolume
    if status.usage is not None:
        yield "rltune_utilisation", {}, status.usage.utilisation
    if status.step_s is not None:
        yield "rltune_step_seconds", {}, status.step_s
    shared = experiment.shared
    for trial in status.trials:
        tags = {"trial": trial.trial}
        for objective in shared.objective_names:
            if (value := trial.metrics.get(f"eval/{objective}")) is not None:
                yield "rltune_objective", {**tags, "objective": objective}, value
        if trial.trial != BASE_TRIAL:
            yield "rltune_step", tags, float(trial.step)
            if (k := trial.values.get("estimator.k", shared.estimator.k)) is not None:
                yield "rltune_k", tags, float(k)


def exported(folder: RunFolder, experiment: Experiment) -> AbstractContextManager[None]:
    """Hand the figures of a run to Ray for as long as a block runs, and once at its end."""
    return beside(partial(_export_often, StatusReader(folder, experiment), experiment))


def _export_often(reader: StatusReader, experiment: Experiment, stop: threading.Event) -> None:
    is_last = False
    while not is_last:
        is_last = stop.wait(EVERY_S)
        try:
            status = reader.read()
            for name, tags, value in samples(status, experiment):
                _gauge(name).set(value, tags={"run": status.name, **tags})
        except Exception:  # what shows a run must not end it
            logger.debug("the figures of the run could not be handed on", exc_info=True)


@cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    description, tags = GAUGES[name]
    return Gauge(name, description=description, tag_keys=tags)
