"""LoRAs of a run mixed without training: what they measured, and what a front is with them. Only reads files.

P: prompts. N: points. D: objectives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rltune.config.load import Experiment
from rltune.intervals import half_width, standard_error
from rltune.pareto.fresh import fresh_volume, prob_non_dominated, volume_by_prompt
from rltune.pareto.front import dominators
from rltune.records import from_record
from rltune.runs.confirmations import Array, Confirmation, Confirmed, comparable, confirmed_front, gains_PD
from rltune.runs.layout import RunFolder
from rltune.runs.metrics import violations
from rltune.runs.objectives import Front, Soup, Soups
from rltune.runs.results import TrialResult
from rltune.runs.store import read_json_lines


@dataclass(frozen=True)
class Mixture:
    """What a mixture of LoRAs measured on the fresh prompts of its run."""

    name: str
    weights: Mapping[str, float]
    """Trial -> weight of its update. Of several they sum to 1, a soup; of one alone it is its strength."""
    checkpoints: Mapping[str, str]
    """Trial -> which of its checkpoints, as ``TrialResult.checkpoint``."""
    num_prompts: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Each reward's and judge's mean over the images of every prompt."""
    prompts: Sequence[str] = ()
    """The prompts, in this order."""
    num_reused: int = 0
    """Of the prompts, those that trials had been chosen by."""
    mix: Mapping[str, float] = field(default_factory=dict)
    """Reward -> weight of its LoRA, of a point of a trial that is a basis; together 1."""
    foreseen: Mapping[str, float] = field(default_factory=dict)
    """``eval/NAME`` of such a point on the prompts and noise of the search, which trials are chosen by."""

    @property
    def is_on_front(self) -> bool:
        """Whether it may be on the front, a soup or a point of a basis, and not a LoRA at another strength."""
        return self.is_soup or bool(self.mix)

    @property
    def is_soup(self) -> bool:
        """Whether it is of several trials."""
        return len(self.weights) > 1

    @property
    def made_of(self) -> tuple[tuple[str, str, float], ...]:
        """What tells it from others: trials, checkpoints and weights, rewards and the weights of their LoRAs."""
        trials = sorted((trial, self.checkpoints[trial], weight) for trial, weight in self.weights.items())
        return (*trials, *((reward, "", round(weight, 9)) for reward, weight in self.mix.items()))

    @property
    def row(self) -> Confirmation:
        """Its measurements as those of a trial."""
        return Confirmation(
            self.name, "", self.num_prompts, self.metrics, values=self.values, prompts=self.prompts,
            num_reused=self.num_reused,
        )  # fmt: skip


def read_mixtures(folder: RunFolder) -> list[Mixture]:
    """Return the mixtures of a run, in the order in which they were measured; [] where there are none."""
    return [from_record(Mixture, row, folder.mixtures_file) for row in read_json_lines(folder.mixtures_file)]


def same_prompts(mixtures: Sequence[Mixture], found: Confirmed | None) -> list[Mixture]:
    """Return the mixtures that compare with the confirmations of a run, the newest of each name."""
    if found is None:
        return []
    rows = {row.name: row for row in mixtures if list(row.prompts) == list(found.base.prompts)}
    return list(rows.values())


def reported_front(
    searched: Front, experiment: Experiment, confirmations: Sequence[Confirmation], mixtures: Sequence[Mixture]
) -> Front:
    """Return the front of a search as it is reported: by fresh measurements where all members have one, with soups.

    All soups are told of, and those are on the front that keep every constraint and that nothing else has beaten. They
    are picked by the very numbers that are reported of them, unlike members, whom the search has picked by others: luck
    has raised them. The hypervolume is free of that: it takes every soup in the place where it was to be expected
    before it was measured, which is between its LoRAs, and every point of a basis where the search's prompts have it.
    """
    front, found = confirmed_front(searched, experiment, confirmations), comparable(confirmations)
    if front is None or found is None:
        return searched
    rows = {
        row.name: row
        for row in same_prompts(mixtures, found)
        if row.is_on_front and all(f"eval/{name}" in row.metrics for name in front.objectives.names)
    }
    if not rows:
        return front
    results = [_result(row, experiment, found) for row in rows.values()]
    members = [member for member in front.members if member.is_feasible]
    counted = [*members, *(soup for soup in results if soup.is_feasible)]
    gains = {m.trial: gains_PD(front, found.of(m) or found.base, found) for m in members}
    gains |= {name: gains_PD(front, row.row, found) for name, row in rows.items()}
    probable = _probabilities([point.trial for point in counted], gains)
    beaten = _beaten(front, [*counted, _result(found.base, experiment, found)])
    told = tuple(
        Soup(
            soup,
            rows[soup.trial].weights,
            _broken(soup) or beaten[soup.trial],
            probable.get(soup.trial),
            rows[soup.trial].mix,
        )
        for soup in results
    )
    return replace(front, soups=_soups(front, searched, told, gains, rows))


def _result(row: Mixture | Confirmation, experiment: Experiment, found: Confirmed) -> TrialResult:
    broken = violations(experiment.shared, row.metrics, found.base.metrics)
    name = row.name if isinstance(row, Mixture) else row.trial
    return TrialResult(name, "ok", {}, {}, metrics=row.metrics, constraints=broken)


def _broken(soup: TrialResult) -> str:
    broken = [f"{name} by {bad:.3g}" for name, bad in soup.constraints.items() if bad > 0]
    return f"breaks {', '.join(broken)}" if broken else ""


def _beaten(front: Front, points: Sequence[TrialResult]) -> dict[str, str]:
    """Return by which other each point is beaten, in words; empty where by none."""
    by = dominators(front.objectives.signed_ND(points))
    return {
        point.trial: "" if row is None else f"{points[row].trial} is at least as good in every objective"
        for point, row in zip(points, by, strict=True)
    }


def _probabilities(names: Sequence[str], gains: Mapping[str, Array]) -> dict[str, float]:
    """Return how probable it is that nothing beats each point, the base model included; nothing of a single prompt."""
    used = [gains[name] for name in names]
    if len({len(own_PD) for own_PD in used}) != 1 or len(used[0]) < 2:
        return {}
    probable_N = prob_non_dominated(np.stack([*used, np.zeros_like(used[0])], axis=1))
    return dict(zip(names, probable_N.tolist(), strict=False))


def _soups(
    front: Front,
    searched: Front,
    told: tuple[Soup, ...],
    gains: Mapping[str, Array],
    rows: Mapping[str, Mixture],
) -> Soups:
    """Return the soups with the hypervolume that they and the members cover together."""
    kept = [chosen for chosen, member in zip(front.chosen, front.members, strict=True) if member.is_feasible]
    places = dict(zip((member.trial for member in kept), searched.places_ND(kept), strict=True))
    num_members = len(places)
    for soup in told:
        if soup.mix and soup.result.is_feasible:
            places[soup.name] = searched.places_ND([replace(soup.result, metrics=rows[soup.name].foreseen)])[0]
        elif soup.result.is_feasible and all(trial in places for trial in soup.weights):
            parts = [weight * places[trial] for trial, weight in soup.weights.items()]
            places[soup.name] = np.sum(parts, axis=0)
    if not num_members:
        return Soups(told, 0.0, None, None)
    places_ND, gains_PND = np.stack([*places.values()]), np.stack([gains[name] for name in places], axis=1)
    whole = fresh_volume(places_ND, gains_PND)
    own_P = volume_by_prompt(places_ND[:num_members], gains_PND[:, :num_members])
    growth_P = volume_by_prompt(places_ND, gains_PND) - own_P
    return Soups(told, whole.value, whole.half_width, half_width(standard_error(growth_P), len(growth_P) - 1))
