"""``rltune builtin``: the recipe of the built-in model, and a look at its scenes."""

import random
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rltune.cli.terminal import console, errors
from rltune.errors import UserError


def train_model(output: Path, work: Path, *, seed: int, scale: float, device: str) -> None:
    """Run or resume the recipe with a progress bar, and print what was measured.

    Raises:
        UserError: The device is unknown or not there, or ``work`` holds another recipe's files.
    """
    import torch

    from rltune.builtin.card import figure_tables
    from rltune.builtin.recipe import train_builtin

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device: {device!r} is not here; write cpu, cuda where there is one, or auto")
    columns = (
        TextColumn("{task.description:>18}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Progress(*columns, console=errors) as progress:
        bars: dict[str, TaskID] = {}

        def show(stage: str, step: int, total: int, figures: dict[str, float]) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total, figures="")
            text = " ".join(f"{name} {value:.3g}" for name, value in figures.items())
            progress.update(bars[stage], completed=step, total=total, figures=text)

        measured = train_builtin(
            output, work_dir=work, seed=seed, scale=scale, device=torch.device(device), on_progress=show
        )
    console.print(figure_tables(measured), soft_wrap=True)
    console.print(f"weights and prompts are in {output}; learning curves and grids in {work}", soft_wrap=True)


def show_scenes(output: Path, *, count: int, seed: int) -> None:
    """Write a grid of scenes and print their captions in the grid's order.

    Raises:
        UserError: ``output`` cannot be written.
    """
    from rltune.cli.output_file import check_output

    check_output(output)
    from rltune.builtin.render import render
    from rltune.builtin.scenes import make_scene
    from rltune.training.evaluation import save_grid, to_uint8

    scenes = [make_scene(seed, index) for index in range(count)]
    save_grid(to_uint8(render(scenes)), output, columns=min(8, count))
    for index, scene in enumerate(scenes):
        console.print(f"{index:3d}  {scene.caption(random.Random(index))}", soft_wrap=True)
    console.print(f"{output}: {count} scenes, 8 a row", soft_wrap=True)
