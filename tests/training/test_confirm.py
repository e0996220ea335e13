"""Fresh measurements: other prompts and noise than the search's, the right adapters, gains over the base there."""

from pathlib import Path

import numpy as np
import pytest

from rltune.config.experiment import RunConfig
from rltune.diffusion.lora import add_lora, load_lora_state
from rltune.training.checkpoint import load_adapter
from rltune.training.confirm import Candidate, confirm, fresh_images
from rltune.training.evaluation import sample_and_score
from rltune.training.setup import base_key, build_run
from tests.training.runs import Make, train

HELD_OUT = ["a snail", "an octopus", "a crab", "a moth", "an owl"]


def on_five(make_config: Make, **sections: object) -> RunConfig:
    asked = {"prompts": 2, **sections.pop("evaluate", {})}  # type: ignore[dict-item]
    return make_config(prompts={"eval": HELD_OUT}, evaluate=asked, **sections)


def test_every_candidate_is_measured_by_itself(make_config: Make, tmp_path: Path) -> None:
    sections = [{"optim": {"lr": 5e-2, "steps": 2}}, {"model": {"lora": {"rank": 4, "alpha": 2}}, "seed": 4}]
    configs = [on_five(make_config, **section) for section in sections]
    folders = []
    for i, config in enumerate(configs):
        reporter = train(config, tmp_path / str(i))
        folders.append(reporter.latest())
    rows: dict[str, tuple[dict[str, float], dict[str, list[float]]]] = {}
    candidates = [Candidate(str(i), config, folders[i]) for i, config in enumerate(configs)]
    candidates.insert(1, Candidate("base", configs[0], None))
    confirm(candidates, lambda trial, metrics, values: rows.update({trial: (metrics, values)}))
    assert list(rows) == ["0", "base", "1"]

    scores, gains = {}, {}
    for i, config in enumerate(configs):
        run = build_run(config)
        images = fresh_images(run)
        drawn = sample_and_score(run.sampler, images, run.rewards, run.workers, batch_size=16)
        scores["base"] = drawn.values["brightness"]
        lora = config.model.lora
        add_lora(run.model.network, rank=lora.rank, alpha=lora.alpha_value, targets=lora.targets, seed=9)
        load_lora_state(run.model.network, load_adapter(folders[i]))
        trained = sample_and_score(run.sampler, images, run.rewards, run.workers, batch_size=16).values
        scores[str(i)] = trained["brightness"]
        gains[str(i)] = np.stack([trained[name] - drawn.values[name] for name in config.rewards])
    for trial, expected in scores.items():
        metrics, values = rows[trial]
        assert metrics["eval/brightness"] == pytest.approx(expected.mean(), rel=1e-12)
        assert metrics["gain/brightness"] == pytest.approx(expected.mean() - scores["base"].mean(), abs=1e-12)
        gains_DN = gains.get(trial, np.zeros((1, 4)))
        assert values["domination"] == (gains_DN > 0).all(axis=0).reshape(2, 2).mean(axis=1).tolist()
        assert values["collapse"] == (gains_DN < 0).all(axis=0).reshape(2, 2).mean(axis=1).tolist()
        assert values["brightness"] == pytest.approx(expected.reshape(2, 2).mean(axis=1).tolist(), rel=1e-9)
    assert rows["0"][0]["eval/brightness"] != rows["1"][0]["eval/brightness"] != rows["base"][0]["eval/brightness"]
    assert rows["base"][0]["eval/drift"] == 0 < rows["0"][0]["eval/drift"]


def test_the_noise_is_fresh_even_where_prompts_are_not(make_config: Make) -> None:
    run = build_run(on_five(make_config, evaluate={"prompts": 5}))
    fresh = fresh_images(run)
    assert fresh.prompts == run.eval_images.prompts
    old, new = (
        sample_and_score(run.sampler, images, run.rewards, run.workers, batch_size=16)
        for images in (run.eval_images, fresh)
    )
    assert (old.values["brightness"] != new.values["brightness"]).all()


def test_how_much_is_confirmed_is_no_other_base_model(make_config: Make) -> None:
    assert base_key(on_five(make_config, evaluate={"confirm": 3})) == base_key(on_five(make_config))
