"""What is seen while a sweep runs: a live table on a terminal, plain lines anywhere else."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import RenderableType
from rich.live import Live

from rltune.cli.tables import status_view
from rltune.cli.terminal import errors
from rltune.config.load import Experiment
from rltune.orchestration.rundir import BASE_TRIAL, RunFolder
from rltune.orchestration.status import RunStatus, TrialStatus, read_status

REFRESH_S = 1.0


@contextmanager
def watch(folder: RunFolder, experiment: Experiment) -> Iterator[None]:
    """Show the run on standard error for as long as the block runs. Reads the run folder, touches nothing."""
    if errors.is_terminal:
        with Live(
            get_renderable=lambda: _view(folder, experiment),
            console=errors,
            refresh_per_second=1 / REFRESH_S,
            transient=True,
        ):
            yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_print_lines, args=(folder, experiment, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _view(folder: RunFolder, experiment: Experiment) -> RenderableType:
    return status_view(read_status(folder, experiment), experiment.shared.objective_names)


def _print_lines(folder: RunFolder, experiment: Experiment, stop: threading.Event) -> None:
    seen: set[str] = set()
    objectives = experiment.shared.objective_names
    is_first = True
    while True:
        is_last = stop.wait(REFRESH_S)
        status = read_status(folder, experiment)
        for trial in status.trials:
            for line in _lines(trial, objectives, status):
                if line not in seen and not (is_first and trial.state in ("done", "failed")):
                    errors.print(line, highlight=False, soft_wrap=True, markup=False)
                seen.add(line)
        is_first = False
        if is_last:
            return


def _lines(trial: TrialStatus, objectives: tuple[str, ...], status: RunStatus) -> Iterator[str]:
    name = "base model" if trial.trial == BASE_TRIAL else f"trial {trial.trial}"
    if trial.state == "failed":
        yield f"{name} failed: {trial.reason}"
    elif trial.metrics:
        scores = ", ".join(f"{objective} {trial.metrics[f'eval/{objective}']:.3f}" for objective in objectives)
        step = "" if trial.trial == BASE_TRIAL else f" step {int(trial.metrics['step'])}/{trial.num_steps}"
        yield f"{name}{step}: {scores}"
    elif trial.trial != BASE_TRIAL:
        yield f"{name} started"
