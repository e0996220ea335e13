"""A run as plain data: what a notebook, a plot or a spreadsheet asks of it. Reads the run folder, touches nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rltune.config.load import Experiment
from rltune.errors import UserError
from rltune.runs.fronts import front_as_dict, read_front
from rltune.runs.record import read_run
from rltune.runs.results import TrialResult, read_results
from rltune.runs.rows import read_metrics
from rltune.runs.status import RunStatus, read_status

if TYPE_CHECKING:
    import pandas as pd

Table = Literal["trials", "front", "curves"]


class Run:
    """A run folder, of a run that is finished, that goes on, or that was interrupted; every reading is of now.

    Args:
        path: The folder, such as ``runs/mix``.

    Raises:
        UserError: There is no run there, or a newer version of rltune started it.
        RunError: Its record cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self._folder, self._experiment = read_run(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run folder, absolute."""
        return self._folder.path

    @property
    def name(self) -> str:
        """Name of the run."""
        return self._folder.name

    @property
    def experiment(self) -> Experiment:
        """What was asked, with the defaults that held when the run was started."""
        return self._experiment

    @property
    def status(self) -> RunStatus:
        """Where the run stands: every trial with its state and step, and what has elapsed."""
        return read_status(self._folder, self._experiment)

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Trials that ended, in the order in which they did; the base model is ``000``.

        Each has ``trial``, ``state`` (``ok``, ``stopped`` or ``failed``), ``reason``, ``duration_s``, ``is_feasible``,
        its settings by dotted path, and its metrics: ``eval/NAME``, ``gain/NAME`` over the base model, and standard
        errors ``.._se``.
        """
        return [_row(result) for result in read_results(self._folder.results_file)]

    @property
    def front(self) -> dict[str, Any] | None:
        """The Pareto front as in ``front.json``; None while the base model has no result.

        ``members`` are best in the first objective first, soups last, each with ``trial``, ``kind``, ``values`` and
        ``metrics``; ``knee`` and ``best`` name trials; ``hypervolume`` is in the ``units`` above the
        ``reference_point``.
        """
        front = read_front(self._folder, self._experiment)
        return None if front is None else front_as_dict(front)

    @property
    def curves(self) -> list[dict[str, Any]]:
        """Rows of every trial's ``metrics.jsonl``: ``trial``, ``step``, ``train/..``; ``eval/..`` where it has them."""
        files = {spec.id: self._folder.trial_dir(spec.id) / "metrics.jsonl" for spec in self._folder.read_trials()}
        return [{"trial": trial, **row} for trial, file in files.items() for row in read_metrics(file)]

    @property
    def exports(self) -> dict[str, Path]:
        """Trial -> folder of its exported LoRA."""
        folders = sorted(self._folder.exports_dir.glob("*/rltune.json"))
        return {file.parent.name: file.parent for file in folders}

    def to_pandas(self, table: Table = "trials") -> "pd.DataFrame":
        """Return ``trials``, the members of the ``front``, or ``curves`` as a pandas DataFrame.

        Raises:
            UserError: There is no such table, or pandas is not installed.
        """
        if table not in ("trials", "front", "curves"):
            raise UserError(f"to_pandas: no such table, got {table!r}; write trials, front or curves")
        try:
            import pandas as pd
        except ImportError as error:
            raise UserError("to_pandas: pandas is not installed; pip install pandas") from error
        if table == "front":
            members = (self.front or {"members": []})["members"]
            return pd.DataFrame(
                [{"trial": m["trial"], "kind": m["kind"], **m["values"], **m["metrics"]} for m in members]
            )
        return pd.DataFrame(self.trials if table == "trials" else self.curves)


def _row(result: TrialResult) -> dict[str, Any]:
    about = {
        "trial": result.trial,
        "state": result.state,
        "reason": result.reason,
        "duration_s": result.duration_s,
        "is_feasible": result.is_feasible,
    }
    return {**about, **result.values, **result.metrics}
