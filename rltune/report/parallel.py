"""Parallel coordinates: an axis a setting and an objective, a line a trial."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rltune.config.distributions import Distribution, LogFloatRange
from rltune.report.axes import Scale, label
from rltune.report.drawing import RAMP, Drawing, Line, Shape, Words
from rltune.report.figures import Figure
from rltune.report.gather import Gathered
from rltune.report.words import fitted, setting_name, shown_value

AXIS_PX = 118.0
HEIGHT = 330.0
TOP, BOTTOM, SIDE = 58.0, 300.0, 62.0
COLORINGS = ("estimator.k", "optim.lr", "model.lora.rank")
"""What lines may be coloured by, where it is searched; else the first setting that is."""
LETTERS = 17
"""That find room above an axis."""
MAX_LINES = 1500


@dataclass(frozen=True)
class Axis:
    """One axis, as shares of its height: 0 is low."""

    path: str
    name: str
    shares: dict[str, float]
    """By trial; those without a value are left out."""
    ticks: tuple[tuple[float, str], ...]
    """Share of the height and what stands there."""
    is_objective: bool = False


def colorings(run: Gathered) -> list[str]:
    """Return the settings that lines may be coloured by, the first of them to begin with."""
    return [path for path in COLORINGS if path in run.settings] or list(run.settings[:1])


def parallel_figure(run: Gathered) -> Figure | None:
    """Return the figure; None where nothing is searched, or no trial has ended."""
    axes = [*_setting_axes(run), *_objective_axes(run)]
    trials = [row.trial for row in run.trained][:MAX_LINES]
    if not run.settings or not trials:
        return None
    places = {axis.path: SIDE + AXIS_PX * i for i, axis in enumerate(axes)}
    shades = [axis for path in colorings(run) for axis in axes if axis.path == path]
    shapes: list[Shape] = []
    for trial in sorted(trials, key=lambda trial: trial in run.members):
        points = [(places[axis.path], _y(axis.shares[trial])) for axis in axes if trial in axis.shares]
        bins = [round(axis.shares.get(trial, 0.0) * (len(RAMP) - 1)) for axis in shades]
        is_member = trial in run.members
        width, opacity = (2.4, 1.0) if is_member else (1.0, 0.55 if len(trials) <= 100 else 0.25)
        shapes.append(Line(points, f"ramp{bins[0]}", width, opacity=opacity, trial=trial, bins=bins))
    for axis in axes:
        shapes += _axis_shapes(axis, places[axis.path])
    width = 2 * SIDE + AXIS_PX * (len(axes) - 1)
    title = f"A line a trial, through its settings and gains, coloured by {setting_name(colorings(run)[0])}"
    return Figure("parallel", Drawing(width, HEIGHT, tuple(shapes), title))


def _y(share: float) -> float:
    return BOTTOM - share * (BOTTOM - TOP)


def _axis_shapes(axis: Axis, x: float) -> list[Shape]:
    role = "member" if axis.is_objective else "ink"
    shapes: list[Shape] = [Line([(x, TOP), (x, BOTTOM)], "dim")]
    lines = _in_lines(axis.name)
    for line, text in enumerate(lines, start=3 - len(lines)):
        shapes.append(Words(x, TOP - 50 + 14 * line, fitted(text, LETTERS), role=role, anchor="middle", size=12.0))
    shapes += [Words(x + 5, _y(share) + (12 if share == 0 else -3), text) for share, text in axis.ticks]
    return shapes


def _in_lines(name: str) -> list[str]:
    """Return a name in one line or, where that is too long, in two."""
    words, last = name.rsplit(" ", 1) if len(name) > LETTERS and " " in name else (name, "")
    return [words, last] if last else [words]


def _setting_axes(run: Gathered) -> list[Axis]:
    axes = []
    for path, distribution in run.experiment.space.items():
        values = {row.trial: row.values[path] for row in run.trained if path in row.values}
        if values:
            axes.append(_axis(path, setting_name(path), values, distribution))
    return axes


def _axis(path: str, name: str, values: dict[str, Any], distribution: Distribution) -> Axis:
    if not all(isinstance(value, int | float) for value in values.values()):
        options = list(dict.fromkeys(map(str, values.values())))
        return _of_options(path, name, {trial: str(value) for trial, value in values.items()}, options)
    found = sorted(set(values.values()))
    if len(found) <= 5:  # ranks 2, 4, 8, 16: a place each
        texts = {trial: shown_value(value) for trial, value in values.items()}
        return _of_options(path, name, texts, [shown_value(value) for value in found])
    is_log = isinstance(distribution, LogFloatRange) and found[0] > 0
    scale = Scale(found[0], found[-1], 0.0, 1.0, is_log=is_log)
    ends = ((0.0, shown_value(found[0])), (1.0, shown_value(found[-1])))
    return Axis(path, name, {trial: scale(value) for trial, value in values.items()}, ends)


def _of_options(path: str, name: str, texts: dict[str, str], options: Sequence[str]) -> Axis:
    shares = {text: i / max(len(options) - 1, 1) for i, text in enumerate(options)}
    ticks = tuple((share, fitted(text, 14)) for text, share in shares.items())
    return Axis(path, name, {trial: shares[text] for trial, text in texts.items()}, ticks)


def _objective_axes(run: Gathered) -> list[Axis]:
    axes = []
    for name in run.objectives:
        gains = {row.trial: gain.gain for row in run.trained if (gain := run.gain(run.shown(row), name)) is not None}
        if not gains:
            continue
        low, high = min(gains.values()), max(gains.values())
        scale = Scale(low, high, 0.0, 1.0) if run.is_better_up(name) else Scale(low, high, 1.0, 0.0)
        ticks = tuple((scale(value), label(value)) for value in dict.fromkeys((low, high)))
        shares = {trial: scale(gain) for trial, gain in gains.items()}
        axes.append(Axis(f"gain/{name}", f"gain in {name}", shares, ticks, is_objective=True))
    return axes
