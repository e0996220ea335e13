"""``rltune rewards finetune``: a reward's head against images whose object or ground is another."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rltune.cli.arguments import DeviceOption, RewardOption, at_home
from rltune.cli.terminal import console
from rltune.errors import UserError

if TYPE_CHECKING:
    from rltune.rewards.aesthetic import Aesthetic
    from rltune.rewards.finetune import FineTuned

NUM_SCENES = 2048
SEED = 1
"""Of the built-in scenes; an audit's are those of another."""
BATCH = 64
SUFFIXES = {"aesthetic": ".safetensors", "laion_aesthetic": ".pth"}
"""Rewards that are a head on CLIP features -> what a file of theirs ends in."""


def finetune(
    name: Annotated[str, typer.Argument(help="aesthetic or laion_aesthetic.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the head to write.", callback=at_home)],
    images: Annotated[
        Path | None, typer.Option(help="Folder of images; else built-in scenes.", callback=at_home)
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="Folder of their objects, white on black, under the same names.", callback=at_home),
    ] = None,
    options: RewardOption = None,
    weight: Annotated[float, typer.Option(min=0, help="Of replaced images beside images as they are.")] = 1.0,
    floor: Annotated[
        float, typer.Option(min=0, max=1, help="Quantile of the scores that an image without its object gets.")
    ] = 0.05,
    steps: Annotated[int, typer.Option(min=10, help="Steps of 256 images.")] = 1500,
    lr: Annotated[float, typer.Option(min=1e-8, max=1, help="Peak learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of what is replaced with what, and of batches.")] = 0,
    device: DeviceOption = None,
) -> None:
    """Fine-tune the head of a reward on images with object or ground replaced, and write it."""
    from rltune.cli.output_file import check_place
    from rltune.cli.rewards import device_of
    from rltune.rewards.finetune import Settings, fine_tune, read_features
    from rltune.training.quiet import quiet_libraries

    quiet_libraries()
    if (images is None) != (masks is None):
        raise UserError("--masks: give --images and --masks, two folders, or neither for built-in scenes")
    reward = _head_of(name, options or [])
    if output.suffix != SUFFIXES[name]:
        raise UserError(f"--output: the head is a {SUFFIXES[name]} file, got {str(output)!r}")
    check_place(output, f"head{SUFFIXES[name]}")
    batches = _scenes(seed) if images is None or masks is None else _pictures(*_pairs(images, masks), seed)
    where = device_of(device)
    reward.to(where)
    features = read_features(reward, batches, where)
    settings = Settings(weight=weight, floor=floor, steps=steps, lr=lr, seed=seed)
    found = fine_tune(reward, features, settings)
    found.reward.save(output)
    console.print(_table(found))
    console.print(f"head: {output}", soft_wrap=True)


def _head_of(name: str, options: list[str]) -> "Aesthetic":
    from rltune.cli.rewards import read_options
    from rltune.rewards.base import REWARDS

    if name not in SUFFIXES:
        raise UserError(f"reward {name!r}: is no head on CLIP features; give {' or '.join(SUFFIXES)}")
    given = read_options(options)
    REWARDS.check(name, given)
    reward: Aesthetic = REWARDS.get(name)(**given)
    return reward


def _scenes(seed: int) -> Iterator[tuple[Any, Any]]:
    from rltune.builtin.render import object_masks, render
    from rltune.builtin.scenes import make_scenes

    scenes, _ = make_scenes(SEED, NUM_SCENES, is_heldout=False)
    for picks in _shuffled(NUM_SCENES, seed):
        part = [scenes[i] for i in picks]
        yield render(part), object_masks(part)


def _pairs(images: Path, masks: Path) -> tuple[list[Path], list[Path]]:
    """Return the images of a folder, and the mask of each in the other."""
    from rltune.rewards.references import SUFFIXES as KINDS

    for option, folder in (("--images", images), ("--masks", masks)):
        if not folder.is_dir():
            raise UserError(f"{option}: there is no folder {folder}")
    found = sorted(path for path in images.iterdir() if path.suffix.lower() in KINDS)
    painted = {path.stem: path for path in masks.iterdir() if path.suffix.lower() in KINDS}
    if not found:
        raise UserError(f"--images: {images} holds none ({', '.join(KINDS)})")
    if missing := [path.name for path in found if path.stem not in painted]:
        names = ", ".join(missing[:3]) + (" and more" if len(missing) > 3 else "")
        raise UserError(f"--masks: {masks} has none of {names}; a mask has the name of its image")
    return found, [painted[path.stem] for path in found]


def _pictures(images: list[Path], masks: list[Path], seed: int) -> Iterator[tuple[Any, Any]]:
    from rltune.cli.audit import read_masks
    from rltune.cli.rewards import read_images

    for picks in _shuffled(len(images), seed):
        batch, _ = read_images([images[i] for i in picks], [""])
        yield batch, read_masks([masks[i] for i in picks], batch)


def _shuffled(number: int, seed: int) -> Iterator[list[int]]:
    """Yield numbers below another, shuffled, in batches of two or more."""
    import torch

    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    for picks in order.tensor_split(max(1, -(-number // BATCH))):
        yield picks.tolist()


def _table(found: "FineTuned") -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("held-out images", "before", "after"):
        table.add_column(title, justify="left" if title.startswith("held") else "right")
    labels = ("score", "with another object", "with another ground")
    for label, old, new in zip(labels, found.before.scores, found.after.scores, strict=True):
        table.add_row(label, f"{old:.4g}", f"{new:.4g}")
    table.add_row("loss", f"{found.before.loss:.3g}", f"{found.after.loss:.3g}")
    table.add_row("of the old score", f"{found.before.explained:.0%}", f"{found.after.explained:.0%}")
    return table
