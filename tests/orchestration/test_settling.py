"""Where the sampler's open settings become numbers: once, from the model's files, and for good in a run's record."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rltune.config.load import parse_experiment
from rltune.config.yamlfile import write_yaml
from rltune.diffusion.outline import find_pipeline, load_outline
from rltune.errors import ExperimentError, UserError
from rltune.orchestration import campaign, inspection, settling
from rltune.orchestration.claiming import claim_run
from rltune.orchestration.last_step import last_step_note
from rltune.orchestration.plan import Plan, plan, this_machine
from rltune.runs.layout import RunFolder
from rltune.runs.record import read_run
from rltune.training.setup import base_key, base_settings
from tests import tiny_families, tiny_llm_families
from tests.diffusion.test_defaults import kept
from tests.run_folders import OWN

FIXED: dict[str, Any] = {"rewards": {"brightness": {}}, "optim": {"steps": 2, "batch": 2}}


def planned(folder: Path, raw: dict[str, Any] = FIXED, **settings: bool) -> Plan:
    experiment = parse_experiment(write_yaml(raw), "x.yaml")
    return plan(experiment, [this_machine()], RunFolder(folder / "run"), **settings)


def on(base: Path | str, **sections: Any) -> dict[str, Any]:
    return {**FIXED, "model": {"base": str(base)}, **sections}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "key"),
    [
        ({}, "b1356866dcd7"),
        ({"steps": 12, "guidance": 3.0}, "582a7290c705"),
        ({"steps": 8, "guidance": 3, "eta": 1.0}, "8486dff34508"),
    ],
)
def test_measurements_of_the_built_in_model_keep_their_names(tmp_path: Path, sampler: Any, key: str) -> None:
    """The names that these had while 20 steps, guidance 5 and eta 0 were everyone's defaults."""
    config = planned(tmp_path, {"rewards": {"brightness": {}}, "sampler": sampler}).experiment.shared
    assert base_key(config) == key


@pytest.mark.slow
def test_what_is_new_in_the_sampler_counts_where_it_is_written(tmp_path: Path) -> None:
    shared = planned(tmp_path).experiment.shared
    for update in ({"negative": "blurry"}, {"rule": "flow_grpo"}, {"embedded_guidance": 3.0}):
        other = shared.model_copy(update={"sampler": shared.sampler.model_copy(update=update)})
        assert base_settings(other)["sampler"].items() >= update.items()
        assert base_key(other) != base_key(shared)


@pytest.mark.slow
def test_a_search_over_k_is_held_to_the_models_own_steps(tmp_path: Path) -> None:
    raw = {**FIXED, "estimator": {"k": {"int": [1, 21]}}}
    with pytest.raises(ExperimentError, match=r"x\.yaml:\d+ estimator\.k\.int\[1\]: K must not exceed the 20 sampling"):
        planned(tmp_path, raw)
    raw["estimator"]["k"] = {"int": [1, 20]}
    experiment = planned(tmp_path, raw).experiment
    assert experiment.concrete({"estimator.k": 20}).sampler.steps == 20


def test_a_policy_gradient_without_noise_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"sampler\.eta: ddpo learns from the noise of sampling, got eta 0"):
        planned(tmp_path, {**FIXED, "estimator": {"name": "ddpo"}})


def test_files_without_weights_are_enough_to_settle(tmp_path: Path) -> None:
    base = kept(tiny_llm_families.z_image(), tmp_path / "z")
    experiment = parse_experiment(write_yaml(on(base, sampler={"eta": 0.5})), "x.yaml")
    sampler = settling.settle(experiment, RunFolder(tmp_path / "run"), may_fetch=False).shared.sampler
    assert (sampler.steps, sampler.guidance, sampler.eta, sampler.embedded_guidance) == (8, 1.0, 0.5, None)


@pytest.mark.slow
def test_a_run_goes_on_with_the_numbers_it_was_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = planned(tmp_path)
    claim = claim_run(first.folder, first.experiment, precision="fp32")
    own = {"sampler.steps": 4, "sampler.guidance": 1.0, "sampler.eta": 1.0}
    monkeypatch.setattr(settling, "_own", lambda *_, **__: own)
    again = planned(tmp_path)
    assert again.experiment.shared.sampler == first.experiment.shared.sampler
    resumed = claim_run(again.folder, again.experiment, precision="fp32")
    assert resumed.key_of(resumed.experiment.shared) == claim.key_of(claim.experiment.shared)
    assert read_run(first.folder.path)[1].shared.sampler == first.experiment.shared.sampler
    recorded = json.loads(first.folder.resolved_file.read_text())["settings"]["sampler"]
    assert (recorded["steps"], recorded["guidance"], recorded["eta"]) == (20, 5.0, 0.0)


def test_a_model_that_is_not_here_leaves_open_what_a_run_must_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "check_hub", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    open_plan = planned(tmp_path, on("some/model", sampler={"eta": 0.0}))
    assert open_plan.undecided == ("sampler.steps", "sampler.guidance")
    with pytest.raises(UserError, match=r"^sampler.steps, sampler.guidance: the model's own, and .*fetch some/model"):
        campaign._check_decided(open_plan)

    def fetch(base: str, revision: str | None) -> Any:
        assert (base, revision) == ("some/model", None)
        return settling.read_defaults(kept(tiny_families.flux(), tmp_path / "flux"), base=base)

    monkeypatch.setattr(settling, "fetch_defaults", fetch)
    decided = planned(tmp_path, on("some/model", sampler={"eta": 0.0}), may_fetch=True)
    assert not decided.undecided
    sampler = decided.experiment.shared.sampler
    assert (sampler.steps, sampler.guidance, sampler.embedded_guidance) == (28, 1.0, 3.5)
    with pytest.raises(ExperimentError, match=r"K must not exceed the 28 sampling steps"):
        planned(tmp_path, on("some/model", estimator={"k": 29}), may_fetch=True)


def test_a_plan_says_where_the_last_step_alone_trains_next_to_nothing(tmp_path: Path) -> None:
    """By the table: the last step of DDIM with leading timesteps is close to the clean image."""
    model = load_outline(find_pipeline("builtin") or tmp_path, base="builtin")
    last = model.read_table(num_steps=20, eta=0.0, shape=model.latent_shape(*model.size_px)).path_weight(19, None)

    def note(estimator: Any, **sampler: Any) -> str:
        raw = {**FIXED, "estimator": estimator, "sampler": sampler}
        experiment = parse_experiment(write_yaml(raw), "x.yaml").settled(OWN)
        return last_step_note(experiment, model)

    assert abs(last) < 0.03
    for estimator in (
        {"name": "draft"},
        {"name": "draft_lv"},
        {"k": 1},
        {"k": 1, "draw": "fixed"},
        {"name": {"choice": ["draft", "draft_lv"]}},
    ):
        text = note(estimator)
        assert text.startswith(
            f"at K = 1 the last of 20 steps alone is trained, by which the image moves {abs(last):.1%}"
        )
        assert "set estimator.k to 2 or more" in text
    for estimator in ({"name": "draft", "k": 2}, {"k": 2}, {}, {"name": "refl"}, {"name": "drtune", "k": 1}):
        assert note(estimator) == ""
    assert note({"k": 1, "draw": "gaussian"}) == ""
    assert note({"k": {"choice": [1, 4]}}) == ""  # the search finds out
    assert note({"name": {"choice": ["draft", "refl"]}}) == ""


def test_the_weight_of_the_last_step_is_the_schedule_s_and_not_the_name_s(tmp_path: Path) -> None:
    """A shift that is applied twice leaves Stable Diffusion 3's last step 0.9 %; FLUX.1 schnell's has a quarter."""
    for make, is_little in ((tiny_families.sd3, True), (lambda: tiny_families.flux(is_dev=False), False)):
        model = tiny_families.family_of(make())
        experiment = parse_experiment(write_yaml(on("x", estimator={"name": "draft"})), "x.yaml")
        own = {f"sampler.{name}": value for name, value in asdict(model.defaults("x")).items() if value is not None}
        assert bool(last_step_note(experiment.settled(own), model)) == is_little


def test_a_network_that_is_told_no_guidance_is_given_none(tmp_path: Path) -> None:
    with pytest.raises(
        ExperimentError, match=r"sampler.embedded_guidance: the network of 'builtin' is told no guidance"
    ):
        planned(tmp_path, {**FIXED, "sampler": {"embedded_guidance": 3.5}})


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"sampler": {"attention": {"strength": {"choice": [0.0, 1.0]}}}},
        {"regularize": {"attention": {"float": [0.0, 2.0]}}},
    ],
)
def test_attention_is_refused_before_the_start_where_there_is_none_of_its_kind(tmp_path: Path, sections: Any) -> None:
    base, where = tmp_path / "flux", next(iter(sections))
    tiny_families.flux().save_pretrained(base)
    with pytest.raises(
        ExperimentError, match=rf"{where}\.attention: only UNets .*whose network is a FluxTransformer2D"
    ):
        planned(tmp_path, on(base, **sections))
    layers = {"sampler": {"attention": {"strength": 1.0, "layers": ["up_blocks.7"]}}}
    with pytest.raises(
        ExperimentError, match=r"sampler\.attention\.layers: .*got 'up_blocks\.7'; there is down_blocks\.0"
    ):
        planned(tmp_path, {**FIXED, **layers})
    assert planned(tmp_path, {**FIXED, **sections}).experiment


def test_a_rule_of_flow_models_is_refused_for_others(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"rule 'flow_grpo' is that of a flow model, and DDIM is of another kind"):
        planned(tmp_path, {**FIXED, "sampler": {"rule": "flow_grpo", "eta": 0.7}})
