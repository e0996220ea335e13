"""All that a report tells of a run, read from its folder: nothing is worked out here that the run did not record."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rltune.config.load import Experiment
from rltune.errors import UserError
from rltune.intervals import half_width
from rltune.runs.base_scores import BaseScores, load_scores
from rltune.runs.confirmations import comparable, read_confirmations
from rltune.runs.fronts import search_front
from rltune.runs.layout import BASE_TRIAL, RunFolder, by_number
from rltune.runs.metrics import JUDGES
from rltune.runs.mixtures import Mixture, read_mixtures, reported_front, same_prompts
from rltune.runs.objectives import Front
from rltune.runs.record import Record, base_folder, read_record
from rltune.runs.results import TrialResult, read_results
from rltune.runs.rows import read_metrics


@dataclass(frozen=True)
class Gain:
    """What a trial has over the base model in one reward or judge, paired by prompt and noise."""

    value: float
    """The trial's own mean over prompts."""
    gain: float
    half: float | None
    """Half the width of the gain's 95 % interval over prompts; None of a single prompt."""

    @property
    def is_above(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.half is not None and self.gain > self.half

    @property
    def is_below(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.half is not None and self.gain < -self.half


@dataclass(frozen=True)
class Gathered:
    """A run as its folder has it now."""

    folder: RunFolder
    experiment: Experiment
    record: Record | None
    results: tuple[TrialResult, ...]
    """Trials that ended, in the order in which they did, the base model among them."""
    front: Front
    """By the fresh measurements of its members where all have one."""
    searched: Front
    """By the numbers that trials were chosen by."""
    scores: BaseScores
    fresh: Mapping[str, TrialResult]
    """Member of the front, and base model -> what it measured on fresh prompts; empty where it was not."""
    mixtures: tuple[Mixture, ...] = ()
    """Soups, and LoRAs at other strengths, measured on the same prompts."""

    @cached_property
    def base(self) -> TrialResult:
        """The base model by the numbers of the search."""
        return next(result for result in self.results if result.trial == BASE_TRIAL and result.is_ok)

    @cached_property
    def trained(self) -> tuple[TrialResult, ...]:
        """Trained trials with a result, stopped ones included, by number."""
        rows = [result for result in self.results if result.trial != BASE_TRIAL and result.is_ok]
        return tuple(sorted(rows, key=lambda result: by_number(result.trial)))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Rewards and judges that were measured: objectives first, then the other rewards, then the judges."""
        measured = [key.removeprefix("gain/") for key in self.base.metrics if key.startswith("gain/")]
        measured = [name for name in measured if not name.endswith("_se") or f"{name[:-3]}" not in measured]
        first = [*self.objectives, *self.rewards]
        return tuple(dict.fromkeys([name for name in first if name in measured] + measured))

    @property
    def objectives(self) -> tuple[str, ...]:
        """What the front is over."""
        return self.front.objectives.names

    @cached_property
    def rewards(self) -> tuple[str, ...]:
        """What is trained on."""
        return tuple(self.experiment.shared.rewards)

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """Searched settings, by dotted path, in the order of the experiment."""
        return tuple(self.experiment.space)

    @cached_property
    def members(self) -> frozenset[str]:
        """Trials on the front."""
        return frozenset(member.trial for member in self.front.members)

    def is_better_up(self, name: str) -> bool:
        """Whether more of a reward or judge is better."""
        return JUDGES.get(name, True)

    def shown(self, result: TrialResult) -> TrialResult:
        """Return a trial by the numbers that are reported of it: fresh ones where the front is by those."""
        return self.fresh.get(result.trial, result)

    def gain(self, result: TrialResult, name: str) -> Gain | None:
        """Return what a trial gained in a reward or judge, by the numbers given; None where it was not measured."""
        is_fresh = result.trial in self.fresh and self.fresh[result.trial] is result
        return _gain(result.metrics, name, self.front.num_prompts if is_fresh else self.searched.num_prompts)

    def fresh_gain(self, metrics: Mapping[str, float], name: str) -> Gain | None:
        """Return what a mixture gained, which is measured on fresh prompts alone; None where it was not measured."""
        return _gain(metrics, name, self.front.num_prompts)

    def rows(self, trial: str) -> list[dict[str, Any]]:
        """Return the rows of a trial's ``metrics.jsonl``; none where they cannot be read."""
        try:
            return read_metrics(self.folder.trial_dir(trial) / "metrics.jsonl")
        except (OSError, ValueError):
            return []

    def named(self) -> str:
        """Return the run folder as a command names it from where the run was started, else whole."""
        start = Path(self.record.work_dir) if self.record else Path.cwd()
        path = self.folder.path
        return str(path.relative_to(start)) if path.is_relative_to(start) else str(path)


def _gain(metrics: Mapping[str, float], name: str, num_prompts: int) -> Gain | None:
    if f"gain/{name}" not in metrics:
        return None
    half = half_width(metrics.get(f"gain/{name}_se"), num_prompts - 1)
    return Gain(metrics[f"eval/{name}"], metrics[f"gain/{name}"], half)


def gather(folder: RunFolder, experiment: Experiment) -> Gathered:
    """Read a run.

    Raises:
        UserError: The base model has no result yet, so that there is nothing to compare with.
        RunError: A record of the run cannot be read.
    """
    record = read_record(folder)
    scores = load_scores(base_folder(folder, record))
    results = read_results(folder.results_file)
    searched = search_front(results, experiment, scores)
    if searched is None or scores is None:
        raise UserError(f"{folder.path}: the base model has no result yet, so there is nothing to report; wait for it")
    confirmations, mixtures = read_confirmations(folder), read_mixtures(folder)
    front = reported_front(searched, experiment, confirmations, mixtures)
    return Gathered(
        folder=folder,
        experiment=experiment,
        record=record,
        results=tuple(results),
        front=front,
        searched=searched,
        scores=scores,
        fresh=_fresh(front, results, experiment, confirmations),
        mixtures=tuple(same_prompts(mixtures, comparable(confirmations))),
    )


def _fresh(
    front: Front, results: Sequence[TrialResult], experiment: Experiment, confirmations: Sequence[Any]
) -> dict[str, TrialResult]:
    found = comparable(confirmations)
    if front.fresh is None or found is None:
        return {}
    base = next(result for result in results if result.trial == BASE_TRIAL and result.is_ok)
    again = [*front.members, found.apply(base, experiment)]
    return {result.trial: result for result in again if result is not None}


def recorded_prompts(folder: RunFolder) -> list[tuple[str, str]]:
    """Return the held-out prompts of a run and what tells their pictures apart; none where its copy is not there."""
    try:
        rows = json.loads((folder.prompts_dir / "eval.json").read_text(encoding="utf-8"))
        return [(row, "") if isinstance(row, str) else (str(row["prompt"]), json.dumps(row)) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return []
