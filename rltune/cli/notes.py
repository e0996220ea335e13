"""What is to be said of trials in words: failures, notices, and why trials were stopped."""

from collections.abc import Sequence
from dataclasses import dataclass

from rltune.runs.layout import BASE_TRIAL
from rltune.runs.status import TrialStatus

NOTE_STYLES = {"failed": "red", "notice": "yellow", "stopped": "dim"}


@dataclass(frozen=True)
class Note:
    """A line about a trial."""

    kind: str
    """``failed``, ``stopped`` or ``notice``."""
    text: str
    place: int
    """Among trials that ended; -1 before."""

    @property
    def style(self) -> str:
        """How it looks."""
        return NOTE_STYLES[self.kind]


def notes_of(trials: Sequence[TrialStatus]) -> list[Note]:
    """Return what is to be said of trials: failures, notices, and why trials were stopped."""
    failures = [Note("failed", f"{named(t)} failed: {t.reason}", t.place) for t in trials if t.state == "failed"]
    notices = [Note("notice", f"{named(t)}: {text}", t.place) for t in trials for text in t.notices]
    stopped = [Note("stopped", stop_line(t), t.place) for t in trials if t.state == "stopped"]
    return failures + notices + stopped


def stop_line(trial: TrialStatus) -> str:
    """Return how far a trial came and why it was stopped there."""
    return f"{named(trial)} stopped at {trial.step}/{trial.num_steps}: {trial.reason}"


def newest(notes: Sequence[Note], count: int) -> list[Note]:
    """Return a few notes: the newest of every kind, then the next; failures first, then notices, then stops."""
    ranked: list[tuple[int, int, Note]] = []
    for order, kind in enumerate(NOTE_STYLES):
        # a trial that has not ended has place -1, and is the newest
        of_kind = sorted((n for n in notes if n.kind == kind), key=lambda n: (n.place >= 0, -n.place))
        ranked += [(age, order, note) for age, note in enumerate(of_kind)]
    chosen = sorted(ranked, key=lambda item: item[:2])[:count]
    return [note for _, _, note in sorted(chosen, key=lambda item: (item[1], item[0]))]


def named(trial: TrialStatus) -> str:
    """Return a trial as it is called in a sentence."""
    return "base model" if trial.trial == BASE_TRIAL else f"trial {trial.trial}"
