"""``rltune rewards audit``: what a reward's scores hang on, the object or the ground."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rltune.cli.arguments import DeviceOption, ImageOption, PromptOption, RewardArgument, RewardOption, at_home
from rltune.cli.terminal import console, marked
from rltune.errors import UserError

if TYPE_CHECKING:
    from rltune.rewards.audit import Audit

NUM_SCENES = 64
SHOWN = 6
"""Images in the picture."""
WORDS = {"image": "another image", "colour": "plain colour"}
"""Of what a part is replaced by; the colour is the mean of the rest."""


def audit(
    name: RewardArgument,
    images: ImageOption = None,
    masks: Annotated[
        list[Path] | None, typer.Option("--mask", help="Its object, white on black; one each.", callback=at_home)
    ] = None,
    prompts: PromptOption = None,
    options: RewardOption = None,
    device: DeviceOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG to write, with what was scored.", callback=at_home)
    ] = None,
) -> None:
    """Replace the object or the ground of images, or of 64 built-in scenes, and say what the scores hang on."""
    from rltune.cli.output_file import check_output, save_picture
    from rltune.cli.rewards import device_of, section_of
    from rltune.rewards.audit import audit as measured
    from rltune.training.quiet import quiet_libraries
    from rltune.training.rewards import build_reward

    quiet_libraries()
    section, where = section_of(name, options or []), device_of(device)
    batch, objects, texts = _batch(images or [], masks or [], prompts or [])
    if output is not None:
        check_output(output)
    found = measured(name, build_reward(name, section).to(where), batch.to(where), objects.to(where), texts)
    console.print(_table(found))
    console.print("the object's share is")
    for figure, of in _facts(found):
        console.print(marked(f"{figure:>10}", "bold", of), soft_wrap=True)
    if output is not None:
        console.print(f"picture: {save_picture(_picture(found, batch, objects), output)}", soft_wrap=True)


def _batch(images: Sequence[Path], masks: Sequence[Path], prompts: Sequence[str]) -> tuple[Any, Any, list[str]]:
    """Return images ``(B, 3, H, W)``, bool masks of their objects ``(B, 1, H, W)``, and a prompt each."""
    from rltune.builtin.render import object_masks, render
    from rltune.builtin.scenes import distinct_scenes
    from rltune.cli.rewards import read_images

    if len(masks) != len(images):
        raise UserError(f"--mask: give one an image ({len(images)}), got {len(masks)}; paint the object white on black")
    if not images:
        if prompts:
            raise UserError(
                f"--prompt: the built-in scenes have theirs, got {prompts[0]!r}; give --image and --mask too"
            )
        scenes = distinct_scenes(0, NUM_SCENES, is_heldout=True)
        return render(scenes), object_masks(scenes), [scene.caption(random.Random(i)) for i, scene in enumerate(scenes)]
    batch, texts = read_images(images, prompts)
    return batch, read_masks(masks, batch), texts


def read_masks(paths: Sequence[Path], images_B3HW: Any) -> Any:
    """Return files of masks as bool ``(B, 1, H, W)``, of the size of their images.

    Raises:
        UserError: A file is no image, or of another size.
    """
    import torch

    from rltune.rewards.references import read_image

    painted = [read_image(path).mean(0, keepdim=True) > 0.5 for path in paths]
    for path, mask in zip(paths, painted, strict=True):
        if mask.shape[1:] != images_B3HW.shape[2:]:
            sizes = [f"{side.shape[-1]} x {side.shape[-2]}" for side in (images_B3HW, mask)]
            raise UserError(f"mask: {path} must be as large as its image, {sizes[0]}, got {sizes[1]}")
    return torch.stack(painted)


def _table(found: "Audit") -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("replaced", "by", "score", "change", "rms", "correlation"):
        table.add_column(title, justify="left" if title in ("replaced", "by") else "right")
    own = found.scores_B
    table.add_row("nothing", "", f"{own.mean():.4g}", "", f"({own.std():.3g} spread)", "")
    for change in found.changes:
        error = "" if change.half is None else f" ± {change.half:.2g}"
        follows = "no spread" if change.correlation is None else f"{change.correlation:+.2f}"
        score = f"{own.mean() + change.mean:.4g}"
        table.add_row(
            change.part, WORDS[change.fill], score, f"{change.mean:+.3g}{error}", f"{change.rms:.3g}", follows
        )
    return table


def _facts(found: "Audit") -> list[tuple[str, str]]:
    """Return figures, as they are shown in front, with what they are of."""
    facts = [(f"{found.area:.0%}", "of the pixels")]
    for fill, (share, half) in found.shares.items():
        error = "" if half is None else f" ± {100 * half:.0f}"
        facts.append((f"{100 * share:.0f}{error}%", f"of squared changes, by {WORDS[fill]}"))
    if found.gradient is not None:
        facts.append((f"{found.gradient:.0%}", "of the squared gradient, which training follows"))
    return facts


def _picture(found: "Audit", images: Any, objects: Any) -> Any:
    from rltune.rewards.audit import VERSIONS, replaced
    from rltune.training.evaluation import to_uint8
    from rltune.training.grids import labelled_grid

    shown = [images, *(replaced(images, objects, *version) for version in VERSIONS)]
    means = [found.scores_B.mean(), *found.versions_VB.mean(axis=1)]
    names = ["as they are", *(f"{part}: {WORDS[fill]}" for part, fill in VERSIONS)]
    labels = [f"{name}, {mean:.3g}" for name, mean in zip(names, means, strict=True)]
    rows = [to_uint8(version[:SHOWN]) for version in shown]
    return labelled_grid(rows, labels, ["Replaced, and the mean score of all"], num_images=len(rows[0]))
