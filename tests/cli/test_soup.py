"""``rltune soup`` as a user meets it; that each point is what it should be is the diffusion room's to show."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from rltune.config.experiment import RunConfig
from rltune.runs.layout import BASE_TRIAL
from tests.cli.conftest import Call
from tests.cli.test_reading import ODD
from tests.cli.test_sample import export
from tests.run_folders import experiment, result, write_run

PROMPTS = ["a snail", "an octopus on a hill"]


@pytest.fixture(scope="module")
def loras(make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    config = make_config(
        prompts={"eval": PROMPTS}, sampler={"steps": 2}, evaluate={"images_per_prompt": 1, "judges": ["drift"]}
    )
    root = tmp_path_factory.mktemp("exports") / ODD
    folders = [export(config, root / name, seed=i) for i, name in enumerate(("001", "002"))]
    for folder in folders:
        card = {"base_model": config.model.base, "base_revision": None, "experiment": config.model_dump(mode="json")}
        again = {"noise": "search", "precision": "fp32", "prompts": PROMPTS}
        (folder / "rltune.json").write_text(json.dumps({**card, "measured_again": again}))
    return folders


def figures(point: Any) -> dict[str, float]:
    return {figure["name"]: figure["value"] for figure in point["figures"]}


@pytest.mark.long
def test_every_method_s_end_is_a_lora_and_points_are_written(call: Call, loras: list[Path], tmp_path: Path) -> None:
    methods = ("exact", "factors", "predictions", "draw")
    asked = ["--weights", "0,1", "--weights", "0.5,0.5", "--rewards", "brightness"]
    code, out, err = call("soup", *loras, *asked, "--method", ",".join(methods), "-o", tmp_path)
    assert (code, err) == (0, "")
    told = json.loads((tmp_path / "soup.json").read_text())
    assert (told["loras"], told["prompts"], told["noise"]) == (["001", "002"], PROMPTS, "search")
    points = {(point["method"], tuple(point["weights"])): point for point in told["points"]}
    assert len(points) == 8
    ends = [figures(points[method, (0.0, 1.0)])["brightness"] for method in methods]
    assert ends == pytest.approx([ends[0]] * 4, abs=1e-5)
    middle = [figures(points[method, (0.5, 0.5)])["brightness"] for method in methods]
    assert min(abs(a - b) for i, a in enumerate(middle) for b in middle[:i]) > 1e-5  # four ways, four images
    assert [points["exact", row]["rank"] for row in ((0.0, 1.0), (0.5, 0.5))] == [2, 4]
    assert points["predictions", (0.5, 0.5)]["rank"] is None
    rows = list(csv.DictReader(StringIO((tmp_path / "soup.csv").read_text())))
    assert len(rows) == 8
    assert (rows[1]["method"], rows[1]["weight 001"], rows[1]["name"]) == ("exact", "0.5", "brightness")
    assert "exact 0.5,0.5" in out
    assert f"-> {tmp_path}" in out


@pytest.mark.long
def test_one_lora_is_slid_against_the_base_model_and_exported(call: Call, loras: list[Path], tmp_path: Path) -> None:
    arguments = ["--weights", "0,1", "--weights", "1.25,0", "--rewards", "brightness,drift", "--export", "--rank", "1"]
    code, out, err = call("soup", loras[0], *arguments, "-o", tmp_path / "soup")
    assert (code, err) == (0, "")
    told = json.loads((tmp_path / "soup" / "soup.json").read_text())
    assert told["loras"] == ["001", "base"]
    base, beyond = told["points"]
    assert (base["rank"], figures(base)["drift"]) == (None, 0.0)
    assert beyond["rank"] == 1
    assert 0 < beyond["error"] < 1
    assert f"reduced LoRAs lack up to {beyond['error']:.2g} of their update" in out
    assert not (tmp_path / "soup" / "001").exists()  # the base model is no LoRA
    folder = tmp_path / "soup" / "002"
    card = json.loads((folder / "rltune.json").read_text())
    assert card["soup"] == {"method": "exact", "weights": {"001": 1.25, "base": 0.0}, "error": beyond["error"]}
    pipeline = StableDiffusionPipeline.from_pretrained(told["base_model"], safety_checker=None)
    pipeline.load_lora_weights(folder)
    assert {module.r["default_0"] for module in pipeline.unet.modules() if hasattr(module, "lora_A")} == {1}
    assert "reloaded and compared in float32: images agree to" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ties"], "--method: must be exact, factors, predictions, draw, got 'ties'"),
        (["--method", ""], "--method: must be exact"),
        (["--weights", "1,2,3"], "--weights: there are 2 LoRAs (001, 002), got 3 weights; give one each"),
        (["--weights", "1,x"], "--weights: must be numbers with commas between, got '1,x'"),
        (["--weights", "0.5,0.6", "--method", "draw"], "--weights: for draw they are probabilities"),
    ],
)
def test_what_is_wrong_is_one_message(call: Call, loras: list[Path], arguments: list[str], message: str) -> None:
    code, out, err = call("soup", *loras, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_base_model_is_written_base(call: Call, loras: list[Path]) -> None:
    code, _, err = call("soup", "builtin", loras[0])
    assert (code, err) == (
        2,
        "error soup: its members are LoRAs, got the base model 'builtin'; write base in its place\n",
    )


def test_of_a_run_only_loras_are_mixed(call: Call, tmp_path: Path) -> None:
    asked = experiment(model={"lora": {}, "adapter": {"kind": {"choice": ["lora", "prompt"]}}}, optim={"lr": 1e-3})
    rows = [result("002", 0.9, 0.1), result("001", 0.1, 0.9)]
    weights = {name: value for name, value in rows[0].values.items() if name in asked.space}
    words = [replace(row, values=weights | {"model.adapter.kind": "prompt"}) for row in rows]
    run = write_run(tmp_path / "mix", asked, [result(BASE_TRIAL, 0.5), *words])
    code, _, err = call("soup", run.path)
    assert code == 2
    assert f"soup: what is best of {run.path} is no LoRA; name LoRAs, or trials by --pick" in " ".join(err.split())
