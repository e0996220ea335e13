"""``rltune report``: a run as a page, or its figures as files."""

from pathlib import Path
from typing import Annotated

import typer

from rltune.cli.arguments import RunArgument, at_home
from rltune.cli.terminal import console
from rltune.errors import writing


def report(
    run: RunArgument,
    figures: Annotated[
        Path | None,
        typer.Option(help="Write the figures there, as PNG and SVG, instead of the page.", callback=at_home),
    ] = None,
) -> None:
    """Write report.html: the front to click on, with pictures, curves and settings of every trial, in one file."""
    make_report(run, figures)


def make_report(run: Path, figures: Path | None) -> None:
    """Write the page of a run, or its figures, and say where they are.

    Raises:
        UserError: There is no such run, its base model has no result yet, or the figures cannot be written there.
        StorageError: The page cannot be written.
    """
    from rltune.report.write import write_figures, write_report
    from rltune.runs.record import read_run

    folder, experiment = read_run(run)
    if figures is not None:
        written = write_figures(folder, experiment, figures)
        console.print(f"{len(written)} files in {figures}", soft_wrap=True)
        return
    with writing(folder.report_file):
        write_report(folder, experiment)
    console.print(str(folder.report_file if folder.copy else run / folder.report_file.name), soft_wrap=True)
