"""``rltune report``: a run as a page, or its figures as files."""

from pathlib import Path

from rltune.cli.terminal import console
from rltune.errors import writing


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
