"""A test for each of Optuna's private names that rltune uses: where one is gone, a sentence says what it is for."""

from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseGASampler, NSGAIISampler

from rltune.search.optuna_private import artifact_attribute, contains, generation_key

ADVICE = "find what has taken its place, and change rltune/search/optuna_private.py"


@pytest.mark.parametrize(
    ("distribution", "inside", "outside"),
    [
        (FloatDistribution(0.1, 1.0, log=True), 0.1, 1.1),
        (FloatDistribution(0.0, 1.0, step=0.1), 0.3, 0.35),
        (IntDistribution(2, 8, step=2), 4, 5),
        (CategoricalDistribution(["a", "b"]), "b", None),
    ],
)
def test_whether_a_distribution_has_a_value(distribution: BaseDistribution, inside: Any, outside: Any) -> None:
    if not hasattr(distribution, "_contains"):
        pytest.fail(
            f"Optuna {optuna.__version__}: a {type(distribution).__name__} has no _contains, by which trials of "
            f"another search space are told from those of this one; {ADVICE}"
        )
    assert contains(distribution, inside)
    if outside is not None:  # a choice that there is not has no number to ask of
        assert not contains(distribution, outside)


def test_where_a_genetic_sampler_notes_a_generation() -> None:
    if not hasattr(BaseGASampler, "_get_generation_key"):
        pytest.fail(
            f"Optuna {optuna.__version__} has no BaseGASampler._get_generation_key, without which nsga2 and nsga3 "
            f"forget the trials of an earlier start; {ADVICE}"
        )
    study = optuna.create_study(sampler=NSGAIISampler(seed=0, population_size=2))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    assert [trial.system_attrs[generation_key(study.sampler)] for trial in study.trials] == [0, 0, 1]


def test_how_a_trial_that_has_ended_has_an_artifact() -> None:
    study = optuna.create_study()
    attributes = artifact_attribute("001", "trial-001.png", "image/png")
    study.add_trial(optuna.create_trial(value=0.5, system_attrs=attributes))
    found = optuna.artifacts.get_all_artifact_meta(study.trials[0], storage=study._storage)
    if [meta.artifact_id for meta in found] != ["001"]:
        pytest.fail(
            f"Optuna {optuna.__version__} notes a trial's artifacts otherwise than rltune does, so that its dashboard "
            f"shows no pictures; {ADVICE}"
        )
    assert (found[0].filename, found[0].mimetype) == ("trial-001.png", "image/png")
