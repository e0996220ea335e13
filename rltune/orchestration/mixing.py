"""What a run mixes at its end: soups of the best LoRAs of its front, each of them at other strengths, and bases."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, combinations_with_replacement

from rltune.config.load import Experiment
from rltune.export.picks import best_picks
from rltune.runs.confirmations import comparable, read_confirmations
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.mixtures import Mixture, read_mixtures, same_prompts
from rltune.runs.objectives import Front
from rltune.runs.results import TrialResult

SOUP_WEIGHTS = (0.75, 0.5, 0.25)
"""Of the first of two LoRAs."""
STRENGTHS = (0.25, 0.5, 0.75, 1.25)
"""Beside 0, the base model, and 1, the LoRA itself, which are measured in any case."""


def mixable(
    front: Front, experiment: Experiment, is_comparable: Callable[[TrialResult], bool]
) -> tuple[list[TrialResult], list[TrialResult]]:
    """Return the LoRAs that soups are grown from, and those that are measured at other strengths.

    Args:
        front: By fresh measurements.
        experiment: Of the run.
        is_comparable: Whether a trial is drawn and scored as the base model of the run is.
    """
    asked = experiment.shared.sweep
    if front.fresh is None or not (asked.soup or asked.strengths):
        return [], []
    picks = [result for result in best_picks(front) if is_comparable(result)]
    plain = [result for result in picks if not experiment.concrete(result.values).model.lora.dora]
    return plain if asked.soup else [], picks if asked.strengths else []


def wanted_points(
    front: Front, experiment: Experiment, folder: RunFolder, is_comparable: Callable[[TrialResult], bool]
) -> list[Mixture]:
    """Return the points of the bases on a front that are not measured yet: a grid on the simplex, named by the weights.

    Every basis is a member at the weights of its own rewards, which is no other point.
    """
    if front.fresh is None:
        return []
    known = same_prompts(read_mixtures(folder), comparable(read_confirmations(folder)))
    done = {row.made_of for row in known}
    wanted = []
    for trial in front.members:
        if trial.trial == BASE_TRIAL or not is_comparable(trial):
            continue
        config = experiment.concrete(trial.values)
        if config.model.adapter.kind != "basis":
            continue
        names, steps = config.trained_rewards, config.model.basis.points - 1
        total = sum(config.weights[name] for name in names)
        own = tuple(round(config.weights[name] / total, 9) for name in names)
        for chosen in combinations_with_replacement(range(len(names)), steps):
            mix = {name: chosen.count(i) / steps for i, name in enumerate(names)}
            called = f"{trial.trial}@{','.join(f'{weight:.3g}' for weight in mix.values())}"
            made = Mixture(called, {trial.trial: 1.0}, {trial.trial: trial.checkpoint}, mix=mix)
            if made.made_of not in done and tuple(round(weight, 9) for weight in mix.values()) != own:
                wanted.append(made)
    return wanted


def wanted_mixtures(
    soup_of: Sequence[TrialResult], at_strengths: Sequence[TrialResult], folder: RunFolder
) -> list[Mixture]:
    """Return the mixtures that are not measured yet, named and without measurements."""
    known = read_mixtures(folder)
    done = {row.made_of for row in same_prompts(known, comparable(read_confirmations(folder)))}
    names = {row.name for row in known}
    wanted = []
    for weights, trials in _recipes(soup_of, at_strengths):
        made = Mixture("", weights, {trial.trial: trial.checkpoint for trial in trials})
        if made.made_of in done:
            continue
        name = _free_name(made, names)
        names.add(name)
        wanted.append(Mixture(name, made.weights, made.checkpoints))
    return wanted


def _recipes(
    soup_of: Sequence[TrialResult], at_strengths: Sequence[TrialResult]
) -> Iterator[tuple[dict[str, float], tuple[TrialResult, ...]]]:
    for one, other in combinations(soup_of, 2):
        for weight in SOUP_WEIGHTS:
            yield {one.trial: weight, other.trial: 1 - weight}, (one, other)
    for trial in at_strengths:
        for strength in STRENGTHS:
            yield {trial.trial: strength}, (trial,)


def _free_name(made: Mixture, names: set[str]) -> str:
    """Return what a mixture is called: a soup by its number, since it is picked by that; a strength by itself."""
    if not made.is_soup:
        ((trial, strength),) = made.weights.items()
        return f"{trial}@{strength:g}"
    return next(name for number in range(1, len(names) + 2) if (name := f"soup-{number}") not in names)
