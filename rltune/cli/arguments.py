"""Arguments and options that several commands have."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer


def at_home(value: Any) -> Any:
    """Spell out the ``~`` of paths: the shell leaves that of ``--storage=~/runs`` as it is."""
    if isinstance(value, list):
        return [at_home(item) for item in value]
    return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value


ExperimentArgument = Annotated[
    Path, typer.Argument(help="Experiment file (YAML).", show_default=False, callback=at_home)
]
RunArgument = Annotated[
    Path, typer.Argument(help="Run folder, such as runs/mix.", show_default=False, callback=at_home)
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: --set optim.lr=1e-3. Repeatable.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(help="Ray cluster to attach to, HOST:PORT. Else RAY_ADDRESS, else a local one, else start one."),
]
NameOption = Annotated[str | None, typer.Option(help="Name of the run; the experiment's own if left out.")]
StorageOption = Annotated[
    Path, typer.Option(help="Folder that holds run folders; shared, if the cluster has nodes.", callback=at_home)
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and start nothing.")]
