"""How the hypervolume grew: by how many trials had ended, and by what had been spent."""

from dataclasses import dataclass
from datetime import datetime

import numpy as np

from rltune.pareto.hypervolume import hypervolume
from rltune.report.gather import Gathered
from rltune.runs.events import read_events
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.results import TrialResult
from rltune.runs.usage import measure


@dataclass(frozen=True)
class Growth:
    """The hypervolume by the numbers of the search after each trained trial that ended."""

    volumes: tuple[float, ...]
    """The first is before any: the base model alone."""
    spent_s: tuple[float, ...] | None
    """Worker-seconds of all slots by then, idle ones included; None where the run noted no times."""


def growth(run: Gathered) -> Growth:
    """Return how the hypervolume grew, trial by trial.

    Each trial adds what it covers beyond the front so far, in the units and from the reference point of the front.
    """
    objectives, unit_D = run.front.objectives, run.front.unit_D
    reference_D = run.searched.reference_D * objectives.signs_D
    front_ND = np.zeros((0, len(unit_D)))
    volume, volumes, ended = 0.0, [], []
    rows = [result for result in run.results if result.trial != BASE_TRIAL]
    for result in [run.base, *rows]:
        if result.is_ok and result.is_feasible:
            point_D = (objectives.signed_ND([result])[0] - reference_D) / unit_D
            if (point_D > 0).all() and not (front_ND >= point_D).all(axis=1).any():
                shared_ND = np.minimum(front_ND, point_D)
                volume += float(point_D.prod()) - hypervolume(shared_ND, np.zeros(len(unit_D)))
                front_ND = np.vstack([front_ND[~(front_ND <= point_D).all(axis=1)], point_D])
        volumes.append(volume)
        ended.append(_ended_at(run, result))
    return Growth(tuple(volumes), _spent(run, ended))


def _ended_at(run: Gathered, result: TrialResult) -> float | None:
    try:
        return datetime.fromisoformat(result.ended_at).timestamp()
    except ValueError:
        return None


def _spent(run: Gathered, ended: list[float | None]) -> tuple[float, ...] | None:
    events = read_events(run.folder.events_file)
    spent = []
    for time in ended:
        if time is None or not events:
            return None
        usage = measure([event for event in events if event.time <= time], {}, {}, now=time)
        spent.append(usage.total_s if usage else 0.0)
    return tuple(spent)
