"""Optional trackers: what a trial writes into ``metrics.jsonl`` also goes to TensorBoard, W&B or MLflow, by step.

accelerate drives the tools. None of them may end a trial: one that fails is left out for the rest of it, with a notice.
"""

import fcntl
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from rltune.config.experiment import RunConfig
from rltune.errors import UserError
from rltune.redaction import redact
from rltune.runs.events import EVENTS_FILE, NOTICE, append_event
from rltune.runs.rows import MetricsFile

logger = logging.getLogger(__name__)

T = TypeVar("T")
IDS_FILE = "trackers.json"
"""In a trial's folder: the names under which tools know the trial, so that a resumed one goes on there."""
SAMPLES = "samples"


class Tracker(Protocol):
    """Where figures go; may raise anything."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the figures of a step."""
        ...

    def log_picture(self, name: str, file: Path, step: int) -> None:
        """Take a PNG of a step."""
        ...

    def finish(self) -> None:
        """Write what is left; nothing comes after it."""
        ...


@dataclass(frozen=True)
class Trial:
    """What a tracker is told of a trial before its first figure."""

    run: str
    trial: str
    folder: Path
    run_dir: Path
    """Where tools that write files put them."""
    knobs: Mapping[str, Any]
    objectives: Sequence[str]
    resume_step: int
    """Steps done before; those after it are done again, and should not be seen twice."""

    @property
    def name(self) -> str:
        """The trial's name among those of all runs."""
        return f"{self.run}/{self.trial}"

    def recall(self, tool: str) -> str | None:
        """Return the trial's identity in a tool, as it was remembered; None the first time."""
        return self._ids().get(tool)

    def remember(self, tool: str, identity: str) -> str:
        """Keep the trial's identity in a tool, and return it."""
        unfinished = self.folder / f"{IDS_FILE}.partial"
        unfinished.write_text(json.dumps({**self._ids(), tool: identity}))
        unfinished.replace(self.folder / IDS_FILE)
        return identity

    def _ids(self) -> dict[str, str]:
        path = self.folder / IDS_FILE
        return dict(json.loads(path.read_text())) if path.is_file() else {}


class TensorBoard:
    """Event files in ``RUN/tensorboard/TRIAL``; a resumed trial takes back the steps after its checkpoint."""

    def __init__(self, trial: Trial) -> None:
        from accelerate.tracking import TensorBoardTracker

        root = trial.run_dir / "tensorboard"
        self._tracker = TensorBoardTracker(trial.trial, str(root), purge_step=trial.resume_step + 1)
        self._tracker.start()
        if trial.knobs and trial.resume_step == 0:
            self._write_knobs(trial)

    def _write_knobs(self, trial: Trial) -> None:
        # accelerate's store_init_configuration would open a second run, named by the time, for them alone
        from torch.utils.tensorboard.summary import hparams

        values = {
            path: value if isinstance(value, bool | int | float) else str(value) for path, value in trial.knobs.items()
        }
        writer = self._tracker.writer.file_writer
        for summary in hparams(values, {f"eval/{name}": 0.0 for name in trial.objectives}):
            writer.add_summary(summary)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        self._tracker.log(dict(values), step=step)

    def log_picture(self, name: str, file: Path, step: int) -> None:
        """Write an image."""
        self._tracker.log_images({name: _pixels(file)[None]}, step=step, dataformats="NHWC")

    def finish(self) -> None:
        """Close the file."""
        self._tracker.finish()


class WeightsAndBiases:
    """A run of W&B, grouped by sweep. A resumed trial goes on in it; W&B itself refuses steps that it has."""

    def __init__(self, trial: Trial) -> None:
        from accelerate.tracking import WandBTracker

        self._tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", "rltune"),
            name=trial.name,
            group=trial.run,
            id=trial.recall("wandb") or trial.remember("wandb", uuid.uuid4().hex),
            resume="allow",
            dir=str(trial.run_dir),
            settings={"silent": True, "console": "off"},
        )
        self._tracker.start()
        self._tracker.run.config.update(dict(trial.knobs), allow_val_change=True)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log figures."""
        self._tracker.log(dict(values), step=step)

    def log_picture(self, name: str, file: Path, step: int) -> None:
        """Log an image."""
        self._tracker.log_images({name: [_pixels(file)]}, step=step)

    def finish(self) -> None:
        """Wait until all is written or sent."""
        self._tracker.finish()


class MLflow:
    """A run of MLflow in an experiment named as the sweep; in ``RUN/mlflow.db`` unless ``MLFLOW_TRACKING_URI`` says.

    MLflow keeps every value that it is given, so a resumed trial leaves out steps that are there: they come out as
    they were.
    """

    def __init__(self, trial: Trial) -> None:
        import mlflow
        from accelerate.tracking import MLflowTracker

        own = f"sqlite:///{trial.run_dir / 'mlflow.db'}"
        # set_tracking_uri writes the variable too: the process's next trial finds ours there, and so would we below
        is_own = os.environ.get("MLFLOW_TRACKING_URI", own) == own
        if is_own:
            mlflow.set_tracking_uri(own)
        # one trial at a time: two that make the same data base or experiment at once would trip over each other
        with (trial.run_dir / ".mlflow.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = trial.recall("mlflow")
            self._tracker = MLflowTracker(
                trial.run,
                logging_dir=str(trial.run_dir / "mlflow") if is_own else None,
                run_id=known,
                run_name=trial.name,
            )
            self._tracker.start()
        run = self._tracker.tracker
        self._last = self._last_step(run.info.run_id) if known else 0
        if not known:
            trial.remember("mlflow", run.info.run_id)
            self._tracker.store_init_configuration(dict(trial.knobs))

    def _last_step(self, run_id: str) -> int:
        from mlflow import MlflowClient

        history = MlflowClient().get_metric_history(run_id, "step_s")
        return max((point.step for point in history), default=0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log figures of a step that is not there yet."""
        if step > self._last:
            self._tracker.log(dict(values), step=step)

    def log_picture(self, name: str, file: Path, step: int) -> None:
        """Keep the image among the run's files."""
        if step > self._last:
            self._tracker.log_artifact(str(file), artifact_path=name)

    def finish(self) -> None:
        """End the run."""
        self._tracker.finish()


TRACKERS: Mapping[str, Callable[[Trial], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
"""By the name in an experiment, which is also the name of the package."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        UserError: One is not.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise UserError(
            f'track: {", ".join(missing)} {are} not installed; pip install "rltune[track]", or leave it out'
        )


class TrackedMetrics:
    """A trial's rows: each into ``metrics.jsonl`` first, then to every tracker that still works."""

    def __init__(self, metrics_file: MetricsFile, config: RunConfig, trial_dir: Path, *, resume_step: int) -> None:
        self._file = metrics_file
        self._trial_dir = trial_dir
        self._trackers: dict[str, Tracker] = {}
        if not config.track:
            return
        trial = _describe(config, trial_dir, resume_step)
        for name in config.track:
            tracker = self._try(name, partial(TRACKERS[name], trial))
            if tracker is not None:
                self._trackers[name] = tracker

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row."""
        self._file.write(row)
        step = int(row["step"])
        figures = {name: value for name, value in row.items() if name != "step"}
        picture = self._trial_dir / SAMPLES / f"step-{step:06d}.png"
        has_picture = any(name.startswith("eval/") for name in row) and picture.is_file()
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.log, figures, step))
            if has_picture and name in self._trackers:
                self._try(name, partial(tracker.log_picture, SAMPLES, picture, step))

    def amend(self, step: int, more: Mapping[str, float]) -> None:
        """Add to the row of a step that is there already; trackers get the addition alone."""
        self._file.amend(step, more)
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.log, dict(more), step))

    def close(self) -> None:
        """Finish the trackers; close the file."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.finish)
        self._file.close()

    def _try(self, name: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:  # noqa: BLE001  # whatever a tool raises, the trial is worth more than its plots
            self._trackers.pop(name, None)
            what = " ".join(str(error).split()) or type(error).__name__
            text = f"track: {name} failed ({redact(what)[:300]}); it has no more of this trial, metrics.jsonl has all"
            logger.warning("%s: %s", self._trial_dir, text)
            append_event(self._trial_dir / EVENTS_FILE, NOTICE, text=text)
            return None


def _describe(config: RunConfig, trial_dir: Path, resume_step: int) -> Trial:
    """Return what is to be said of a trial, from where it lies: ``RUN/trials/TRIAL``, and its ``trial.json``."""
    run_dir = trial_dir.parent.parent if trial_dir.parent.name == "trials" else trial_dir.parent
    knobs: Mapping[str, Any] = {}
    with suppress(OSError):
        knobs = json.loads((trial_dir / "trial.json").read_text())["values"]
    return Trial(
        run=run_dir.name,
        trial=trial_dir.name,
        folder=trial_dir,
        run_dir=run_dir.resolve(),
        knobs=knobs or _flat(config.model_dump(mode="json", exclude={"name", "search", "resources", "track"})),
        objectives=config.objective_names,
        resume_step=resume_step,
    )


def _pixels(file: Path) -> npt.NDArray[np.uint8]:
    """Return a picture, rows x columns x RGB."""
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a mapping of mappings with dotted paths as keys."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
