import re
from typing import Any

import pytest
from pydantic import ValidationError

from rltune.config.experiment import WHOLE_SWEEP, Context, RunConfig
from rltune.config.rules import Known
from rltune.config.schema import node_at


def run(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"rewards": {"a": {}, "b": {"weight": 0}}, **sections})


def test_defaults_run() -> None:
    assert run().weights == {"a": 1.0, "b": 0.0}


def test_a_section_without_content_is_all_defaults() -> None:
    empty = dict.fromkeys(
        name
        for name in RunConfig.model_fields
        if name not in ("name", "task", "rewards", "seed", "objectives", "track")
    )
    assert run(**empty, rewards={"a": None, "b": {"weight": 0, "options": None}}) == run()


def test_alpha_follows_the_rank_unless_it_is_a_number() -> None:
    assert run(model={"lora": {"rank": 16}}).model.lora.alpha_value == 16.0
    assert run(model={"lora": {"rank": 16, "alpha": 4}}).model.lora.alpha_value == 4.0


def test_objectives_are_every_reward_unless_they_are_named() -> None:
    assert run().objective_names == ("a", "b")
    assert run(objectives=["drift", "a"]).objective_names == ("drift", "a")


@pytest.mark.parametrize(
    "sections",
    [
        {"sampler": {"steps": 5}, "estimator": {"k": 5}},
        {"optim": {"batch": 12, "micro_batch": 3}, "resources": {"workers": 2}},
        {"optim": {"batch": 4, "micro_batch": 4}},
        {"sampler": {"height": 64, "width": 96}},
        {"constraints": {"b": {"min": 1, "max": 1}}},
        {"estimator": {"draw": "gaussian", "std": 2}},
        {"resources": {"gpus_per_worker": 0.5, "concurrent": 2, "threads_per_worker": 1}},
        {"sampler": {"steps": 5, "base_steps": 4}},
        {"sampler": {"steps": 5, "base_steps": 2}, "estimator": {"k": 3}},
        {"optim": {"batch": 6}, "prompts": {"images_per_prompt": 6}},
        {"optim": {"batch": 6}, "prompts": {"images_per_prompt": 3}, "resources": {"workers": 3}},
        {"optim": {"batch": 8, "micro_batch": 3}, "resources": {"workers": 3, "min_workers": 3}},
        {"resources": {"workers": 4, "min_workers": 1, "cpus_per_worker": 4, "accelerator": "H100"}},
        {"estimator": {"activation_gib": 0, "checkpoint": "serial"}},
        {"optim": {"ema": 0, "queries": 1}},
        {"regularize": {"drift": 1e6, "flatness_weights": 1, "flatness_image": 10}},
        {"search": {"prune": True, "grace": 40}, "evaluate": {"every": 20}, "optim": {"steps": 41}},
        {"search": {"prune": False, "grace": 30}, "evaluate": {"every": 20}},
        {"stop": {"broken_constraint": 1}, "constraints": {"a": {"min": 0}}},
        {"stop": {"gpu_hours": 1}},
    ],
)
def test_what_just_fits_is_valid(sections: dict[str, Any]) -> None:
    run(**sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sampler": {"steps": 5}, "estimator": {"k": 6}}, "estimator.k: K must not exceed the 5 sampling steps"),
        ({"optim": {"batch": 5}, "resources": {"workers": 6}}, "optim.batch: must give each of the 6 workers an image"),
        ({"sampler": {"steps": 5, "base_steps": 5}}, "sampler.base_steps: must leave at least one of the 5 steps"),
        (
            {"sampler": {"steps": 5, "base_steps": 2}, "estimator": {"k": 4}},
            "estimator.k: K must not exceed the 5 sampling steps (sampler.steps) minus 2 base steps, got 4",
        ),
        ({"optim": {"batch": 6}, "prompts": {"images_per_prompt": 4}}, "images_per_prompt: must divide optim.batch, 6"),
        ({"rewards": {"a": {"loss": "hinge"}}}, "rewards.a.loss: loss: hinge needs a target"),
        ({"rewards": {"a": {"target": 1}}}, "rewards.a.target: a linear loss has no target, got 1.0"),
        ({"sampler": {"width": 96}}, "sampler.width: needs sampler.height beside it"),
        ({"rewards": {}}, "rewards: there is nothing to train on"),
        ({"rewards": {"a": {"weight": 0}}}, "rewards.a.weight: no reward has a positive weight"),
        ({"search": {"prune": True, "grace": 100}}, "search.grace: a trial has ended at step 100, before any are"),
        ({"stop": {"broken_constraint": 1}}, "stop.broken_constraint: there is no constraint to break"),
        ({"rewards": {"a": {"relative": {"positive": "x"}}}}, "rewards.a.relative.positive: needs negative words"),
        ({"rewards": {"reward": {"reward": "a"}}}, "rewards.reward: something else is reported under this name"),
        (
            {"mixture": {"method": "non_dominated"}, "optim": {"batch": 8, "micro_batch": 2}},
            "mixture.method: non_dominated compares the images of a whole batch, got 8 in parts of 2",
        ),
    ],
)
def test_a_dictionary_from_ray_meets_the_same_rules(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        run(**sections)


def test_a_worker_does_not_know_which_estimator_needs_what() -> None:
    sections = {"rewards": {"a": {}}, "estimator": {"name": "policy", "checkpoint": "serial"}, "sampler": {"eta": 0}}
    RunConfig.model_validate(sections)  # a sampler without noise, and no serial mode: its caller has checked them
    known = Known(policy_estimators=("policy",), serial_estimators=("other",))
    with pytest.raises(ValidationError, match=r"sampler\.eta: (.|\n)*estimator\.checkpoint: "):
        RunConfig.model_validate(sections, context=Context(known))


@pytest.mark.parametrize(
    ("optim", "rounds"),
    [
        ({"steps": 7, "batch": 4}, 7),
        ({"steps": 7, "batch": 4, "queries": 28}, 7),
        ({"steps": 7, "batch": 4, "queries": 24}, 6),
        ({"steps": 7, "batch": 4, "queries": 25}, 7),
        ({"steps": 7, "batch": 4, "queries": 1}, 1),
    ],
)
def test_a_run_has_no_more_rounds_than_its_queries_pay_for(optim: dict[str, int], rounds: int) -> None:
    assert run(optim=optim).num_rounds == rounds


def test_trials_are_first_compared_at_the_first_evaluation_unless_told_otherwise() -> None:
    assert run(evaluate={"every": 7}).first_rung == 7
    assert run(evaluate={"every": 7}, search={"grace": 14}).first_rung == 14


def test_a_reward_is_what_its_key_says_unless_it_says_otherwise() -> None:
    config = run(rewards={"a": {}, "b": {"reward": "c"}, "d": {"reward": "my_rewards:redness", "weight": 0}})
    assert [config.kind_of(name) for name in config.rewards] == ["a", "c", "my_rewards:redness"]
    assert config.objective_names == ("a", "b", "d")
    assert config.weights == {"a": 1, "b": 1, "d": 0}


def test_several_clashes_are_raised_together() -> None:
    with pytest.raises(ValidationError, match=r"estimator\.k: (.|\n)*optim\.batch: (.|\n)*search\.grace: "):
        run(
            sampler={"steps": 20},
            estimator={"k": 21},
            optim={"batch": 1},
            resources={"workers": 2},
            search={"prune": True, "grace": 21},
        )


def test_a_run_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        run().optim.lr = 1.0  # type: ignore[misc]


def test_what_the_whole_sweep_shares_exists() -> None:
    assert all(node_at(tuple(path.split("."))) for path in WHOLE_SWEEP)


def test_a_tilde_is_the_users_home_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    options = {"weights": "~/w.pt", "text": "~ is a tilde", "n": 1}
    config = run(
        model={"base": "~/m"},
        prompts={"train": "~/p.txt", "eval": ["~/ is no path here"]},
        rewards={"a": {"options": options, "trust": {"reference": "~/r"}}},
        search={"warm_start": "~/runs/mix"},
    )
    reward = config.rewards["a"]
    assert (config.model.base, config.prompts.train, config.search.warm_start, reward.trust.reference) == (
        "/home/me/m",
        "/home/me/p.txt",
        "/home/me/runs/mix",
        "/home/me/r",
    )
    assert config.prompts.eval == ("~/ is no path here",)
    assert reward.options == {"weights": "/home/me/w.pt", "text": "~ is a tilde", "n": 1}
