"""Writes reports: the page of a run, its figures as files, and the page again while the run goes on."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from rltune.beside import beside
from rltune.config.load import Experiment
from rltune.errors import UserError
from rltune.report.drawing import to_svg
from rltune.report.figures import Figure, front_figures, growth_figures, importance_figures, judge_figures
from rltune.report.gather import Gathered, gather
from rltune.report.growth import growth
from rltune.report.hacking import hacked_trials, judges
from rltune.report.importance import importances
from rltune.report.mixtures import strength_figures
from rltune.report.page import first_trials, page
from rltune.report.parallel import parallel_figure
from rltune.report.pictures import Shrinker, album
from rltune.report.raster import to_png
from rltune.report.sections import Story
from rltune.runs.layout import RunFolder
from rltune.runs.store import write_atomically

logger = logging.getLogger(__name__)

EVERY_S = 60.0
"""Between two pages of a run that goes on, at the least."""
SHARE = 0.02
"""Of a run's time, at the most, that goes into its pages."""


def write_report(folder: RunFolder, experiment: Experiment, *, shrink: Shrinker | None = None) -> Path:
    """Write the page of a run and return where it is; a reader of the old one finds it whole until then.

    Args:
        folder: The run.
        experiment: Its experiment.
        shrink: Remembers pictures from one page to the next.

    Raises:
        UserError: The base model has no result yet.
        RunError: A record of the run cannot be read.
        OSError: The file cannot be written.
    """
    run = gather(folder, experiment)
    pictures = album(run, shrink or Shrinker(), first_trials(run))
    write_atomically(folder.report_file, page(Story(run, growth(run), importances(run), pictures, hacked_trials(run))))
    return folder.report_file


def write_figures(folder: RunFolder, experiment: Experiment, target: Path) -> list[Path]:
    """Write every figure of the page as SVG and PNG, and return where they are.

    Raises:
        UserError: The base model has no result yet, or nothing can be written there.
        RunError: A record of the run cannot be read.
    """
    run = gather(folder, experiment)
    written = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for figure in figures(run):
            svg, png = target / f"{figure.name}.svg", target / f"{figure.name}.png"
            svg.write_text(f"{to_svg(figure.drawing, is_file=True)}\n", encoding="utf-8")
            png.write_bytes(to_png(figure.drawing))
            written += [svg, png]
    except OSError as error:
        raise UserError(f"--figures: {target} cannot be written, {error.strerror}; name another folder") from error
    return written


def figures(run: Gathered) -> Iterator[Figure]:
    """Yield every figure of a run's page."""
    yield from front_figures(run)
    settings = parallel_figure(run)
    if settings is not None:
        yield settings
    yield from importance_figures(run, importances(run))
    yield from growth_figures(run, growth(run))
    hacked = hacked_trials(run)
    yield from strength_figures(run)
    for judge in judges(run):
        yield from judge_figures(run, judge, hacked)


def kept_current(folder: RunFolder, experiment: Experiment, shrink: Shrinker) -> AbstractContextManager[None]:
    """Write the page again for as long as a block runs, whenever trials have ended since.

    What cannot be written costs that page and not the run.
    """
    known = _size(folder.results_file)  # what is added before the thread runs is new to it
    return beside(partial(_write_often, folder, experiment, shrink, known))


def _write_often(
    folder: RunFolder, experiment: Experiment, shrink: Shrinker, known: int, stop: threading.Event
) -> None:
    wait_s = EVERY_S
    while not stop.wait(wait_s):
        found = _size(folder.results_file)
        if found == known:
            continue
        start = time.monotonic()
        try:
            write_report(folder, experiment, shrink=shrink)
        except Exception:  # no base model yet, a full disk, a record half written: the next page may do
            logger.debug("the report could not be written", exc_info=True)
        known, wait_s = found, max(EVERY_S, (time.monotonic() - start) / SHARE)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
