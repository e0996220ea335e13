"""The figures of a report: what is drawn, under which name it is filed, and what it shows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from rltune.report.axes import Frame, framed
from rltune.report.drawing import Box, Dot, Drawing, Line, Shape, Words
from rltune.report.gather import Gain, Gathered
from rltune.report.growth import Growth
from rltune.report.importance import Importance
from rltune.report.words import fitted, setting_name
from rltune.runs.results import TrialResult

WIDTH, HEIGHT = 390.0, 320.0
CROWDED = 60
"""Members of a front, above which intervals would hide it."""


@dataclass(frozen=True)
class Figure:
    """A drawing and its place."""

    name: str
    """Of its files, without an ending."""
    drawing: Drawing


def front_figures(run: Gathered) -> Iterator[Figure]:
    """Yield the front: gains over the base model in every pair of objectives; of one objective, against the trial."""
    if len(run.objectives) == 1:
        yield Figure(f"front-{run.objectives[0]}", _one_objective(run))
    for x_name, y_name in combinations(run.objectives, 2):
        yield Figure(f"front-{x_name}-{y_name}", _pair(run, x_name, y_name))


def judge_figures(run: Gathered, judge: str, hacked: Mapping[str, str]) -> Iterator[Figure]:
    """Yield a judge against each reward that was trained on; trials that look hacked are marked."""
    for reward in run.rewards:
        if reward in run.names:
            yield Figure(f"judge-{judge}-{reward}", _pair(run, reward, judge, hacked))


def growth_figures(run: Gathered, grown: Growth) -> Iterator[Figure]:
    """Yield the hypervolume against trials and against worker-seconds."""
    trials = [float(count) for count in range(len(grown.volumes))]
    yield Figure("hypervolume-trials", _growth(run, trials, grown.volumes, "trials that ended"))
    if grown.spent_s is not None:
        yield Figure("hypervolume-seconds", _growth(run, grown.spent_s, grown.volumes, "worker-seconds"))


def importance_figures(run: Gathered, found: list[Importance]) -> Iterator[Figure]:
    """Yield what each setting has to do with each objective."""
    for name in run.objectives:
        rows = [row for row in found if row.objective == name]
        if rows:
            yield Figure(f"importance-{name}", _importance(name, rows))


def _pair(run: Gathered, x_name: str, y_name: str, hacked: Mapping[str, str] | None = None) -> Drawing:
    """Draw gains in two things that were measured, better to the right and above; with ``hacked``, of a judge."""
    is_of_judge, is_crowded = hacked is not None, len(run.members) > CROWDED
    points = [
        (row, run.shown(row), x, y) for row in run.trained for x, y in _gains(run, run.shown(row), x_name, y_name)
    ]
    soups = [] if is_of_judge else _soups(run, x_name, y_name)
    width, height = (300.0, 250.0) if is_of_judge else (WIDTH, HEIGHT)
    with_bars = [point for point in points if point[0].trial in (run.members if hacked is None else hacked)]
    frame = framed(
        width,
        height,
        [0.0, *_ends([x for _, _, x, _ in with_bars]), *(x.gain for _, _, x, _ in points), *(x.gain for x, _ in soups)],
        [0.0, *_ends([y for _, _, _, y in with_bars]), *(y.gain for _, _, _, y in points), *(y.gain for _, y in soups)],
        turned=(not run.is_better_up(x_name), not run.is_better_up(y_name)),
    )
    shapes: list[Shape] = [*frame.axes(_axis(run, x_name), _axis(run, y_name), ticks=4 if is_of_judge else 5)]
    shapes += _cross(frame)
    for row, shown, x, y in sorted(points, key=lambda point: point[0].trial in run.members):
        is_member = row.trial in run.members and not is_of_judge
        role = _role(run, row, hacked)
        if (is_member and (not is_crowded or role == "knee")) or role == "bad":
            shapes += _bars(frame, x, y, role)
        if is_member and not is_crowded and shown is not row:
            shapes += [
                Line([_at(frame, *chosen), _at(frame, x, y)], "dim", is_dashed=True)
                for chosen in _gains(run, row, x_name, y_name)
            ]
        size = (4.0 if is_crowded and role == "member" else 5.5) if is_member else 3.2
        shapes.append(Dot(*_at(frame, x, y), size, role, is_hollow=not shown.is_feasible, trial=row.trial))
    shapes += [Dot(*_at(frame, x, y), 4.5, "soup", is_square=True) for x, y in soups]
    shapes.append(Dot(frame.x(0.0), frame.y(0.0), 5.0, "base", is_square=True, trial="000"))
    return Drawing(width, height, tuple(shapes), f"Gain in {y_name} against gain in {x_name}, a dot a trial")


def _soups(run: Gathered, x_name: str, y_name: str) -> list[tuple[Gain, Gain]]:
    """Return the gains of the soups that nothing has beaten."""
    every = run.front.soups.members if run.front.soups else ()
    pairs = [tuple(run.fresh_gain(soup.result.metrics, name) for name in (x_name, y_name)) for soup in every]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _one_objective(run: Gathered) -> Drawing:
    name = run.objectives[0]
    rows = [(row, gain) for row in run.trained if (gain := run.gain(run.shown(row), name)) is not None]
    xs = [float(int(row.trial)) if row.trial.isdecimal() else float(i) for i, (row, _) in enumerate(rows, start=1)]
    gains = [gain for _, gain in rows]
    frame = framed(2 * WIDTH, HEIGHT, [0.0, *xs], [0.0, *_ends(gains)], turned=(False, not run.is_better_up(name)))
    shapes: list[Shape] = [*frame.axes("trial", _axis(run, name)), *_cross(frame)]
    for x, (row, gain) in zip(xs, rows, strict=True):
        role = _role(run, row)
        if len(rows) <= 100 or row.trial in run.members:
            shapes.append(_bar(frame, x, gain, role))
        size = 5.5 if row.trial in run.members else 3.2
        is_hollow = not run.shown(row).is_feasible
        shapes.append(Dot(frame.x(x), frame.y(gain.gain), size, role, is_hollow=is_hollow, trial=row.trial))
    shapes.append(Dot(frame.x(0.0), frame.y(0.0), 5.0, "base", is_square=True, trial="000"))
    return Drawing(2 * WIDTH, HEIGHT, tuple(shapes), f"Gain in {name}, a dot a trial")


def _gains(run: Gathered, result: TrialResult, *names: str) -> list[tuple[Gain, ...]]:
    """Return the gains of a trial in all of some names, or nothing where one was not measured."""
    gains = tuple(gain for name in names if (gain := run.gain(result, name)) is not None)
    return [gains] if len(gains) == len(names) else []


def _ends(gains: list[Gain]) -> list[float]:
    return [gain.gain + sign * (gain.half or 0.0) for gain in gains for sign in (-1, 1)]


def _axis(run: Gathered, name: str) -> str:
    return f"gain in {fitted(name)}" + ("" if run.is_better_up(name) else ", less is better")


def _role(run: Gathered, row: TrialResult, hacked: Mapping[str, str] | None = None) -> str:
    if hacked is not None and row.trial in hacked:
        return "bad"
    if hacked is None and run.front.knee is not None and row.trial == run.front.knee.trial:
        return "knee"
    return "member" if row.trial in run.members else "trial"


def _cross(frame: Frame) -> list[Shape]:
    """Return the lines of the base model: right of one and above the other is better than it in both."""
    x, y = frame.x(0.0), frame.y(0.0)
    across, up = (frame.x.start_px, frame.x.end_px), (frame.y.start_px, frame.y.end_px)
    return [Line([(x, up[0]), (x, up[1])], "dim"), Line([(across[0], y), (across[1], y)], "dim")]


def _at(frame: Frame, x: Gain, y: Gain) -> tuple[float, float]:
    return frame.x(x.gain), frame.y(y.gain)


def _bars(frame: Frame, x: Gain, y: Gain, role: str) -> list[Shape]:
    ends = [frame.x(x.gain + sign * (x.half or 0.0)) for sign in (-1, 1)]
    across = Line([(end, frame.y(y.gain)) for end in ends], role, width=1.2, opacity=0.6)
    return [across, _bar(frame, x.gain, y, role)]


def _bar(frame: Frame, x: float, gain: Gain, role: str) -> Line:
    ends = [frame.y(gain.gain + sign * (gain.half or 0.0)) for sign in (-1, 1)]
    return Line([(frame.x(x), end) for end in ends], role, width=1.2, opacity=0.6)


def _growth(run: Gathered, xs: tuple[float, ...] | list[float], volumes: tuple[float, ...], what: str) -> Drawing:
    fresh, last = run.front.fresh, run.front.hypervolume
    half = (fresh.half_width or 0.0) if fresh else 0.0
    ends = [last - half, last + half] if fresh else []
    frame = framed(WIDTH, HEIGHT, [0.0, *xs], [0.0, *volumes, *ends])
    stairs = [(frame.x(xs[0]), frame.y(volumes[0]))]
    for x, before, after in zip(xs[1:], volumes, volumes[1:], strict=False):
        stairs += [(frame.x(x), frame.y(before)), (frame.x(x), frame.y(after))]
    base = [(frame.x.start_px, frame.y(1.0)), (frame.x.end_px, frame.y(1.0))]
    shapes: list[Shape] = [*frame.axes(what, "hypervolume"), Line(base, "dim", is_dashed=True)]
    shapes.append(Words(frame.x.end_px - 2, frame.y(1.0) - 5, "base model alone", anchor="end"))
    shapes.append(Line(stairs, "member", width=2.0))
    if fresh:
        at = frame.x(xs[-1])
        shapes.append(Line([(at, frame.y(end)) for end in ends], "knee", width=1.5))
        shapes.append(Dot(at, frame.y(last), 5.0, "knee"))
        shapes.append(Words(at - 9, frame.y(last) + 4, "on fresh prompts", anchor="end"))
    return Drawing(WIDTH, HEIGHT, tuple(shapes), f"Hypervolume against {what}")


ROW_PX = 26.0
NAMES_PX = 168.0


def _importance(name: str, rows: list[Importance]) -> Drawing:
    """Draw a row a setting: its correlation, the interval, and what chance alone would give."""
    height = ROW_PX * len(rows) + 72
    left, right, top, bottom = NAMES_PX, WIDTH - 14, 32.0, height - 40

    def at(value: float) -> float:
        return left + (value + 1) / 2 * (right - left)

    chance = max(row.chance for row in rows)
    shapes: list[Shape] = [Box(at(-chance), top, at(chance) - at(-chance), bottom - top, "chance")]
    for tick in (-1.0, -0.5, 0.0, 0.5, 1.0):
        shapes.append(Line([(at(tick), top), (at(tick), bottom)], "dim" if tick == 0 else "grid"))
        shapes.append(Words(at(tick), bottom + 15, f"{tick:g}", anchor="middle"))
    for i, row in enumerate(rows):
        y = top + ROW_PX * (i + 0.5)
        what = setting_name(row.setting) + (f" = {row.option}" if row.option else "")
        role = "member" if row.low > 0 or row.high < 0 else "dim"
        shapes.append(Words(left - 10, y + 4, fitted(what), role="ink", anchor="end", size=12.0))
        shapes.append(Line([(at(row.low), y), (at(row.high), y)], role, width=1.6))
        shapes.append(Dot(at(row.correlation), y, 5.0, role))
    shapes.append(Words(left, top - 12, f"for {fitted(name)}", role="ink", size=12.0))
    shapes.append(Words(right, bottom + 32, "more of it goes with worse / better", anchor="end"))
    return Drawing(WIDTH, height, tuple(shapes), f"Rank correlation of each setting with {name}")
