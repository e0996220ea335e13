"""LoRAs mixed without training, drawn: soups beside the trials they are of, and each LoRA at other strengths."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from rltune.report.axes import framed
from rltune.report.drawing import Dot, Drawing, Line, Shape
from rltune.report.figures import HEIGHT, WIDTH, Figure
from rltune.report.gather import Gain, Gathered
from rltune.report.words import fitted
from rltune.runs.layout import BASE_TRIAL

ROLES = ("member", "ramp4", "bad", "ramp0")
"""Colours of LoRAs but the knee, one after the other."""
Curve = Sequence[tuple[float, Gain]]
"""Strengths and what is gained at each."""


def slid(run: Gathered) -> list[str]:
    """Return the trials that were measured at several strengths, as they were measured."""
    rows = (row for row in run.mixtures if not row.is_on_front)
    return [trial for trial in dict.fromkeys(next(iter(row.weights)) for row in rows) if trial in run.fresh]


def role_of(run: Gathered, trial: str) -> str:
    """Return the colour of a trial's curve."""
    knee = run.front.knee.trial if run.front.knee else None
    if trial == knee:
        return "knee"
    return ROLES[[other for other in slid(run) if other != knee].index(trial) % len(ROLES)]


def strength_figures(run: Gathered) -> Iterator[Figure]:
    """Yield what each reward and judge gains along the strength of LoRAs; nothing where no strength was measured."""
    for name in run.names:
        curves = {trial: curve for trial in slid(run) if len(curve := _curve(run, trial, name)) > 2}
        if curves:
            yield Figure(f"strength-{name}", _strengths(run, name, curves))


def _curve(run: Gathered, trial: str, name: str) -> Curve:
    """Return the gain in something along the strengths of a LoRA, from 0, the base model."""
    measured = {
        next(iter(row.weights.values())): row for row in run.mixtures if set(row.weights) == {trial} and not row.mix
    }
    gains = {strength: run.fresh_gain(row.metrics, name) for strength, row in measured.items()}
    gains[1.0] = run.gain(run.fresh[trial], name)
    base = Gain(run.fresh[BASE_TRIAL].metrics[f"eval/{name}"], 0.0, None)
    return [(0.0, base), *((strength, gain) for strength, gain in sorted(gains.items()) if gain is not None)]


def _strengths(run: Gathered, name: str, curves: dict[str, Curve]) -> Drawing:
    points = [point for curve in curves.values() for point in curve]
    ends = [gain.gain + side * (gain.half or 0.0) for _, gain in points for side in (-1, 1)]
    is_turned = not run.is_better_up(name)
    frame = framed(WIDTH, HEIGHT, [strength for strength, _ in points], [0.0, *ends], turned=(False, is_turned))
    better = ", less is better" if is_turned else ""
    shapes: list[Shape] = [*frame.axes("strength", f"gain in {fitted(name)}{better}")]
    shapes.append(Line([(frame.x.start_px, frame.y(0.0)), (frame.x.end_px, frame.y(0.0))], "dim"))
    shapes.append(Line([(frame.x(1.0), frame.y.start_px), (frame.x(1.0), frame.y.end_px)], "dim", is_dashed=True))
    for trial, curve in curves.items():
        role = role_of(run, trial)
        for (before, low), (after, high) in pairwise(curve):
            shapes.append(Line([(frame.x(before), frame.y(low.gain)), (frame.x(after), frame.y(high.gain))], role, 2.0))
        for strength, gain in curve:
            bar = [(frame.x(strength), frame.y(gain.gain + side * (gain.half or 0.0))) for side in (-1, 1)]
            shapes += [Line(bar, role, 1.2, opacity=0.6), Dot(frame.x(strength), frame.y(gain.gain), 4.0, role)]
    return Drawing(WIDTH, HEIGHT, tuple(shapes), f"Gain in {name} against the strength of LoRAs, with intervals")
