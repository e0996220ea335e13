"""``study.db``: the trials of a run as an Optuna study in SQLite, for optuna-dashboard. Mirrored, never read back.

``results.jsonl`` is the truth: a study that is missing or says something else is written anew. Nothing that happens to
this file can stop a sweep.
"""

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.artifacts import FileSystemArtifactStore
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from rltune.config.load import Experiment
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.objectives import Objectives
from rltune.runs.results import TrialResult
from rltune.search.optuna_private import artifact_attribute
from rltune.search.searcher import frozen_trial, to_optuna

logger = logging.getLogger(__name__)

RETRY_S = 60.0
"""After a failure the file is left alone for so long."""
PICTURES = "study_artifacts"
"""Folder beside the study: the last image grid of each trial, under its id."""
LOCK_S = 1.0
"""How long another program's lock is waited for; the sweep stands still meanwhile."""


class StudyFile:
    """The study of a run, kept up to date with its results.

    Args:
        path: The file.
        name: Of the study: the run's.
        experiment: What is searched over.
    """

    def __init__(self, path: Path, name: str, experiment: Experiment) -> None:
        self._path = path
        self._name = name
        self._objectives = Objectives(experiment.shared.objective_names)
        self._distributions: Mapping[str, BaseDistribution] = to_optuna(experiment.space)
        self._pictures = path.with_name(PICTURES)
        self._study: optuna.Study | None = None
        self._num_written = 0
        self._retry_at = 0.0
        self._has_warned = False

    def update(self, results: Sequence[TrialResult]) -> None:
        """Write what is new in ``results``, which are those of before and some more. Never raises."""
        if time.monotonic() < self._retry_at:
            return
        trained = [result for result in results if result.trial != BASE_TRIAL]
        base = next((result for result in reversed(results) if result.trial == BASE_TRIAL and result.is_ok), None)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # metric names and constraints are experimental in Optuna 5.0
                self._write(trained, base)
        except Exception as error:  # noqa: BLE001  # a view of the run is not worth the run, whatever SQLite says
            self._study = None
            self._retry_at = time.monotonic() + RETRY_S
            if not self._has_warned:
                cause = error.__cause__ or error  # Optuna's own error says only that there was one
                what = next(iter(str(cause).splitlines()), type(cause).__name__)
                logger.warning("%s: not written (%s); the sweep goes on without it, and tries again", self._path, what)
            self._has_warned = True

    def _write(self, trained: Sequence[TrialResult], base: TrialResult | None) -> None:
        if self._study is None:
            self._study = self._open(trained) or self._make_anew(trained, base)
            self._num_written = len(self._study.get_trials(deepcopy=False))
        for result in trained[self._num_written :]:
            self._add(self._study, result)
            self._num_written += 1

    def _add(self, study: optuna.Study, result: TrialResult) -> None:
        """Add a trial, and its last image grid as an artifact, which optuna-dashboard shows on its plots."""
        grid = self._grid(result)
        if grid.is_file():
            self._pictures.mkdir(exist_ok=True)
            with grid.open("rb") as picture:
                FileSystemArtifactStore(self._pictures).write(result.trial, picture)
        study.add_trial(self._frozen(result))

    def _grid(self, result: TrialResult) -> Path:
        samples = RunFolder(self._path.parent).trial_dir(result.trial) / "samples"
        return samples / f"step-{result.metrics.get('step', 0):06.0f}.png"

    def _open(self, trained: Sequence[TrialResult]) -> optuna.Study | None:
        """Return the study in the file, or None if it is not that of these results."""
        if not self._path.is_file():
            return None
        try:
            study = optuna.load_study(study_name=self._name, storage=_storage(self._path))
            found = study.get_trials(deepcopy=False)
            is_same = study.metric_names == list(self._objectives.names) and len(found) <= len(trained)
        except Exception as error:  # noqa: BLE001  # torn or foreign: SQLite, SQLAlchemy and Optuna each have their own
            logger.debug("%s: made anew: %s", self._path, error)
            return None
        expected = [self._frozen(result) for result in trained[: len(found)]]
        return study if is_same and [_told(t) for t in found] == [_told(t) for t in expected] else None

    def _make_anew(self, trained: Sequence[TrialResult], base: TrialResult | None) -> optuna.Study:
        """Write all of the study beside the file, then put it in its place."""
        partial = self._path.with_name(f"{self._path.name}.partial")
        partial.unlink(missing_ok=True)
        storage = _storage(partial)
        try:
            directions = ["maximize" if sign > 0 else "minimize" for sign in self._objectives.signs_D]
            study = optuna.create_study(study_name=self._name, storage=storage, directions=directions)
            study.set_metric_names(list(self._objectives.names))
            if base is not None:  # not a trial: it has no parameters
                values = self._objectives.raw_D(base.metrics).tolist()
                study.set_user_attr("base model", dict(zip(self._objectives.names, values, strict=True)))
            for result in trained:
                self._add(study, result)
        finally:
            storage.remove_session()
            storage.engine.dispose()
        partial.replace(self._path)
        return optuna.load_study(study_name=self._name, storage=_storage(self._path))

    def _frozen(self, result: TrialResult) -> FrozenTrial:
        attributes: dict[str, Any] = {"state": result.state, "reason": result.reason, "checkpoint": result.checkpoint}
        if "step" in result.metrics:
            attributes["step"] = int(result.metrics["step"])
        trial = frozen_trial(result, self._objectives, self._distributions, attributes)
        if result.constraints:  # Optuna 5.0 keeps them by name, optuna-dashboard 0.21 looks for the list of before
            trial.system_attrs = {**trial.system_attrs, "constraints": list(result.constraints.values())}
        if self._grid(result).is_file():
            picture = artifact_attribute(result.trial, f"trial-{result.trial}.png", "image/png")
            trial.system_attrs = {**trial.system_attrs, **picture}
        if result.ended_at:  # Optuna's times are local and do not say so
            ended = datetime.fromisoformat(result.ended_at).astimezone().replace(tzinfo=None)
            trial.datetime_complete = ended
            trial.datetime_start = ended - timedelta(seconds=result.duration_s)
        return trial


def _told(trial: FrozenTrial) -> tuple[Any, ...]:
    """Return what a trial says."""
    return trial.state, trial.values, trial.params, trial.user_attrs, trial.constraints


def _storage(path: Path) -> RDBStorage:
    storage = RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": LOCK_S}})
    # what a power cut takes is written anew from the results, so no trial waits for the disk
    sqlalchemy.event.listen(storage.engine, "connect", _do_not_sync)
    storage.engine.dispose()
    return storage


def _do_not_sync(connection: Any, record: object) -> None:
    connection.execute("PRAGMA synchronous=OFF")
