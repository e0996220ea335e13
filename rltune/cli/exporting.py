"""``rltune export``."""

from pathlib import Path

from rltune.cli.terminal import console


def export_pick(run: Path, pick: str) -> None:
    """Export the LoRA that ``pick`` names and say where it is and how to load it."""
    from rltune.orchestration.exporting import export_trial, pick_trial
    from rltune.orchestration.job import quiet_libraries
    from rltune.orchestration.record import open_run, standing_where_started

    quiet_libraries()
    folder, experiment = open_run(run)
    with standing_where_started(folder):
        exported = export_trial(pick_trial(pick, folder, experiment), folder, experiment)
    console.print(
        f"trial {exported.trial} -> {exported.folder}\n"
        f"reloaded with diffusers and compared: images agree to {exported.difference:.1g} of 1\n\n"
        f'  pipeline.load_lora_weights("{exported.folder}")   # at weight 1.0',
        soft_wrap=True,
    )
