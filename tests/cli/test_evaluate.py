"""``rltune evaluate``: what it measures is checked against the loops that a run itself is measured by."""

import csv
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict

from rltune.config.experiment import RunConfig
from rltune.training.evaluation import draw_images
from rltune.training.model_cache import load_base_model
from rltune.training.sampling import make_sampler
from rltune.training.setup import eval_image_set
from tests.cli.conftest import Call
from tests.cli.test_reading import ODD
from tests.cli.test_sample import export
from tests.run_folders import experiment, result, write_run

PROMPTS = ["a snail", "an octopus on a hill", "two crabs"]


@pytest.fixture(scope="module")
def config(make_config: Callable[..., RunConfig]) -> RunConfig:
    return make_config(prompts={"eval": PROMPTS})


@pytest.fixture(scope="module")
def lora(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported LoRA whose card says no more than where it comes from."""
    folder = export(config, tmp_path_factory.mktemp("exports") / ODD / "001", seed=1)
    card = {"base_model": config.model.base, "base_revision": None, "experiment": config.model_dump(mode="json")}
    again = {"noise": "search", "precision": "fp32", "prompts": PROMPTS}
    (folder / "rltune.json").write_text(json.dumps({**card, "measured_again": again}))
    return folder


def brightness(config: RunConfig, lora: Path | None, strength: float) -> np.ndarray[Any, Any]:
    """Each prompt's mean brightness by diffusers' own loading."""
    model = load_base_model(config, torch.device("cpu"))
    if lora is not None:
        model.pipeline.load_lora_weights(lora, adapter_name="x")
        model.pipeline.set_adapters(["x"], [strength])
    images = eval_image_set(config, model)
    drawn = draw_images(make_sampler(config, model), images, range(len(images)), torch.device("cpu"))
    return drawn.mean(dim=(1, 2, 3)).double().numpy().reshape(len(PROMPTS), -1).mean(axis=1)


@pytest.mark.long
def test_values_are_those_of_the_images_at_every_strength(call: Call, lora: Path, config: RunConfig) -> None:
    code, out, err = call("evaluate", lora, "--strength", "0,0.5,-0.25", "--rewards", "brightness,drift", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    base, *curve = told["models"]
    assert [(row["model"], row["strength"]) for row in curve] == [("001", 0.0), ("001", 0.5), ("001", -0.25)]
    assert (told["base_model"], told["noise"], told["images_per_prompt"]) == (config.model.base, "search", 2)
    expected = brightness(config, None, 0.0)
    np.testing.assert_allclose(base["values"]["brightness"], expected, atol=1e-6)
    assert curve[0]["values"] == base["values"]
    for row in curve[1:]:
        values = brightness(config, lora, row["strength"])
        np.testing.assert_allclose(row["values"]["brightness"], values, atol=1e-5)
        figure, drift = row["figures"]
        gains = values - expected
        assert figure["gain"] == pytest.approx(gains.mean(), abs=1e-5)
        assert figure["gain_half_width"] == pytest.approx(4.302653 * gains.std(ddof=1) / 3**0.5, abs=1e-4)  # t, 2 d.f.
        assert drift["name"] == "drift"
        assert drift["value"] > 0.01


@pytest.mark.slow
def test_any_prompts_and_rewards_as_csv_and_json(call: Call, lora: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text('a <b>whale</b>, "blue"\n# no prompt\na whale\n')
    arguments = ["--prompts", prompts, "--rewards", "smoothness", "--images", "1", "--steps", "2"]
    code, out, err = call("evaluate", lora, *arguments, "--csv", "-o", tmp_path / "new" / "x.json")
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(StringIO(out)))
    assert [(row["model"], row["strength"], row["name"]) for row in rows] == [
        ("base", "0.0", "smoothness"),
        ("001", "1.0", "smoothness"),
    ]
    told = json.loads((tmp_path / "new" / "x.json").read_text())
    assert told["prompts"] == ['a <b>whale</b>, "blue"', "a whale"]
    assert (told["noise"], told["sampler"]["steps"], told["images_per_prompt"]) == ("fresh", 2, 1)
    figure = told["models"][1]["figures"][0]
    assert float(rows[1]["gain"]) == figure["gain"] != 0
    code, out, err = call("evaluate", lora, *arguments)
    assert (code, err) == (0, "")
    assert out.splitlines()[1].strip() == "smoothness"
    assert "2 prompts, 1 images each; 95 % intervals over prompts" in out
    assert f"{figure['gain']:+.4g}" in out


@pytest.mark.long
def test_a_base_model_alone_and_a_lora_without_a_card(
    call: Call, lora: Path, config: RunConfig, tmp_path: Path
) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("\n".join(PROMPTS))
    arguments = ["--prompts", prompts, "--rewards", "brightness", "--images", "1", "--steps", "2", "--json"]
    code, out, _ = call("evaluate", config.model.base, *arguments)
    assert code == 0
    alone = json.loads(out)["models"]
    pipeline = StableDiffusionPipeline.from_pretrained(config.model.base, safety_checker=None)
    pipeline.load_lora_weights(lora)
    pipeline.save_lora_weights(tmp_path / "bare", get_peft_model_state_dict(pipeline.unet, adapter_name="default_0"))
    code, out, err = call("evaluate", tmp_path / "bare", "--base", config.model.base, *arguments)
    assert (code, err) == (0, "")
    both = json.loads(out)["models"]
    assert both[:1] == alone
    assert both[1]["model"] == "bare"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "0,x"], "--strength: must be numbers with commas between, got '0,x'"),
        (["--strength", "nan"], "--strength: must be numbers"),
        (["--json", "--csv"], "--json and --csv: got both; give one"),
        (["-o", "x.txt"], "--output: must end in .csv or .json, got 'x.txt'"),
        (["--rewards", "brigtness"], "did you mean 'brightness'?"),
        (["--prompts", "gone.txt"], "prompts cannot be read"),
        (["another/base"], "evaluate: these belong to different base models, ['"),
        (["./gone.safetensors"], "evaluate: ./gone.safetensors: no such file or folder; name a run, a LoRA"),
        (["--base", "another/base"], "evaluate: these belong to different base models"),
    ],
)
def test_what_is_wrong_is_one_message(call: Call, lora: Path, arguments: list[str], message: str) -> None:
    code, out, err = call("evaluate", lora, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_folder_that_is_none_of_these(call: Call, tmp_path: Path) -> None:
    code, _, err = call("evaluate", tmp_path)
    assert (code, err) == (2, f"error {tmp_path}: holds no LoRA; name an exported folder or a .safetensors file\n")
    code, _, err = call("evaluate", "builtin")
    assert (code, err) == (2, "error evaluate: nothing says what to measure; give --rewards, see 'rltune rewards'\n")


def test_a_pick_of_a_run_that_is_not_there(call: Call, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mix", experiment(), [result("000", 0.5), result("001", 0.9, 0.1)])
    code, _, err = call("evaluate", folder.path, "--pick", "007")
    assert code == 2
    assert err.startswith("error --pick: '007' is not a choice")
