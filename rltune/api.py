"""What ``import rltune`` offers: the few calls that the command line is words and tables over.

``rltune.load`` and the others are these; importing rltune itself loads nothing.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rltune.beside import beside
from rltune.config.load import Experiment, load_experiment, parse_experiment
from rltune.runs.layout import RunFolder
from rltune.runs.run import Run
from rltune.runs.status import RunStatus, StatusReader

if TYPE_CHECKING:
    from rltune.orchestration.plan import Plan

logger = logging.getLogger(__name__)

Source = Experiment | str | Path | Mapping[str, Any]
Watch = Callable[[RunStatus], None]
WATCH_S = 1.0
"""Between two calls of ``watch``."""


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> Experiment:
    """Return an experiment, every setting and name of it checked.

    Args:
        source: A YAML file, or its content as a mapping.
        overrides: ``{"optim.lr": 1e-3}``, or ``["optim.lr=1e-3"]`` as after ``--set``; later ones win.

    Raises:
        ExperimentError: Lists every fault.
    """
    from rltune.orchestration.known import known_names

    if isinstance(overrides, Mapping):
        overrides = [f"{path}={json.dumps(value)}" for path, value in overrides.items()]
    if isinstance(source, Mapping):
        return parse_experiment(source, "experiment", list(overrides), known_names(), must_find_files=False)
    return load_experiment(source, list(overrides), known_names(), must_find_files=False)


def plan(source: Source, *, storage: str | Path = "runs", address: str | None = None) -> "Plan":
    """Return what a run would do, once nothing is known to be wrong with it; starts nothing.

    Args:
        source: The experiment, or what ``load`` takes.
        storage: Folder that holds run folders, or ``s3://BUCKET/FOLDER``.
        address: Ray cluster, ``HOST:PORT``; else ``RAY_ADDRESS``, else one that runs here, else this machine.

    Raises:
        ExperimentError: Lists everything that is known to be wrong: options, prompts, weights, nodes.
        RltuneError: The cluster cannot be attached to.
    """
    from rltune.orchestration.campaign import plan_run

    return plan_run(_loaded(source), storage=storage, address=address)[0]


def sweep(
    source: Source, *, storage: str | Path = "runs", address: str | None = None, watch: Watch | None = None
) -> Run:
    """Search the settings of an experiment, measure the front again, export its best LoRAs; the same call resumes.

    Args:
        source: The experiment, or what ``load`` takes.
        storage: Folder that holds run folders, shared if the cluster has several nodes; or ``s3://BUCKET/FOLDER``.
        address: As in ``plan``.
        watch: Called about once a second while trials run, and once at their end, with where the run stands; from
            another thread. What it raises is logged, and it is not called again.

    Raises:
        UserError: The experiment, the cluster or the run folder does not allow it; nothing was started.
        RunError: The base model could not be measured, no trial ended well, or an export failed.
        KeyboardInterrupt: It was interrupted; the same call resumes.
    """
    return _run(source, storage, address, watch, is_sweep=True)


def train(
    source: Source, *, storage: str | Path = "runs", address: str | None = None, watch: Watch | None = None
) -> Run:
    """Train one LoRA with fixed settings and export it; the same call resumes. Arguments and errors are ``sweep``'s."""
    return _run(source, storage, address, watch, is_sweep=False)


def open_run(path: str | Path) -> Run:
    """Return a run folder as plain data: trials, front, curves. Loads neither torch nor ray.

    Raises:
        UserError: There is no run there, or a newer version of rltune started it.
        RunError: Its record cannot be read.
    """
    return Run(path)


def _loaded(source: Source) -> Experiment:
    return source if isinstance(source, Experiment) else load(source)


def _run(source: Source, storage: str | Path, address: str | None, watch: Watch | None, *, is_sweep: bool) -> Run:
    from rltune.orchestration.campaign import check_kind, run_campaign

    experiment = _loaded(source)
    check_kind(experiment, is_sweep=is_sweep)

    def display(folder: RunFolder, experiment: Experiment) -> AbstractContextManager[None]:
        return nullcontext() if watch is None else beside(partial(_call_often, watch, StatusReader(folder, experiment)))

    found = run_campaign(experiment, storage=storage, address=address, display=display)
    return Run(found.folder.where)


def _call_often(watch: Watch, reader: StatusReader, stop: threading.Event) -> None:
    is_last = False
    while not is_last:
        is_last = stop.wait(WATCH_S)
        try:
            watch(reader.read())
        except Exception:  # what shows a run must not end it
            logger.warning("watch: failed, and is not called again", exc_info=True)
            return
