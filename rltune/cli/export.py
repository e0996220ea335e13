"""``rltune export``."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rltune.cli.arguments import RunArgument
from rltune.cli.terminal import console

if TYPE_CHECKING:
    from rltune.config.load import Experiment
    from rltune.export.write import Exported
    from rltune.runs.layout import RunFolder
    from rltune.runs.mixtures import Mixture
    from rltune.runs.results import TrialResult


def export(
    run: RunArgument,
    pick: Annotated[str, typer.Option(help="knee, best:OBJECTIVE, a trial, or a soup.")] = "knee",
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="Whose files: diffusers if left out, comfyui, peft, or fused, a whole pipeline. Repeatable.",
        ),
    ] = None,
    push: Annotated[str | None, typer.Option(help="Upload the folder to OWNER/NAME of the Hugging Face hub.")] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let all read what --push makes; else it is private.")
    ] = False,
) -> None:
    """Write a trial's LoRA as files that other tools load, load them again and compare before saying so."""
    export_pick(run, pick, formats or [], push=push, is_public=public)


def export_pick(
    run: Path, pick: str, formats: Sequence[str] = (), *, push: str | None = None, is_public: bool = False
) -> None:
    """Export the LoRA that ``pick`` names, for diffusers if no format is named; say where it is and how to load it.

    Args:
        run: Its folder.
        pick: ``knee``, ``best:OBJECTIVE``, a trial or a soup of the front.
        formats: Names of export formats.
        push: Repository of the Hugging Face hub that receives the folder; none if left out.
        is_public: Whether a new one can be read by all.

    Raises:
        UserError: There is no such run, pick or format, or the hub wants a token.
        RunError: The LoRA could not be written, or is not the trained adapter when it is loaded again.
    """
    from rltune.export.picks import pick_soup, pick_trial
    from rltune.runs.record import read_run, standing_where_started

    folder, experiment = read_run(run)
    with standing_where_started(folder):
        soup = pick_soup(pick, folder)
        picked = pick_trial(pick, folder, experiment) if soup is None else soup
        if push is not None:
            from rltune.export.push import check_push

            check_push(push, "lora" if soup is not None else experiment.concrete(picked.values).model.adapter.kind)
        _export(picked, folder, experiment, formats)
    if push is not None:
        _push(folder.exports_dir / _name_of(picked), push, is_public=is_public)


def _name_of(picked: "TrialResult | Mixture") -> str:
    from rltune.runs.mixtures import Mixture

    return picked.name if isinstance(picked, Mixture) else picked.trial


def _push(place: Path, repo: str, *, is_public: bool) -> None:
    from rltune.export.push import push_folder

    pushed = push_folder(place, repo, is_private=not is_public)
    who = "private" if pushed.is_private else "public"
    console.print(f"\nuploaded to {pushed.url}, which is {who}:", soft_wrap=True)
    for name in pushed.files:
        console.print(f"  {name}  {(place / name).stat().st_size / 1e6:.3g} MB", soft_wrap=True)


def _export(
    picked: "TrialResult | Mixture", folder: "RunFolder", experiment: "Experiment", formats: Sequence[str]
) -> None:
    from rltune.export.soup import export_soup  # torch, which a wrong pick does without
    from rltune.export.trials import export_trials
    from rltune.runs.mixtures import Mixture
    from rltune.runs.results import read_results
    from rltune.training.quiet import quiet_libraries

    quiet_libraries()
    if isinstance(picked, Mixture):
        trials = {result.trial: result for result in read_results(folder.results_file)}
        export_soup(picked, trials, folder, experiment, on_export=partial(_show, picked.name), formats=formats)
    else:
        told = partial(_show, f"trial {picked.trial}")
        export_trials([picked], folder, experiment, on_export=told, formats=formats)
    if folder.copy is not None:
        console.print(f"\nkept at {folder.copy.store.at(f'exports/{_name_of(picked)}')}", soft_wrap=True)


def _show(called: str, exported: "Exported") -> None:
    *before, load = exported.how_to_load.splitlines()
    lines = [*before, f"{load}   # at weight 1.0" if not load.startswith("rltune ") else load]
    console.print(
        f"{called}, {exported.format} -> {exported.folder}\n"
        f"{exported.proof}\n\n" + "\n".join(f"  {line}" for line in lines),
        soft_wrap=True,
    )
