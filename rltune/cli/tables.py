"""Tables of a run, for the live view and for ``status`` and ``front``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rltune.cli.notes import Note, notes_of
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.status import RunStatus, TrialStatus
from rltune.runs.usage import KINDS, Usage

STATE_STYLES = {
    "done": "green",
    "stopped": "dim",
    "failed": "red",
    "running": "cyan",
    "starting": "yellow",
    "interrupted": "yellow",
}
FRONT_MARK = "*"
BREACH_MARK = "!"
UNBOUNDED = 10_000
"""Columns of a console on which every table fits."""


@dataclass(frozen=True)
class FittedTable:
    """A table that fits: it leaves out knobs, the last ones first, where rich would cut digits off numbers instead."""

    make: Callable[[Sequence[str]], Table]
    """From the paths of the knobs to show."""
    paths: Sequence[str]
    below: Callable[[Sequence[str]], Table] | None = None
    """Makes tables of knobs alone, which follow where the first has no room for all of them; else they are named."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def num_fitting(make: Callable[[Sequence[str]], Table], paths: Sequence[str]) -> int:
            for count in range(len(paths), 0, -1):
                width = Measurement.get(console, options.update_width(UNBOUNDED), make(paths[:count])).maximum
                if width <= options.max_width:
                    return count
            return 0

        num_shown = num_fitting(self.make, self.paths)
        hidden = self.paths[num_shown:]
        if self.below is None or not hidden:
            yield self.make(self.paths[:num_shown])
            if hidden:
                listed = ", ".join(short_labels(self.paths)[num_shown:])
                yield Text(f"not shown, a wider terminal has room for them: {listed}", style="dim")
            return
        yield self.make(())
        hidden = self.paths
        while hidden:
            num_shown = max(1, num_fitting(self.below, hidden))
            yield Text()
            yield self.below(hidden[:num_shown])
            hidden = hidden[num_shown:]


def status_view(status: RunStatus, objectives: Sequence[str]) -> RenderableType:
    """Return the trial table with a headline above; notices, and why trials were stopped or failed, below."""
    return trial_view(status, objectives, status.trials, notes_of(status.trials))


def trial_view(
    status: RunStatus, objectives: Sequence[str], shown: Sequence[TrialStatus], notes: Sequence[Note]
) -> RenderableType:
    """Return the table of some trials of a run, with the headline above and notes below."""
    parts: list[RenderableType] = [headline(status), _trial_table(status, objectives, shown)]
    parts += [Text(note.text, style=note.style) for note in notes]
    if any(not trial.is_feasible for trial in shown):
        parts.append(Text(f"{BREACH_MARK} breaks a constraint, so it is not on the front", style="dim"))
    return Group(*parts)


def headline(status: RunStatus) -> Text:
    """Return the whole run in a line."""
    parts = [f"{status.name}: {status.num_ended} of {status.num_trials} trials"]
    if status.front is not None:
        parts.append(f"front {sum(member.is_feasible for member in status.front.members)}")  # those with a !: not on it
        parts.append(f"hypervolume {status.front.hypervolume:.3g}")
    if status.usage is not None:
        parts.append(f"utilisation {status.usage.utilisation:.0%}")
    if status.step_s is not None:
        parts.append(f"{status.step_s:.2f} s/step")
    parts.append(f"{format_duration(status.elapsed_s)} elapsed")
    if status.remaining_s is not None:
        parts.append(f"about {format_duration(status.remaining_s)} left")
    if not status.is_active:
        ended = status.num_ended >= status.num_trials
        parts.append("ended" if ended else "not running; the same command resumes it")
    return Text(" | ".join(parts), style="bold")


def progress_line(status: RunStatus) -> str:
    """Return the sweep in a line, for where there is no terminal."""
    return headline(status).plain


def usage_view(usage: Usage) -> RenderableType:
    """Return where the worker-seconds of a run went, the largest share first."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("share", justify="right")
    table.add_column("worker time", justify="right")
    table.add_column("spent on")
    for kind, seconds in sorted(usage.seconds.items(), key=lambda item: -item[1]):
        style = "bold" if kind == "training" else "dim" if seconds == 0 else None
        table.add_row(f"{seconds / usage.total_s:.1%}", format_duration(seconds), KINDS[kind], style=style)
    note = f"Of {format_duration(usage.total_s)}: slots (trials at a time x workers) times the time that drivers ran."
    return Group(table, Text(note, style="dim"))


def _trial_table(status: RunStatus, objectives: Sequence[str], trials: Sequence[TrialStatus]) -> FittedTable:
    paths = list(dict.fromkeys(path for trial in trials for path in trial.values))
    return FittedTable(lambda shown: _trial_table_with(shown, status, objectives, trials), paths)


def _trial_table_with(
    paths: Sequence[str], status: RunStatus, objectives: Sequence[str], trials: Sequence[TrialStatus]
) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("trial")
    table.add_column("state")
    table.add_column("step", justify="right")
    for name in objectives:
        table.add_column(name, justify="right")
    for label in short_labels(paths):
        table.add_column(label, justify="right", style="dim")
    base = next((trial.metrics for trial in status.trials if trial.trial == BASE_TRIAL), {})
    for trial in trials:
        is_base = trial.trial == BASE_TRIAL
        mark = BREACH_MARK if not trial.is_feasible else FRONT_MARK if trial.is_on_front else ""
        table.add_row(
            mark,
            f"{trial.trial} base" if is_base else trial.trial,
            Text(trial.state, style=STATE_STYLES[trial.state]),
            "" if is_base or not trial.num_steps else f"{trial.step}/{trial.num_steps}",
            *(_objective(trial, name, base) for name in objectives),
            *(format_value(trial.values.get(path, "")) for path in paths),
            style="bold" if trial.is_on_front else None,
        )
    return table


def _objective(trial: TrialStatus, name: str, base: Mapping[str, float]) -> str:
    value = trial.metrics.get(f"eval/{name}")
    if value is None:
        return ""
    reference = base.get(f"eval/{name}")
    if trial.trial == BASE_TRIAL or reference is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({value - reference:+.3f})"


def short_labels(paths: Sequence[str]) -> list[str]:
    """Return a column label per dotted path: the last part, with the one before where that alone is ambiguous."""
    labels = []
    for path in paths:
        parts = path.split(".")
        is_weight = parts[0] == "rewards" and parts[-1] == "weight"
        labels.append(f"w {parts[1][:9]}" if is_weight else parts[-1])
    return [
        ".".join(path.split(".")[-2:]) if labels.count(label) > 1 else label
        for path, label in zip(paths, labels, strict=True)
    ]


def format_value(value: Any) -> str:
    """Return a knob's value, short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_duration(seconds: float) -> str:
    """Return seconds as ``1 h 05 min``, ``4 min 10 s`` or ``12 s``."""
    whole = round(max(seconds, 0))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
