"""``rltune export``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rltune.cli.terminal import console

if TYPE_CHECKING:
    from rltune.config.load import Experiment
    from rltune.export.trials import Exported
    from rltune.runs.layout import RunFolder
    from rltune.runs.results import TrialResult


def export_pick(run: Path, pick: str, formats: Sequence[str] = ()) -> None:
    """Export the LoRA that ``pick`` names, for diffusers if no format is named; say where it is and how to load it.

    Raises:
        UserError: There is no such run, pick or format.
        RunError: The LoRA could not be written, or is not the trained adapter when it is loaded again.
    """
    from rltune.export.picks import pick_trial
    from rltune.runs.record import read_run, standing_where_started

    folder, experiment = read_run(run)
    with standing_where_started(folder):
        _export(pick_trial(pick, folder, experiment), folder, experiment, formats)


def _export(result: "TrialResult", folder: "RunFolder", experiment: "Experiment", formats: Sequence[str]) -> None:
    from rltune.export.base import DEFAULT_FORMATS  # torch, which a wrong pick does without
    from rltune.export.trials import export_trials
    from rltune.training.quiet import quiet_libraries

    quiet_libraries()
    export_trials([result], folder, experiment, on_export=_show, formats=formats or DEFAULT_FORMATS)


def _show(exported: "Exported") -> None:
    *before, load = exported.how_to_load.splitlines()
    lines = [*before, f"{load}   # at weight 1.0"]
    console.print(
        f"trial {exported.trial}, {exported.format} -> {exported.folder}\n"
        f"{exported.proof}\n\n" + "\n".join(f"  {line}" for line in lines),
        soft_wrap=True,
    )
