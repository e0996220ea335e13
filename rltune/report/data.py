"""What the page's script knows: trials as rows of numbers, curves, image grids."""

from collections.abc import Mapping, Sequence
from math import isfinite
from shlex import quote
from typing import Any

from rltune.report.gather import Gathered
from rltune.report.pictures import Album
from rltune.report.words import setting_name, shown_value
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.results import TrialResult

CURVE_POINTS = 40
"""Of a trial's curve, at the most: every so many steps."""
MAX_CURVES = 400
"""Trials with curves; of more, those on the front and the newest."""


def page_data(run: Gathered, pictures: Album, first: Sequence[str], hacked: Mapping[str, str]) -> dict[str, Any]:
    """Return what the script shows of trials.

    Args:
        run: The run.
        pictures: Image grids.
        first: Trials whose curves come first, and of which the first is shown to begin with.
        hacked: Trials that look hacked, and why.
    """
    trials = [row.trial for row in run.trained]
    with_curves = set(list(dict.fromkeys([*first, *reversed(trials)]))[:MAX_CURVES])
    shown = {BASE_TRIAL: run.shown(run.base)} | {row.trial: run.shown(row) for row in run.trained}
    layout = pictures.layout
    return {
        "names": list(run.names),
        "up": [run.is_better_up(name) for name in run.names],
        "objectives": list(run.objectives),
        "units": [_short(run.scores.sizes.get(name, 1.0)) for name in run.names],
        "settings": [setting_name(path) for path in run.settings],
        "paths": list(run.settings),
        "rewards": list(run.rewards),
        "trials": {trial: _trial(run, result, hacked.get(trial, "")) for trial, result in shown.items()},
        "curves": {trial: curve for trial in trials if trial in with_curves and (curve := _curve(run, trial))},
        "sheets": pictures.sheets,
        "grid": {
            "prompts": list(layout.prompts),
            "each": layout.per_prompt,
            "count": layout.num_prompts,
            "columns": layout.columns,
            "rows": layout.rows,
            "given": run.experiment.shared.task == "inpaint",
        },
        "export": f"rltune export {quote(run.named())} --pick",
        "first": next(iter(first), next(iter(trials), BASE_TRIAL)),
    }


def _trial(run: Gathered, shown: TrialResult, hacked: str) -> dict[str, Any]:
    gains = [run.gain(shown, name) for name in run.names]
    trial = shown.trial
    row: dict[str, Any] = {
        "values": [shown_value(shown.values[path]) if path in shown.values else "" for path in run.settings],
        "scores": [None if gain is None else _short(gain.value) for gain in gains],
        "gains": [None if gain is None else _short(gain.gain) for gain in gains],
        "halves": [None if gain is None or gain.half is None else _short(gain.half) for gain in gains],
    }
    notes = [
        "on the front" if trial in run.members else "",
        "the knee" if run.front.knee is not None and trial == run.front.knee.trial else "",
        "measured again on fresh prompts" if trial in run.fresh and trial != BASE_TRIAL else "",
        f"stopped: {shown.reason}" if shown.state == "stopped" else "",
        f"does not hold its place: {run.front.not_held[trial]}" if trial in run.front.not_held else "",
        *(f"breaks {name} by {bad:.3g}" for name, bad in shown.constraints.items() if bad > 0),
        f"looks hacked: {hacked}" if hacked else "",
    ]
    return row | {"notes": [note for note in notes if note]}


def _curve(run: Gathered, trial: str) -> dict[str, Any]:
    """Return a trial's training reward, and its gains at every evaluation."""
    rows = run.rows(trial)
    trained = [(row["step"], row["train/reward"]) for row in rows if isinstance(row.get("train/reward"), int | float)]
    trained = trained[:: max(1, -(-len(trained) // CURVE_POINTS))]
    judged = [row for row in rows if any(f"gain/{name}" in row for name in run.names)]
    judged = judged[:: max(1, -(-len(judged) // CURVE_POINTS))]
    if not trained and not judged:
        return {}
    return {
        "train": [[step for step, _ in trained], [_short(value) for _, value in trained]],
        "steps": [row["step"] for row in judged],
        "gains": [[_short(row.get(f"gain/{name}")) for row in judged] for name in run.names],
    }


def _short(value: float | None) -> float | None:
    """Return a number with the digits that can be seen; None for what is no number in JSON."""
    return float(f"{value:.4g}") if value is not None and isfinite(value) else None
