"""Image grids of trials, made small enough for one page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rltune.canvas import as_read
from rltune.report.gather import Gathered, recorded_prompts
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.results import TrialResult

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

BUDGET = 6_500_000
"""Characters of all pictures together: base64, a third more than bytes."""
SIZES_PX = (256, 160, 96, 64)
"""Largest side of a picture: the first at which the base model's and the front's fit into half of the budget."""
GRID_PROMPTS = 8
"""Prompts that a trial draws into its grid, as ``training`` does."""
ROW_PROMPTS = 4
QUALITY = 88


@dataclass(frozen=True)
class Layout:
    """How a grid is cut into pictures; those of a prompt follow each other."""

    prompts: tuple[str, ...]
    """Empty where the run's copy of them is gone."""
    per_prompt: int
    """Pictures of a prompt; in inpainting the first is what was given."""
    num_prompts: int
    columns: int
    rows: int


@dataclass(frozen=True)
class Album:
    """The grids that go into a page."""

    layout: Layout
    sheets: dict[str, str]
    """Trial -> its grid, as the address of an image that is in the address."""
    num_left_out: int
    """Trials whose grid found no room."""


@dataclass
class Shrinker:
    """Reads grids and makes them small; remembers, so that a page that is written again costs what is new."""

    _known: dict[tuple[Path, int, int, int], str] = field(default_factory=dict)

    def __call__(self, path: Path, layout: Layout, size_px: int) -> str:
        """Return a grid as a ``data:`` address; empty where it cannot be read."""
        from PIL import Image

        try:
            stat = path.stat()
            key = (path, stat.st_mtime_ns, stat.st_size, size_px)
            if key not in self._known:
                with Image.open(path) as found:
                    picture = found.convert("RGB")
                self._known[key] = _encoded(picture, layout, size_px)
            return self._known[key]
        except (OSError, ValueError):  # not written yet, or cut short: the page goes without
            return ""


def album(run: Gathered, shrink: Shrinker, first: Sequence[str]) -> Album:
    """Return the grids of the base model, of trials that must not be missing, and of as many others as find room.

    Args:
        run: The run.
        shrink: Reads grids.
        first: Trials in the order of their weight; those that are not named come after them, the newest first.
    """
    layout = _layout(run)
    paths = {BASE_TRIAL: run.folder.trial_dir(BASE_TRIAL) / "samples" / "base.png"}
    paths |= {row.trial: _grid_of(run, row) for row in run.trained}
    order = list(dict.fromkeys([BASE_TRIAL, *(trial for trial in first if trial in paths), *reversed(list(paths))]))
    must = order[: 1 + sum(trial in paths for trial in first)]
    for size_px in SIZES_PX:
        if sum(len(shrink(paths[trial], layout, size_px)) for trial in must) <= BUDGET // 2:
            break
    sheets, used, left_out = dict[str, str](), 0, 0
    for trial in order:
        if used >= BUDGET:
            left_out += 1
            continue
        sheet = shrink(paths[trial], layout, size_px)
        if sheet and used + len(sheet) <= BUDGET:
            sheets[trial] = sheet
            used += len(sheet)
        elif sheet:
            left_out += 1
            used = BUDGET  # what comes after would be no smaller
    return Album(layout, sheets, left_out)


def _layout(run: Gathered) -> Layout:
    config = run.experiment.shared
    per_prompt = config.evaluate.images_per_prompt + (config.task == "inpaint")
    num_prompts = min(GRID_PROMPTS, config.evaluate.prompts)
    seen: dict[tuple[str, str], str] = {}
    for prompt, picture in recorded_prompts(run.folder):
        seen.setdefault((as_read(prompt), picture), prompt)
    prompts = tuple(seen.values())[:num_prompts]
    columns = per_prompt * (ROW_PROMPTS if num_prompts >= ROW_PROMPTS else 1)
    return Layout(prompts, per_prompt, num_prompts, columns, -(-num_prompts * per_prompt // columns))


def _grid_of(run: Gathered, result: TrialResult) -> Path:
    """Return the grid of the checkpoint that counts, else the newest that there is."""
    folder = run.folder.trial_dir(result.trial) / "samples"
    step = int(result.metrics.get("selected_step", result.metrics.get("step", 0)))
    path = folder / f"step-{step:06d}.png"
    return path if path.is_file() else max(folder.glob("step-*.png"), default=path)


def _encoded(picture: "Picture", layout: Layout, size_px: int) -> str:
    largest = max(picture.width / layout.columns, picture.height / layout.rows)
    if largest > size_px:
        side = size_px / largest
        width = max(round(picture.width / layout.columns * side), 1) * layout.columns
        height = max(round(picture.height / layout.rows * side), 1) * layout.rows
        picture = picture.resize((width, height))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
