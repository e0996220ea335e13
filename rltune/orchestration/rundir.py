"""A run's folder: where things lie, who may write to it, and what was asked. Everything else is rebuilt from it."""

import copy
import fcntl
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rltune
from rltune.config.load import Experiment, load_experiment
from rltune.errors import UserError
from rltune.training.events import EVENTS_FILE

LIBRARIES = ("ray", "torch", "diffusers", "transformers", "peft", "accelerate", "open_clip_torch", "optuna")
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
    """The layout of ``runs/NAME``."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def experiment_file(self) -> Path:
        """The experiment as resolved; feed it back to run it again."""
        return self.path / "experiment.yaml"

    @property
    def results_file(self) -> Path:
        """One line per trial that ended."""
        return self.path / "results.jsonl"

    @property
    def warm_start_file(self) -> Path:
        """What another run taught this one's search before its first trial, lines as in ``results_file``."""
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
    def confirmation_failure_file(self) -> Path:
        """Why fresh measurements failed."""
        return self.path / "confirm-failure.txt"

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
        text = json.dumps({"id": spec.id, "values": dict(spec.values), "params": dict(spec.params)}, indent=2)
        write_atomically(folder / "trial.json", text)

    def read_trial(self, trial: str) -> TrialSpec | None:
        """Return a trial that was started; None where there is none of that id."""
        file = self.trial_dir(trial) / "trial.json"
        return TrialSpec(**json.loads(file.read_text())) if file.is_file() else None

    def read_trials(self) -> list[TrialSpec]:
        """Return every trial that was ever started, by id."""
        return [read_trial(file) for file in self.trial_files()]

    def trial_files(self) -> list[Path]:
        """Return the record of every trial that was ever started, by id."""
        return sorted((self.path / "trials").glob("*/trial.json"), key=lambda file: by_number(file.parent.name))

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
        lock_file = self.path / ".lock"
        if not lock_file.is_file():
            return False
        with lock_file.open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def claim(self, experiment: Experiment) -> None:
        """Write the experiment into a new run folder, or check that the one there asks the same.

        Raises:
            UserError: The folder holds another experiment.
        """
        if self.experiment_file.is_file():
            before = load_experiment(self.experiment_file, must_find_files=False)
            if _question(before) != _question(experiment):
                raise UserError(
                    f"{self.experiment_file}: this run was started with other settings than {experiment.source} has "
                    "now; give another --name, or put the settings back to resume it"
                )
        write_atomically(self.experiment_file, _provenance() + experiment.to_yaml())


def by_number(trial: str) -> tuple[int, str]:
    """Return what to sort trials by: their ids are numbers, and have three digits only up to 999."""
    return len(trial), trial


def read_trial(file: Path) -> TrialSpec:
    """Return a trial from its record."""
    return TrialSpec(**json.loads(file.read_text()))


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


def open_run(path: Path) -> tuple[RunFolder, Experiment]:
    """Return a run folder and its experiment.

    Raises:
        UserError: There is no run at ``path``.
    """
    folder = RunFolder(path)
    if not folder.experiment_file.is_file():
        raise UserError(f"{path}: not a run folder, it has no experiment.yaml; name one such as runs/mix")
    return folder, load_experiment(folder.experiment_file, must_find_files=False)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new, never a part."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _question(experiment: Experiment) -> dict[str, Any]:
    """Return what an experiment asks, without how much of it to do and on what: those may change on a resume."""
    asked = copy.deepcopy(dict(experiment.raw))
    asked.pop("resources", None)
    asked.pop("name", None)
    asked.pop("track", None)
    asked.pop("stop", None)
    search = asked.pop("search", None) or {}
    for name in ("trials", "prune", "grace", "reduction"):
        search.pop(name, None)
    return {**asked, "search": search}


def _provenance() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines = [
        f"rltune {rltune.__version__}, git {_git_commit()}, Python {platform.python_version()}, {platform.platform()}",
        libraries,
        f"started {datetime.now(UTC).isoformat(timespec='seconds')}",
    ]
    return "".join(f"# {line}\n" for line in lines)


def _git_commit() -> str:
    command = ["git", "-C", str(Path(rltune.__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
