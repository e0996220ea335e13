"""``search.warm_start``: a search starts out from the ended trials of another run.

They are no trials of this run: they stand neither in its results nor on its front. What was taken is kept in the run
folder, so that a resumed search learns the same, whatever has become of the other run.
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rltune.config.distributions import is_in, show
from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment
from rltune.config.sections import DISTANCES, JOINT_SHARES
from rltune.errors import UserError
from rltune.records import to_record
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.metrics import violations
from rltune.runs.objectives import Objectives
from rltune.runs.record import Record, read_record, read_run
from rltune.runs.results import TrialResult, read_results
from rltune.runs.store import write_atomically
from rltune.search.searcher import is_finite, params_of
from rltune.training.pins import digests_for, find_pins
from rltune.training.setup import base_settings

logger = logging.getLogger(__name__)

WHERE = "search.warm_start"
MAY_DIFFER = ("name", "search", "resources", "objectives", "constraints")
"""Sections that do not change what a trial's knobs lead to."""


def find_prior_run(experiment: Experiment, folder: RunFolder) -> RunFolder | None:
    """Return the run that ``search.warm_start`` names; None if none is, or if its results were taken before.

    Raises:
        UserError: There is no such run, it searches other settings, or its figures cannot be compared with this one's.
    """
    named = experiment.shared.search.warm_start
    if named is None or folder.warm_start_file.is_file():
        return None
    other = RunFolder(Path(named))
    if other.path == folder.path:
        raise UserError(f"{WHERE}: a run cannot start from itself, got {named!r}; name another run, or another --name")
    if not other.experiment_file.is_file():
        raise UserError(
            f"{WHERE}: not a run folder, it has no experiment.yaml, got {named!r}; name one such as runs/mix"
        )
    record = read_record(other)
    if record is None:
        raise UserError(
            f"{WHERE}: was started by an older rltune, which did not record how it measured, got {named!r}; name a "
            "run that this version has started, or delete it"
        )
    _check_comparable(experiment, read_run(other.path)[1], record, named)
    return other


def read_prior_results(experiment: Experiment, folder: RunFolder) -> list[TrialResult]:
    """Return what a search learns from the run that ``search.warm_start`` names; [] if none is named.

    Its failed trials are among them. A trial's id is ``NAME/ID``, its parameters are those of this experiment's search,
    and its constraints are this experiment's too.

    Raises:
        UserError: As ``find_prior_run``.
    """
    named = experiment.shared.search.warm_start
    if named is not None and folder.warm_start_file.is_file():
        return read_results(folder.warm_start_file)
    other = find_prior_run(experiment, folder)
    if other is None:
        return []
    results = read_results(other.results_file)
    base = next((result for result in reversed(results) if result.trial == BASE_TRIAL and result.is_ok), None)
    if base is not None:
        _check_shares(experiment, read_run(other.path)[1], base)
    ended = [result for result in results if result.trial != BASE_TRIAL]
    objectives = Objectives(experiment.shared.objective_names)
    inside = [result for result in ended if experiment.has(result.values)]
    # without a measurement of the base model there is nothing to hold a trial's constraints against
    usable = [r for r in inside if not r.is_ok or (base is not None and is_finite(r.metrics, objectives))]
    if len(inside) < len(ended):
        logger.warning(
            "%s: %d of the %d trials of %s lie outside of what is searched now and are left out",
            WHERE,
            len(ended) - len(inside),
            len(ended),
            named,
        )
    num_ok = sum(result.is_ok for result in usable)
    if num_ok == 0:
        logger.warning("%s: no trial of %s can be used; the search starts without any", WHERE, named)
    else:
        logger.info("%s: %d trials of %s inform the search", WHERE, num_ok, named)
    return [_translated(result, other.name, experiment, base) for result in usable]


def keep_prior_results(experiment: Experiment, folder: RunFolder, prior_results: list[TrialResult]) -> None:
    """Write what was taken into the run folder, the first time; nothing where no other run is named."""
    if experiment.shared.search.warm_start is not None and not folder.warm_start_file.is_file():
        lines = [json.dumps(to_record(asdict(result)), allow_nan=False) + "\n" for result in prior_results]
        write_atomically(folder.warm_start_file, "".join(lines))


def _check_shares(experiment: Experiment, other: Experiment, base: TrialResult) -> None:
    """Check that shares of images that the search goes by are those of the other run: over the same objectives.

    Raises:
        UserError: They are not, or the other run has none.
    """
    asked, no_scores = experiment.shared, (*DISTANCES, *JOINT_SHARES)
    compared = [set(shared.objective_names).difference(no_scores) for shared in (asked, other.shared)]
    for name in JOINT_SHARES:
        is_there = f"eval/{name}" in base.metrics and compared[0] == compared[1]
        if (name in asked.objective_names or name in asked.constraints) and not is_there:
            raise UserError(
                f"{WHERE}: has no {name} over {', '.join(sorted(compared[0]))}, which the search goes by, got "
                f"{asked.search.warm_start!r}; name a run with these objectives, or leave {name} out"
            )


def _translated(result: TrialResult, run: str, experiment: Experiment, base: TrialResult | None) -> TrialResult:
    """Return another run's result as this experiment's search would have known it."""
    broken = violations(experiment.shared, result.metrics, base.metrics) if result.is_ok and base is not None else {}
    # what a trial had no use for was drawn all the same, and is a parameter of it
    idle = {
        path: result.params[path] if is_in(result.params.get(path), distribution) else experiment.first[path]
        for path, distribution in experiment.space.items()
        if path not in result.values
    }
    return replace(
        result,
        trial=f"{run}/{result.trial}",
        params=idle | params_of(result.values, experiment),
        constraints=broken,
        checkpoint="",
    )


def _check_comparable(experiment: Experiment, prior: Experiment, record: Record, named: str) -> None:
    """Refuse a run whose trials mean something else; warn of one that was trained with other fixed settings."""
    here, searched = set(experiment.space), set(prior.space)
    if here != searched:
        only = {"here": sorted(here - searched), "there": sorted(searched - here)}
        what = "; ".join(f"only {place}: {', '.join(paths)}" for place, paths in only.items() if paths)
        raise UserError(f"{WHERE}: {named!r} searches other settings, got {what}; search the same, or delete it")
    shared, there = experiment.shared, dict(record.base_settings)
    ours = base_settings(shared, digests_for(shared, find_pins(experiment, record.pins)))
    if shared.resources.precision == "auto":  # what it comes to is known once there is a cluster
        ours["precision"][0] = there["precision"][0]
    if ours["model"] != there["model"]:  # digests, which nobody wants to read
        ours["model"], there["model"] = _model(shared), _model(prior.shared)
    measured = _differences(ours, there)
    if measured:
        raise UserError(
            f"{WHERE}: {named!r} measured otherwise, its figures cannot be compared, got {'; '.join(measured)}; "
            "make them the same, or delete it"
        )
    fixed = _differences(_fixed(experiment.shared), _fixed(prior.shared), without=here)
    if fixed:
        logger.warning("%s: the trials of %s were trained with other settings: %s", WHERE, named, "; ".join(fixed))


def _model(config: RunConfig) -> str:
    return f"{config.model.base} {config.model.revision or ''}".rstrip()


def _fixed(config: RunConfig) -> dict[str, Any]:
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in MAY_DIFFER}


def _differences(here: Any, there: Any, *, without: Collection[str] = ()) -> list[str]:
    """Return ``path: value there, value here`` wherever two mappings differ, but for some paths."""
    ours, theirs = dict(_leaves(here)), dict(_leaves(there))
    return [
        f"{path} {show(theirs.get(path))} there and {show(ours.get(path))} here"
        for path in dict.fromkeys((*ours, *theirs))
        if path not in without and ours.get(path) != theirs.get(path)
    ]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
