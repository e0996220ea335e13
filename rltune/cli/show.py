"""Commands that only read: ``status``, ``front``, ``estimators``."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Literal

import typer
from rich.table import Table

from rltune.cli.front_table import front_view
from rltune.cli.tables import headline, status_view, usage_view
from rltune.cli.terminal import console
from rltune.errors import UserError

FrontForm = Literal["table", "json", "csv"]


def show_status(run: Path, *, with_usage: bool = False) -> None:
    """Print the trial table of a run, or where its time went.

    Raises:
        UserError: There is no such run, or it noted nothing of its time.
    """
    from rltune.runs.record import read_run
    from rltune.runs.status import read_status

    folder, experiment = read_run(run)
    status = read_status(folder, experiment)
    if not with_usage:
        console.print(status_view(status, experiment.shared.objective_names))
        return
    if status.usage is None:
        what = f"nothing is known of its time, got no {folder.events_file.name}"
        raise UserError(f"{run}: {what}; it is written while a run runs")
    console.print(headline(status))
    console.print(usage_view(status.usage))


def show_front(run: Path, *, objectives: Sequence[str] = (), where: Sequence[str] = (), form: FrontForm) -> None:
    """Print the Pareto front of a run.

    Args:
        run: Its folder.
        objectives: What it is over; the experiment's if left out.
        where: Conditions that its trials meet.
        form: As a table for readers, or as JSON or CSV for programs.

    Raises:
        UserError: The base model has no result yet, or something named was not measured.
    """
    from rltune.runs.fronts import front_as_csv, front_as_dict, read_front
    from rltune.runs.record import read_run

    folder, experiment = read_run(run)
    front = read_front(folder, experiment, objectives=objectives, where=where)
    if front is None:
        raise UserError(
            f"{run}: the base model has no result yet, so there is no front; see: rltune status {quote(str(run))}"
        )
    if form == "json":
        typer.echo(json.dumps(front_as_dict(front), indent=2))
    elif form == "csv":
        typer.echo(front_as_csv(front), nl=False)
    else:
        console.print(front_view(front, where=where))


def show_estimators() -> None:
    """Print every estimator with its paper, what it needs of a reward, and its options with their defaults."""
    from rltune.estimators.base import ESTIMATORS

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("estimator", "arXiv", "reward must", "what it does", "options"):
        table.add_column(title)
    for name in ESTIMATORS.names():
        kind = ESTIMATORS.get(name)
        needs = "have a gradient" if getattr(kind, "needs_gradient", True) else "be a number"
        paper = re.search(r"arXiv:([0-9.]+)", sys.modules[kind.__module__].__doc__ or "")
        shown = ", ".join(
            f"{option.name}: {'-' if option.default is None else option.default}" for option in ESTIMATORS.options(name)
        )
        table.add_row(name, paper[1] if paper else "", needs, first_line(kind.__doc__), shown)
    console.print(table)
    console.print(
        "\nk, draw and std stand in the estimator section itself, the others in its options. Estimators whose reward "
        "need only be a number want sampler.eta above 0.",
        style="dim",
    )


def first_line(text: str | None) -> str:
    """Return the first line of a docstring, as plain words."""
    return ((text or "").replace("``", "").strip().splitlines() or [""])[0]
