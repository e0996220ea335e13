"""Arguments and options that several commands have."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from rltune.errors import UserError
from rltune.runs.addresses import as_folder, is_address


def place(text: str) -> Any:
    """Return where a run lies or is to lie: a path, or an address as it was written."""
    return text if is_address(text) else Path(os.path.expanduser(text))


def at_home(value: Any, parameter: typer.CallbackParam) -> Any:
    """Spell out the ``~`` of paths: the shell leaves that of ``--storage=~/runs`` as it is.

    Raises:
        UserError: A path is an address.
    """
    if isinstance(value, list):
        return [at_home(item, parameter) for item in value]
    if isinstance(value, Path):
        name = parameter.opts[0]
        is_option = name.startswith("-")
        as_folder(value, name if is_option else name.upper(), is_read=not is_option and parameter.nargs == -1)
    return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value


ExperimentArgument = Annotated[
    Path, typer.Argument(help="Experiment file (YAML).", show_default=False, callback=at_home)
]
RunArgument = Annotated[
    Path,
    typer.Argument(
        help="Run folder, such as runs/mix or s3://bucket/runs/mix.", metavar="RUN", show_default=False, parser=place
    ),
]
"""A path, or the text of an address."""
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: --set optim.lr=1e-3. Repeatable.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to attach to: HOST:PORT, auto, or local to start one. Else RAY_ADDRESS, else one that runs "
        "here, else start one."
    ),
]
NameOption = Annotated[str | None, typer.Option(help="Name of the run; the experiment's own if left out.")]
StorageOption = Annotated[
    Path,
    typer.Option(
        help="Holds run folders: a folder, shared if the cluster has nodes, or s3://BUCKET/FOLDER, gs://..",
        parser=place,
    ),
]
"""A path, or the text of an address."""
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan and start nothing.")]

RewardArgument = Annotated[str, typer.Argument(help="A reward, or module:name of your own.", show_default=False)]
ImageOption = Annotated[
    list[Path] | None, typer.Option("--image", help="Image to score; repeatable.", callback=at_home)
]
PromptOption = Annotated[list[str] | None, typer.Option("--prompt", help="Its prompt; one for all, or one each.")]
RewardOption = Annotated[
    list[str] | None, typer.Option("--option", help="Option of the reward: --option target=3. Repeatable.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda; cuda if there is one.")]


def names_of(text: str | None) -> tuple[str, ...]:
    """Return the names that stand in a text with commas between."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def numbers_of(text: str, option: str) -> tuple[float, ...]:
    """Return the numbers that stand in a text with commas between.

    Raises:
        UserError: There is none, or one is no finite number.
    """
    try:
        numbers = tuple(float(part) for part in text.split(","))
        if not all(-1e6 < number < 1e6 for number in numbers):
            raise ValueError
    except ValueError:
        raise UserError(f"{option}: must be numbers with commas between, got {text!r}; write 0,0.5,1") from None
    return numbers
