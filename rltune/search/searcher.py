"""Optuna over an experiment's distributions: ask for a trial's knobs, tell how it ended. Knows nothing of Ray."""

import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseGASampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from rltune.config.distributions import Choice, Distribution, FloatRange, IntRange, LogFloatRange, Simplex
from rltune.config.load import Experiment
from rltune.runs.layout import TrialSpec
from rltune.runs.objectives import Objectives
from rltune.runs.results import TrialResult
from rltune.search.features import Conditions
from rltune.search.optuna_private import generation_key
from rltune.search.surrogate import SHARE, SurrogateSampler

logger = logging.getLogger(__name__)

SAMPLERS = ("surrogate", "tpe", "gp", "nsga2", "nsga3", "random", "quasi_random", "grid")
HELD_BY_CONSTRAINTS = ("tpe", "gp", "nsga2", "nsga3")
"""Of these, Optuna's that learn: from trials that completed alone, so that a failed one has to be told as one."""
FAILED = "failed"
"""Name of the constraint that a failed trial is told to have broken."""
SIMPLEX = "simplex"
"""Parameters ``simplex[0]`` .. ``simplex[n-2]`` in [0, 1] stand for n weights."""


def make_sampler(
    name: str,
    seed: int,
    num_trials: int,
    distributions: Mapping[str, BaseDistribution],
    *,
    conditions: Mapping[str, Conditions] | None = None,
    first_seed: int | None = None,
) -> optuna.samplers.BaseSampler:
    """Return an Optuna sampler by the name it has in an experiment, for a search of so many trials.

    Args:
        name: In the experiment.
        seed: Of its draws.
        num_trials: Of the search.
        distributions: Of every parameter.
        conditions: Of parameters that count only where each of these choices has taken one of these options.
        first_seed: What ``seed`` was at the first start, on a resume.

    Raises:
        ValueError: The name is not one of ``SAMPLERS``.
    """
    # Optuna's population of 50 is drawn at random, which is all that a sweep of up to 50 trials would see of it
    population = min(50, max(4, num_trials // 5))
    weights = [parameter for parameter in distributions if parameter.startswith(f"{SIMPLEX}[")]
    makers: Mapping[str, Any] = {
        "surrogate": lambda: SurrogateSampler(seed, distributions, weights, simplex_weights, conditions, first_seed),
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, multivariate=True),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=population),
        "nsga3": lambda: optuna.samplers.NSGAIIISampler(seed=seed, population_size=population),
        # scrambled Sobol points; what they do not cover, such as choices, is drawn at random
        "quasi_random": lambda: optuna.samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=5),
        "grid": lambda: optuna.samplers.RandomSampler(seed=seed),  # never asked: the grid suggests every value itself
    }
    if name not in makers:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # multivariate TPE and Sobol points
        sampler: optuna.samplers.BaseSampler = makers[name]()
    return sampler


def to_optuna(space: Mapping[str, Distribution]) -> dict[str, BaseDistribution]:
    """Return Optuna's distributions; n weights on the simplex become n - 1 parameters."""
    converted: dict[str, BaseDistribution] = {}
    num_weights = 0
    for path, distribution in space.items():
        match distribution:
            case Choice(options=options):
                converted[path] = CategoricalDistribution(options)
            case IntRange(low=low, high=high, step=step):
                converted[path] = IntDistribution(low, high, step=step)
            case FloatRange(low=low, high=high):
                converted[path] = FloatDistribution(low, high)
            case LogFloatRange(low=low, high=high):
                converted[path] = FloatDistribution(low, high, log=True)
            case Simplex():
                num_weights += 1
    return converted | {f"{SIMPLEX}[{i}]": FloatDistribution(0.0, 1.0) for i in range(num_weights - 1)}


def simplex_weights(uniforms: Sequence[float]) -> list[float]:
    """Return n + 1 weights, uniform on the simplex if the n arguments are uniform on [0, 1].

    Stick breaking: the share that weight i takes of what is left is Beta(1, n - i) distributed, whose inverse
    distribution function is 1 - (1 - u)^(1 / (n - i)). Weights normalised after independent draws would crowd the
    middle of the simplex.
    """
    left, weights = 1.0, []
    for i, uniform in enumerate(uniforms):
        share = 1.0 - (1.0 - uniform) ** (1.0 / (len(uniforms) - i))
        weights.append(left * share)
        left -= weights[-1]
    return [*weights, max(left, 0.0)]


def simplex_uniforms(weights: Sequence[float]) -> list[float]:
    """Return the arguments from which ``simplex_weights`` makes these weights; [] without any.

    Where nothing is left to take a share of, every argument would do, and it is 0.
    """
    uniforms = []
    for i, weight in enumerate(weights[:-1]):
        left = sum(weights[i:])
        share = weight / left if left > 0 else 0.0
        uniforms.append(1.0 - (1.0 - share) ** (len(weights) - 1 - i))
    return uniforms


def params_of(values: Mapping[str, Any], experiment: Experiment) -> dict[str, Any]:
    """Return the searcher's parameters that give these values, all or some of the searched settings."""
    weights = [values[path] for path in experiment.simplex_paths if path in values]
    params = {
        path: float(value) if isinstance(experiment.space[path], FloatRange | LogFloatRange) else value
        for path, value in values.items()
        if path not in experiment.simplex_paths
    }
    return params | {f"{SIMPLEX}[{i}]": uniform for i, uniform in enumerate(simplex_uniforms(weights))}


def values_of(params: Mapping[str, Any], experiment: Experiment) -> dict[str, Any]:
    """Return the value of every active searched setting from the searcher's parameters.

    Those are drawn for every setting, active or not. A sampler that skipped the others would, but for TPE, draw what
    has a condition at random for ever, since they learn only about what every trial has.
    """
    simplex_paths = experiment.simplex_paths
    uniforms = [params[f"{SIMPLEX}[{i}]"] for i in range(len(simplex_paths) - 1)]
    weights = dict(zip(simplex_paths, simplex_weights(uniforms), strict=True)) if simplex_paths else {}
    return experiment.active({**params, **weights})


class Search:
    """A study that lives in memory and is rebuilt from what the run folder says; nothing of it needs saving.

    Args:
        experiment: With the distributions and the ``search`` section.
        objectives: What is searched over.
        results: Trials that ended before, the base model left out.
        unfinished: Trials that were started before and have no result: they are asked for again first.
        prior_results: Ended trials of another run that the sampler learns from, values in this experiment's space.
    """

    def __init__(
        self,
        experiment: Experiment,
        objectives: Objectives,
        *,
        results: Sequence[TrialResult] = (),
        unfinished: Sequence[TrialSpec] = (),
        prior_results: Sequence[TrialResult] = (),
    ) -> None:
        self._experiment = experiment
        self._objectives = objectives
        self._distributions = to_optuna(experiment.space)
        self._waiting = list(unfinished)
        self._running: dict[str, optuna.Trial] = {}
        ids = [int(result.trial) for result in results] + [int(spec.id) for spec in unfinished]
        self._next_id = max(ids, default=0) + 1
        search = experiment.shared.search
        grid = experiment.grid_values if search.sampler == "grid" else None
        self._grid = None if grid is None else itertools.islice(grid, self._next_id - 1, None)
        self._points = search.points
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # a resumed search goes on with other draws than the first ones, which its trials already have
        seed = (search.seed + 1_000_003 * len(ids)) % 2**32
        conditions = {
            path: [(".".join(parent), options) for parent, options in kind.when]
            for path, kind in experiment.space.items()
            if kind.when
        }
        sampler = make_sampler(
            search.sampler,
            seed,
            search.trials,
            self._distributions,
            conditions=conditions,
            first_seed=search.seed,
        )
        directions = ["maximize" if sign > 0 else "minimize" for sign in objectives.signs_D]
        self.study = optuna.create_study(sampler=sampler, directions=directions)
        self._is_held_by_constraints = search.sampler in HELD_BY_CONSTRAINTS
        self._ended: TrialResult | None = None
        self._worst_D = np.full(len(objectives.names), np.inf)
        self._waiting_failures: list[TrialResult] = []
        for result in (*prior_results, *results):
            for told in self._as_sampler_understands(result):
                self._add(told)

    def ask(self) -> TrialSpec:
        """Return the next trial: what a kill interrupted, with its knobs, then the file's points, then new ones."""
        if self._waiting:
            spec = self._waiting.pop(0)
            self.study.enqueue_trial(dict(spec.params))
            trial = self.study.ask(self._distributions)
        else:
            # a trial's number is its place in the grid or among the points, so that resuming leaves none out
            place = self._next_id - 1
            if self._grid is not None:
                self.study.enqueue_trial(params_of(next(self._grid), self._experiment))
            elif place < len(self._points):
                self.study.enqueue_trial(params_of(self._points[place], self._experiment))
            trial = self.study.ask(self._distributions)
            spec = TrialSpec(f"{self._next_id:03d}", values_of(trial.params, self._experiment), dict(trial.params))
            self._next_id += 1
        self._running[spec.id] = trial
        trial.set_user_attr("trial", spec.id)
        return spec

    def tell(self, result: TrialResult) -> None:
        """Take the end of a trial that was asked for.

        The sampler learns from a failed one too, or the search would come back to where trials fail for as long as it
        looks good there.

        A stopped one tells what it was when it was stopped, like any other: it fell behind with these values, and by
        them it ranks behind here too. To rank it behind every trial that went all the way, or to leave it out, was
        worse on the simulator (experiments/README.md, Search samplers): most of what is known is then thrown away.
        """
        for told in self._as_sampler_understands(result):
            trial = self._running.pop(told.trial)
            if not told.is_ok:
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            for name, violation in told.constraints.items():
                trial.set_constraint(name, violation)
            for name, value in self._attributes(told).items():
                trial.set_user_attr(name, value)
            self.study.tell(trial, self._objectives.raw_D(told.metrics).tolist())

    def _as_sampler_understands(self, result: TrialResult) -> Iterator[TrialResult]:
        """Yield what a sampler is to be told now that a trial has ended.

        Optuna's samplers look at completed trials alone, and at their constraints: to them a failed trial is one that
        completed with the worst values so far and broke the constraint ``FAILED``, which all others keep. One that
        failed before any ended well has to wait for such values. The surrogate models failures as they are.
        """
        if not self._is_held_by_constraints:
            yield result
        elif not result.is_ok:
            self._waiting_failures.append(result)
        else:
            self._ended = result
            values_D = self._objectives.raw_D(result.metrics) * self._objectives.signs_D
            self._worst_D = np.minimum(self._worst_D, values_D)
            yield replace(result, constraints={**result.constraints, FAILED: -1.0})
        if self._ended is None:
            return
        worst = zip(self._objectives.names, (self._worst_D * self._objectives.signs_D).tolist(), strict=True)
        metrics = {f"eval/{name}": value for name, value in worst}
        # Optuna's Gaussian process asks for the same constraints of every trial; of the others nothing is known
        constraints = {**dict.fromkeys(self._ended.constraints, 0.0), FAILED: 1.0}
        for failure in self._waiting_failures:
            yield replace(failure, state="ok", metrics=metrics, constraints=constraints)
        self._waiting_failures.clear()

    def _add(self, result: TrialResult) -> None:
        frozen = frozen_trial(
            result, self._objectives, self._distributions, self._attributes(result), system=self._generation()
        )
        self.study.add_trial(frozen)

    def _attributes(self, result: TrialResult) -> dict[str, float]:
        """Return how far a stopped trial came."""
        if result.state != "stopped":
            return {}
        num_steps = result.values.get("optim.steps", self._experiment.shared.optim.steps)
        return {SHARE: min(result.metrics["step"] / num_steps, 1.0)}

    def _generation(self) -> dict[str, Any]:
        """Return what a genetic sampler notes at a trial; it breeds only from trials whose generation it knows."""
        sampler = self.study.sampler
        if not isinstance(sampler, BaseGASampler):
            return {}
        num_before = len(self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]))
        size = sampler.population_size
        assert size is not None, "make_sampler gives it"
        return {generation_key(sampler): num_before // size}


def frozen_trial(
    result: TrialResult,
    objectives: Objectives,
    distributions: Mapping[str, BaseDistribution],
    attributes: Mapping[str, Any] | None = None,
    system: Mapping[str, Any] | None = None,
) -> FrozenTrial:
    """Return a trial that ended as Optuna has it, under its id as ``trial`` and other ``attributes`` of its user's.

    ``system`` are the attributes that a sampler notes at its trials.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constraints of a finished trial are experimental in Optuna 5.0
        return create_trial(
            state=TrialState.COMPLETE if result.is_ok else TrialState.FAIL,
            values=objectives.raw_D(result.metrics).tolist() if result.is_ok else None,
            params=dict(result.params),
            distributions={name: distributions[name] for name in result.params},
            user_attrs={"trial": result.trial, **(attributes or {})},
            system_attrs=dict(system or {}),
            constraints=dict(result.constraints) or None,
        )


def is_finite(metrics: Mapping[str, float], objectives: Objectives) -> bool:
    """Whether every objective is there and every metric is finite; Optuna keeps a trial for ever otherwise."""
    has_all = all(f"eval/{name}" in metrics for name in objectives.names)
    return has_all and all(math.isfinite(value) for value in metrics.values())
