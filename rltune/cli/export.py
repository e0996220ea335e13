"""``rltune export``."""

from pathlib import Path
from typing import TYPE_CHECKING

from rltune.cli.terminal import console

if TYPE_CHECKING:
    from rltune.export.picks import Exported


def export_pick(run: Path, pick: str) -> None:
    """Export the LoRA that ``pick`` names and say where it is and how to load it."""
    from rltune.export.picks import export_trials, pick_trial
    from rltune.runs.record import read_run, standing_where_started
    from rltune.training.quiet import quiet_libraries

    quiet_libraries()
    folder, experiment = read_run(run)
    with standing_where_started(folder):
        export_trials([pick_trial(pick, folder, experiment)], folder, experiment, on_export=_show)


def _show(exported: "Exported") -> None:
    console.print(
        f"trial {exported.trial} -> {exported.folder}\n"
        f"{exported.proof}\n\n"
        f"  pipeline.load_lora_weights({str(exported.folder)!r})   # at weight 1.0",
        soft_wrap=True,
    )
