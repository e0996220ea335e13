"""A run's folder: where things lie, who may write to it, and what was asked. Everything else is rebuilt from it."""

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltune.errors import UserError
from rltune.records import from_record, to_record
from rltune.runs.addresses import as_folder
from rltune.runs.copies import Copy, Wanted, is_light_or_handed_on
from rltune.runs.events import EVENTS_FILE
from rltune.runs.lease import owner_of
from rltune.runs.store import write_atomically

BASE_TRIAL = "000"
"""The base model; every figure has it as reference."""


@dataclass(frozen=True)
class TrialSpec:
    """One trial: its knobs, and what the searcher drew them from."""

    id: str
    values: Mapping[str, Any]
    """Dotted path in the experiment -> value."""
    params: Mapping[str, Any]
    """The searcher's own parameters, from which ``values`` follow."""


class RunFolder:
    """The layout of ``runs/NAME``.

    Args:
        path: Where it lies on this machine.
        copy: Of what it is a copy, where the run lies on object storage.

    Raises:
        UserError: The path is an address.
    """

    def __init__(self, path: Path, copy: Copy | None = None) -> None:
        self.path = as_folder(path, "a run folder").resolve()
        self.copy = copy

    @property
    def where(self) -> str:
        """Where the run lies, for a user to read."""
        return str(self.path) if self.copy is None else self.copy.store.uri

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def experiment_file(self) -> Path:
        """The experiment as resolved; feed it back to run it again."""
        return self.path / "experiment.yaml"

    @property
    def resolved_file(self) -> Path:
        """What the settings meant when the run was started: ``record.Record``."""
        return self.path / "resolved.json"

    @property
    def prompts_dir(self) -> Path:
        """The run's own copies of its prompts."""
        return self.path / "prompts"

    @property
    def results_file(self) -> Path:
        """One line per trial that ended."""
        return self.path / "results.jsonl"

    @property
    def warm_start_file(self) -> Path:
        """Results of another run that this one's search started out from, lines as in ``results_file``."""
        return self.path / "warm_start.jsonl"

    @property
    def study_file(self) -> Path:
        """The results as an Optuna study, for optuna-dashboard."""
        return self.path / "study.db"

    @property
    def base_dir(self) -> Path:
        """Measurements of the base model, shared by trials."""
        return self.path / "base"

    @property
    def exports_dir(self) -> Path:
        """Exported LoRAs."""
        return self.path / "exports"

    @property
    def scratch_dir(self) -> Path:
        """Ray Tune's own files; nothing is read back from them."""
        return self.path / ".ray"

    @property
    def confirmed_file(self) -> Path:
        """Members of the front and the base model, measured again on fresh prompts: one line each."""
        return self.path / "confirmed.jsonl"

    @property
    def mixtures_file(self) -> Path:
        """LoRAs of the front mixed without training, or at other strengths, on the same prompts: one line each."""
        return self.path / "mixtures.jsonl"

    @property
    def confirmation_failure_file(self) -> Path:
        """Why fresh measurements failed."""
        return self.path / "confirm-failure.txt"

    @property
    def report_file(self) -> Path:
        """The run as a page of HTML, written again while it goes on and at its end."""
        return self.path / "report.html"

    @property
    def stop_file(self) -> Path:
        """Is there while trials are asked to write a checkpoint and leave: the machine will go away."""
        return self.path / ".stop"

    def trial_dir(self, trial: str) -> Path:
        """A trial's folder."""
        return self.path / "trials" / trial

    def checkpoints_dir(self, trial: str) -> Path:
        """Ray Train's storage for a trial."""
        return self.trial_dir(trial) / "checkpoints"

    def failure_file(self, trial: str) -> Path:
        """Why a trial failed, written by the worker that met it."""
        return self.trial_dir(trial) / "failure.txt"

    def config_file(self, trial: str) -> Path:
        """The experiment that a trial is trained with, concrete, and by which versions."""
        return self.trial_dir(trial) / "config.json"

    @property
    def events_file(self) -> Path:
        """When drivers of the run started and ended."""
        return self.path / EVENTS_FILE

    def trial_events_file(self, trial: str) -> Path:
        """When what happened to a trial, and notices about it."""
        return self.trial_dir(trial) / EVENTS_FILE

    def write_trial(self, spec: TrialSpec) -> None:
        """Record a trial before it starts, so that a resumed sweep starts it with the same knobs."""
        folder = self.trial_dir(spec.id)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"id": spec.id, "values": dict(spec.values), "params": dict(spec.params)}
        write_atomically(folder / "trial.json", json.dumps(to_record(content), indent=2))
        self.publish(folder / "trial.json")

    def read_trial(self, trial: str) -> TrialSpec | None:
        """Return a trial that was started; None where there is none of that id."""
        file = self.trial_dir(trial) / "trial.json"
        return read_trial(file) if file.is_file() else None

    def read_trials(self) -> list[TrialSpec]:
        """Return every trial that was ever started, by id."""
        return [read_trial(file) for file in self.trial_files()]

    def trial_files(self) -> list[Path]:
        """Return the record of every trial that was ever started, by id."""
        return sorted((self.path / "trials").glob("*/trial.json"), key=lambda file: by_number(file.parent.name))

    def publish(self, *paths: Path) -> None:
        """Bring what was written to where the run lies, if that is not this folder; all of it, if nothing is named.

        Raises:
            StorageError: It cannot be written.
        """
        if self.copy is not None:
            self.copy.publish(*map(self._key, paths))

    def bring(self, *paths: Path, wanted: Wanted = is_light_or_handed_on) -> None:
        """Take in what other processes have written below some paths; in a folder it is there already.

        Raises:
            StorageError: It cannot be read.
        """
        if self.copy is not None:
            self.copy.bring(*map(self._key, paths), wanted=wanted, is_exact=False)

    def remove(self, path: Path) -> None:
        """Delete a file of the run, if it is there.

        Raises:
            StorageError: It cannot be deleted.
        """
        if self.copy is None:
            path.unlink(missing_ok=True)
        else:
            self.copy.remove(self._key(path))

    def _key(self, path: Path) -> str:
        """Return a path as the store has it: a folder's ends in a slash."""
        key = path.relative_to(self.path).as_posix()
        is_file = path.is_file() or (not path.is_dir() and (path.suffix[1:].isalpha() or path.name.startswith(".")))
        return key if is_file else f"{key}/"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for writing.

        Raises:
            UserError: Another process holds it, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("a+")
        except OSError as error:
            raise UserError(
                f"{self.path}: the run folder cannot be written ({error.strerror}); give another --storage"
            ) from error
        with handle:
            if not _try_lock(handle.fileno()):
                raise UserError(
                    f"{self.path}: another rltune process works on this run; wait for it, or give another --name"
                )
            yield

    @property
    def is_locked(self) -> bool:
        """Whether a process works on the run now."""
        if self.copy is not None:
            return owner_of(self.copy.store) is not None
        lock_file = self.path / ".lock"
        if not lock_file.is_file():
            return False
        with lock_file.open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False


def by_number(trial: str) -> tuple[int, str]:
    """Return what to sort trials by: their ids are numbers, and have three digits only up to 999."""
    return len(trial), trial


def read_trial(file: Path) -> TrialSpec:
    """Return a trial from its record."""
    return from_record(TrialSpec, json.loads(file.read_text()), file)


def _try_lock(descriptor: int) -> bool:
    """Take the lock, trying for a second: ``rltune status`` holds it for a moment to see whether it is free."""
    for _ in range(10):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.1)
        else:
            return True
    return False
