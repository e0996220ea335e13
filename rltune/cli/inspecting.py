"""Commands that only read: ``status``, ``front``, ``rewards``."""

from pathlib import Path

from rich.table import Table

from rltune.cli.tables import front_view, status_view
from rltune.cli.terminal import console
from rltune.errors import UserError


def show_status(run: Path) -> None:
    """Print the trial table of a run."""
    from rltune.orchestration.status import read_status
    from rltune.orchestration.sweep import open_run

    folder, experiment = open_run(run)
    console.print(status_view(read_status(folder, experiment), experiment.shared.objective_names))


def show_front(run: Path) -> None:
    """Print the Pareto front of a run.

    Raises:
        UserError: The base model has no result yet.
    """
    from rltune.orchestration.sweep import open_run, read_front

    folder, experiment = open_run(run)
    front = read_front(folder, experiment)
    if front is None:
        raise UserError(f"{run}: the base model has no result yet, so there is no front; see 'rltune status {run}'")
    console.print(front_view(front))


def show_rewards() -> None:
    """Print every reward with what it is."""
    from rltune.rewards.base import REWARDS

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("reward")
    table.add_column("what it says")
    for name in REWARDS.names():
        summary = (REWARDS.get(name).__doc__ or "").replace("``", "").strip().splitlines()
        table.add_row(name, summary[0] if summary else "")
    console.print(table)
