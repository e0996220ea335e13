"""The live table: a long sweep cut to the height of a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from rltune.cli.notes import Note, newest, notes_of
from rltune.cli.tables import STATE_STYLES, trial_view
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.status import RunStatus, TrialStatus


@dataclass(frozen=True)
class LiveView:
    """The trial table, cut to the terminal's height: what runs, what is on the front, and what ended last."""

    status: RunStatus
    objectives: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.max_height - 1  # the cursor stands below
        notes = newest(notes_of(self.status.trials), max(height // 6, 2))
        ranked = by_interest(self.status.trials)
        num_shown = min(len(ranked), height)
        while True:
            kept = set(ranked[:num_shown])
            view = self._cut([trial for trial in self.status.trials if trial.trial in kept], notes)
            excess = len(console.render_lines(view, options.update(height=None))) - height
            if excess <= 0 or num_shown <= 1:
                break
            num_shown = max(num_shown - excess, 1)
        yield view

    def _cut(self, shown: Sequence[TrialStatus], notes: Sequence[Note]) -> RenderableType:
        view = trial_view(self.status, self.objectives, shown, [])
        lines = [Text(note.text, note.style, no_wrap=True, overflow="ellipsis") for note in notes]
        kept = {trial.trial for trial in shown}
        hidden = [trial.state for trial in self.status.trials if trial.trial not in kept]
        if hidden:
            counts = ", ".join(f"{hidden.count(state)} {state}" for state in STATE_STYLES if state in hidden)
            text = f"not shown: {counts}; rltune status in another terminal has all"
            lines.append(Text(text, "dim", no_wrap=True, overflow="ellipsis"))
        return Group(view, *lines)


def by_interest(trials: Sequence[TrialStatus]) -> list[str]:
    """Return trials, those first that a short table must not leave out: base, what runs, the front, newest ended.

    The newest two that ended come before the front, which may be long.
    """
    newest_two = sorted(trial.place for trial in trials)[-2:]

    def rank(trial: TrialStatus) -> tuple[int, int]:
        if trial.trial == BASE_TRIAL:
            return 0, 0
        if trial.state in ("running", "starting"):
            return 1, 0
        if trial.place in newest_two:
            return 2, -trial.place
        return (3 if trial.is_on_front else 4), -trial.place

    return [trial.trial for trial in sorted(trials, key=rank)]
