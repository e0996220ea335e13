"""Fresh measurements: other prompts and noise than the search's, the right adapters, gains over the base there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rltune.config.experiment import RunConfig
from rltune.diffusion.lora import add_lora, load_lora_state
from rltune.training.checkpoint import load_adapter
from rltune.training.confirm import Candidate, Part, confirm, fresh_images
from rltune.training.evaluation import sample_and_score
from rltune.training.setup import base_key, build_run
from tests.training.runs import Make, train

HELD_OUT = ["a snail", "an octopus", "a crab", "a moth", "an owl"]


def on_five(make_config: Make, **sections: object) -> RunConfig:
    asked = {"prompts": 2, **sections.pop("evaluate", {})}  # type: ignore[dict-item]
    return make_config(prompts={"eval": HELD_OUT}, evaluate=asked, **sections)


@pytest.mark.long
def test_every_candidate_is_measured_by_itself(make_config: Make, tmp_path: Path) -> None:
    sections = [{"optim": {"lr": 5e-2, "steps": 2}}, {"model": {"lora": {"rank": 4, "alpha": 2}}, "seed": 4}]
    configs = [on_five(make_config, **section) for section in sections]
    folders = []
    for i, config in enumerate(configs):
        reporter = train(config, tmp_path / str(i))
        folders.append(reporter.latest())
    rows: dict[str, tuple[dict[str, float], dict[str, list[float]]]] = {}
    candidates = [Candidate(str(i), config, [Part(config, folders[i], 1.0)]) for i, config in enumerate(configs)]
    candidates.insert(1, Candidate("base", configs[0]))
    halves = [Part(config, folder, 0.5) for config, folder in zip(configs, folders, strict=True)]
    candidates += [
        Candidate("soup", configs[0], halves),
        Candidate("all", configs[0], [Part(configs[0], folders[0], 1.0), replace(halves[1], weight=0.0)]),
    ]
    candidates += [Candidate("off", configs[0], [replace(halves[0], weight=0.0)])]
    confirm(candidates, lambda trial, metrics, values, _: rows.update({trial: (metrics, values)}))
    assert list(rows) == ["0", "base", "1", "soup", "all", "off"]

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
    assert rows["all"][1]["brightness"] == pytest.approx(rows["0"][1]["brightness"], abs=1e-5)  # another order of sums
    assert rows["off"][1]["brightness"] == pytest.approx(rows["base"][1]["brightness"], abs=1e-6)
    by_hand = mixed_by_hand(configs, folders)
    assert rows["soup"][1]["brightness"] == pytest.approx(by_hand.reshape(2, 2).mean(axis=1).tolist(), abs=1e-5)
    assert rows["soup"][1]["brightness"] != pytest.approx(rows["0"][1]["brightness"], abs=1e-3)


def mixed_by_hand(configs: list[RunConfig], folders: list[Path]) -> np.ndarray:
    """Brightness with half of each update added to the weights themselves."""
    added: dict[str, torch.Tensor] = {}
    for config, folder in zip(configs, folders, strict=True):
        state, scale = load_adapter(folder), config.model.lora.alpha_value / config.model.lora.rank
        for name in [key.partition(".lora_A.")[0] for key in state if ".lora_A." in key]:
            update = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
            layer = name.removeprefix("base_model.model.")
            added[layer] = added.get(layer, 0) + 0.5 * scale * update
    run = build_run(configs[0])
    with torch.no_grad():
        for layer, update in added.items():
            run.model.network.get_submodule(layer).weight += update
    return sample_and_score(run.sampler, fresh_images(run), run.rewards, run.workers, batch_size=16).values[
        "brightness"
    ]


@pytest.mark.slow
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


@pytest.mark.long
def test_a_point_of_a_basis_is_its_loras_at_those_weights(make_config: Make, tmp_path: Path) -> None:
    config = on_five(make_config, model={"adapter": {"kind": "basis"}}, optim={"lr": 5e-2, "steps": 2})
    reporter = train(config, tmp_path)
    parts = [Part(config, reporter.latest(), 1.0)]
    found: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
    candidates = [
        Candidate("own", config, parts),
        Candidate("same", config, parts, mix=(0.75, 0.25)),
        Candidate("other", config, parts, mix=(0.0, 1.0)),
    ]
    confirm(candidates, lambda name, metrics, _, foreseen: found.update({name: (metrics, foreseen)}))
    own, same, other = (found[name] for name in ("own", "same", "other"))
    assert own[1] == {}
    assert same[0] == own[0]
    assert other[0]["eval/brightness"] != pytest.approx(own[0]["eval/brightness"], abs=1e-4)
    last = {name: value for name, value in reporter.reports[-1].items() if name.startswith("eval/")}
    # what the run itself measured on the prompts of the search; there as blocks of one adapter, here as one LoRA
    assert same[1] == pytest.approx({name: last[name] for name in same[1]}, abs=1e-5)
    assert set(same[1]) == set(last)
