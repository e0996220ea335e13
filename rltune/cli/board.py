"""What is seen while a sweep runs: a live table on a terminal, plain lines anywhere else."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from rltune.beside import beside
from rltune.cli.live import LiveView
from rltune.cli.notes import named, stop_line
from rltune.cli.tables import progress_line
from rltune.cli.terminal import errors
from rltune.config.load import Experiment
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.status import RunStatus, StatusReader, TrialStatus

logger = logging.getLogger(__name__)

REFRESH_S = 1.0
PROGRESS_S = 60.0
"""Between lines that say where the whole sweep stands, where there is no terminal."""


@contextmanager
def watch(folder: RunFolder, experiment: Experiment) -> Iterator[None]:
    """Show the run on standard error for as long as the block runs. Reads the run folder, touches nothing."""
    reader = Steady(StatusReader(folder, experiment))
    objectives = experiment.shared.objective_names
    if errors.is_terminal:
        with Live(
            get_renderable=lambda: Guarded(LiveView(status, objectives) if (status := reader.read()) else Text()),
            console=errors,
            refresh_per_second=1 / REFRESH_S,
            transient=True,
        ):
            yield
        return
    with beside(partial(_print_lines, reader, objectives)):
        yield


class Steady:
    """A run as it was last read: what it cannot read now, or not yet, costs a refresh and not the display."""

    def __init__(self, reader: StatusReader) -> None:
        self._reader = reader
        self._last: RunStatus | None = None

    def read(self) -> RunStatus | None:
        """Return where the run stands, as far as it is known; None before anything is."""
        try:
            self._last = self._reader.read()
        except Exception:  # whatever it is, the run goes on, and so must what shows it
            logger.debug("the run folder could not be read", exc_info=True)
        return self._last


@dataclass(frozen=True)
class Guarded:
    """Something drawn, or a line that says that it could not be: an exception would end the thread that draws."""

    view: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        try:
            yield from list(console.render(self.view, options))
        except Exception as error:
            logger.debug("the table could not be drawn", exc_info=True)
            yield Text(f"the table could not be drawn ({type(error).__name__}); the run goes on", "dim")


def _print_lines(reader: StatusReader | Steady, objectives: Sequence[str], stop: threading.Event) -> None:
    seen: set[tuple[int, str]] = set()
    is_first, progress_at = True, time.monotonic()
    while True:
        is_last = stop.wait(REFRESH_S)
        try:
            if (status := reader.read()) is not None:
                for trial in status.trials:
                    for line in _lines(trial, objectives):
                        if line not in seen and not (is_first and trial.has_ended):
                            _print(line[1])
                        seen.add(line)
                if time.monotonic() - progress_at >= PROGRESS_S:
                    _print(progress_line(status))
                    progress_at = time.monotonic()
                is_first = False
        except Exception:  # a line that cannot be made costs that line and not all that follow
            logger.debug("the run could not be shown", exc_info=True)
        if is_last:
            return


def _print(line: str) -> None:
    errors.print(line, soft_wrap=True)


def _lines(trial: TrialStatus, objectives: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield what is to be printed of a trial, once each; notices are numbered, for two may say the same."""
    yield from ((number, f"{named(trial)}: {text}") for number, text in enumerate(trial.notices, start=1))
    yield from ((0, line) for line in _state_lines(trial, objectives))


def _state_lines(trial: TrialStatus, objectives: Sequence[str]) -> Iterator[str]:
    name = named(trial)
    if trial.state == "stopped":
        yield stop_line(trial)
    elif trial.state == "failed":
        yield f"{name} failed: {trial.reason}"
    elif trial.metrics:
        scores = ", ".join(f"{objective} {trial.metrics[f'eval/{objective}']:.3f}" for objective in objectives)
        is_trained = trial.trial != BASE_TRIAL and trial.num_steps > 0
        step = f" step {int(trial.metrics['step'])}/{trial.num_steps}" if is_trained else ""
        yield f"{name}{step}: {scores}"
    elif trial.trial != BASE_TRIAL:
        yield f"{name} started"
