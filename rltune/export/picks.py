"""Which trials of a run to export. Reads the run folder alone: no torch, so that any reader may choose."""

from collections.abc import Iterable
from shlex import quote

from rltune.config.load import Experiment
from rltune.errors import UserError
from rltune.runs.fronts import read_front
from rltune.runs.layout import BASE_TRIAL, RunFolder, by_number
from rltune.runs.mixtures import Mixture, read_mixtures
from rltune.runs.objectives import Front
from rltune.runs.results import TrialResult, read_results


def pick_soup(pick: str, folder: RunFolder) -> Mixture | None:
    """Return the soup, or the point of a basis, of that name; None where there is none."""
    return next((row for row in reversed(read_mixtures(folder)) if row.is_on_front and row.name == pick), None)


def pick_trial(pick: str, folder: RunFolder, experiment: Experiment) -> TrialResult:
    """Return the trial named by ``knee``, ``best:OBJECTIVE`` or its id.

    Raises:
        UserError: There is no such trial, or nothing was trained in it.
    """
    results = {result.trial: result for result in read_results(folder.results_file)}
    if pick in results:
        chosen = results[pick]
        if not chosen.is_ok or chosen.trial == BASE_TRIAL:
            why = f"it failed: {chosen.reason}" if chosen.reason else "it is the base model"
            raise UserError(f"--pick: trial {pick!r} has no LoRA, {why}; pick another")
        return chosen
    if pick_soup(pick, folder) is not None:
        command = f"rltune export {quote(str(folder.path))} --pick {pick}"
        raise UserError(f"--pick: {pick!r} is no trial but a soup; make a LoRA of it, {command}, and name its folder")
    front = read_front(folder, experiment)
    if front is None or front.knee is None:
        ids = _trained_ids(results.values())
        see = f"and none has ended well yet; see: rltune status {quote(str(folder.path))}"
        remedy = f"name one that ended well: {ids}" if ids else see
        raise UserError(f"--pick: no trained trial of {folder.path} is on its front; {remedy}")
    if pick == "knee":
        return front.knee
    kind, _, name = pick.partition(":")
    if kind == "best" and name in front.objectives.names:
        return front.best(name)
    best = ", ".join(f"best:{objective}" for objective in front.objectives.names)
    ids = _trained_ids(results.values())
    raise UserError(f"--pick: {pick!r} is not a choice; write knee, {best}, or a trial: {ids}")


def _trained_ids(results: Iterable[TrialResult]) -> str:
    """Return the trials that have a LoRA; empty if none has."""
    return ", ".join(sorted((r.trial for r in results if r.is_ok and r.trial != BASE_TRIAL), key=by_number))


def best_picks(front: Front) -> list[TrialResult]:
    """Return the knee and the best trained member in each objective, each once."""
    if front.knee is None:
        return []
    picked = [front.knee, *(front.best(name) for name in front.objectives.names)]
    return list({result.trial: result for result in picked}.values())
