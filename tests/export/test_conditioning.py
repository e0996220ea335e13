"""Numbers that mix prompts as a file: proved, read again, refused where damaged, and applied by diffusers alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment
from rltune.diffusion.adapter_files import find_adapter_file, read_mix_file
from rltune.diffusion.chain import NO_GRADIENT
from rltune.diffusion.conditioning import attach_mix
from rltune.diffusion.lora_files import find_lora_file
from rltune.errors import RunError, UserError
from rltune.export.conditioning import ConditioningFile, Mixed, script
from rltune.export.picks import pick_trial
from rltune.export.push import check_push
from rltune.export.trials import export_trials
from rltune.export.write import Exported
from rltune.runs.layout import RunFolder
from rltune.runs.results import TrialResult, append_result
from rltune.training.adapters.base import MixValues
from rltune.training.assessment import Subject, make_bench, of_checkpoint, of_file
from rltune.training.checkpoint import load_adapter
from rltune.training.evaluation import to_uint8
from rltune.training.loop import train_run
from rltune.training.model_cache import load_base_model
from rltune.training.reporter import FolderReporter
from rltune.training.sampling import image_shape, make_sampler
from rltune.training.soups import trained_member
from tests.export.test_trials import BESIDE, asked, trained

STYLED = "{prompt}, in warm light"
LAMBDAS = [0.3, -1.7, 2.25]
Run = tuple[RunFolder, Experiment]


@pytest.fixture(scope="module")
def run(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    model = {"base": str(tiny_pipeline), "adapter": {"kind": "conditioning"}, "conditioning": {"styled": STYLED}}
    optim = {"lr": {"float": [0.0, 1.0]}, "steps": 3, "batch": 2}
    experiment = asked(tiny_pipeline, model=model, optim=optim, estimator={"k": 3, "draw": "fixed"})
    return trained(experiment, tmp_path_factory.mktemp("runs") / "tiny", {"optim.lr": 0.5})


@pytest.fixture(scope="module")
def exported(run: Run) -> Exported:
    made: list[Exported] = []
    export_trials([pick_trial("knee", *run)], *run, on_export=made.append)
    (one,) = made
    return one


def checkpoint_of(run: Run) -> Path:
    folder, experiment = run
    return folder.path / pick_trial("001", folder, experiment).checkpoint


@pytest.mark.slow
def test_the_file_says_what_was_trained_and_how_it_is_drawn(run: Run, exported: Exported, tiny_pipeline: Path) -> None:
    assert {path.name for path in exported.folder.iterdir()} == {"conditioning.json", *BESIDE}
    state = load_adapter(checkpoint_of(run))
    assert json.loads((exported.folder / "conditioning.json").read_text()) == {
        "schema": 1,
        "kind": "conditioning",
        "base_model": str(tiny_pipeline),
        "base_revision": None,
        "styled": STYLED,
        "timesteps": [667, 334, 1],
        "lambdas": state["lambda_T"].tolist(),
        "steps": 3,
        "guidance": 2.0,
        "embedded_guidance": None,
        "eta": 0.0,
        "negative": "",
    }
    assert exported.difference == 0
    assert exported.effect > 0
    assert exported.how_to_load == f"rltune sample {exported.folder}"
    card = json.loads((exported.folder / "rltune.json").read_text())
    assert card["conditioning"] == {"styled": STYLED, "numbers": 3}
    assert card["effect"]["update"] is None
    assert list(card["formats"]) == ["conditioning"]
    readme = (exported.folder / "README.md").read_text()
    assert "3 numbers for" in readme
    assert script(str(tiny_pipeline), "conditioning.json") in readme
    assert "lora" not in readme.partition("\n---\n")[0]
    mix = read_mix_file(exported.folder / "conditioning.json")
    assert torch.equal(mix.lambda_T.detach(), state["lambda_T"])
    assert torch.equal(mix.timesteps_T, state["timesteps_T"])


@pytest.mark.long
def test_file_and_checkpoint_are_measured_alike_at_each_strength(run: Run, exported: Exported) -> None:
    _, experiment = run
    bench = make_bench(experiment.concrete({"optim.lr": 0.5}), "search", only=["brightness"])
    file, checkpoint = find_adapter_file(exported.folder), checkpoint_of(run)
    made = [of_file(file, 1.0), of_checkpoint(bench.run.config, checkpoint, 1.0)]
    made += [of_file(file, 0.0), of_file(file, 2.0), of_checkpoint(bench.run.config, checkpoint, 2.0)]
    base, *rows = (row.values["brightness"] for row in bench.assess([Subject("it", one) for one in made]))
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[2], base)
    np.testing.assert_array_equal(rows[3], rows[4])
    assert not np.array_equal(rows[0], base)
    assert not np.array_equal(rows[3], rows[0])


@pytest.mark.slow
def test_what_cannot_carry_it_refuses_it(run: Run, exported: Exported) -> None:
    _, experiment = run
    pick = pick_trial("knee", *run)
    with pytest.raises(UserError, match=r"--format: conditioning is no LoRA, .* got 'comfyui'; leave it out"):
        export_trials([pick], *run, on_export=print, formats=["comfyui"])
    with pytest.raises(UserError, match=r"--push: .* got 'me/mine'; export it without"):
        check_push("me/mine", experiment.shared.model.adapter.kind)
    with pytest.raises(UserError, match=r"holds numbers that mix prompts \(.*\), where a LoRA is needed"):
        find_lora_file(exported.folder)
    config = experiment.concrete(pick.values)
    model = load_base_model(config, torch.device("cpu"))
    with pytest.raises(UserError, match=r"soup: its members are LoRAs, and .* holds none but conditioning; name LoRAs"):
        trained_member(model, config, checkpoint_of(run))


@pytest.mark.slow
def test_a_file_that_is_not_what_was_trained_is_not_exported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Mixed.content.fget
    assert own is not None

    def rounded(adapter: Mixed) -> dict[str, Any]:
        content = own(adapter)
        return {**content, "lambdas": [round(value, 6) for value in content["lambdas"]]}

    monkeypatch.setattr(Mixed, "content", property(rounded))
    with pytest.raises(RunError, match="its lambda_T are others than the trained ones; it is not fit for use"):
        export_trials([pick_trial("knee", *run)], *run, on_export=print)


def test_numbers_that_do_nothing_or_are_broken_are_not_exported() -> None:
    config = RunConfig.model_validate({"rewards": {"brightness": {}}})
    for values, message in ((torch.zeros(3), "exactly zero"), (torch.tensor([1.0, torch.nan]), "is not finite")):
        with pytest.raises(RunError, match=message):
            Mixed(MixValues({"lambda_T": values, "timesteps_T": values}, STYLED), config)


GOOD = {"schema": 1, "kind": "conditioning", "styled": STYLED, "timesteps": [3, 2.5, 1], "lambdas": LAMBDAS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lora"}, "is no conditioning.json, which has kind: conditioning"),
        ({"schema": 2}, "was written by a newer rltune, got schema 2"),
        ({"styled": "warm"}, r"styled must hold \{prompt\} once, got 'warm'"),
        ({"lambdas": [1, "2", 3]}, "lambdas must be a list of finite numbers, got "),
        ({"lambdas": [1, float("inf"), 3]}, "lambdas must be a list of finite numbers, got "),
        ({"timesteps": []}, "timesteps must be a list of finite numbers, got "),
        ({"lambdas": [1, 2]}, "2 lambdas for 3 timesteps"),
        ({"timesteps": [1, 1, 2]}, "3 lambdas for 2 timesteps"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "conditioning.json"
    file.write_text(json.dumps(GOOD))
    assert read_mix_file(file).lambda_T.tolist() == pytest.approx(LAMBDAS)
    file.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(UserError, match=message):
        read_mix_file(file)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "conditioning.json"
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_mix_file(file)


@pytest.mark.long
@pytest.mark.parametrize(("guidance", "negative"), [(2.0, "a dog"), (1.0, "")])
def test_a_script_without_rltune_draws_rltunes_images(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance: float, negative: str
) -> None:
    """As a README has it, to the byte but for rounding: with guidance both halves of what is told are the script's."""
    sections = {"model": {"base": str(tiny_pipeline)}, "rewards": {"brightness": {}}}
    sampling = {"steps": 3, "guidance": guidance, "negative": negative, "eta": 0.0}
    config = RunConfig.model_validate({**sections, "sampler": sampling})
    model = load_base_model(config, torch.device("cpu"))
    sampler = make_sampler(config, model)
    # this model reads sixteen letters, and text counts for little in it
    state = {"lambda_T": 10 * torch.tensor(LAMBDAS), "timesteps_T": sampler.table.timesteps_T.double()}
    values = MixValues(state, "warm {prompt}")
    ConditioningFile().write(model, Mixed(values, config), tmp_path)
    prompt = "a red circle on a white background"
    x_BCHW = torch.randn(1, *image_shape(config, model), generator=torch.Generator().manual_seed(3))

    def drawn() -> Tensor:
        with torch.no_grad():
            return sampler.decode(sampler.latents([prompt], x_BCHW, plan=NO_GRADIENT, noise=None))

    base = to_uint8(drawn())[0].astype(int)
    attach_mix(model, values.mix())
    expected = to_uint8(drawn())[0].astype(int)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusionPipeline, "prepare_latents", lambda *_: x_BCHW)
    names: dict[str, Any] = {}
    exec(script(str(tiny_pipeline), "conditioning.json"), names)
    found = np.asarray(names["image"]).astype(int)
    assert np.abs(found - expected).max() <= 1
    assert np.abs(base - expected).max() > 3
    assert (tmp_path / "circle.png").is_file()


@pytest.mark.long
def test_trials_of_two_kinds_are_each_exported_as_what_they_are(tiny_pipeline: Path, tmp_path: Path) -> None:
    model = {
        "base": str(tiny_pipeline),
        "adapter": {"kind": {"choice": ["prompt", "lora"]}},
        "prompt": {"template": "{prompt}, {light}", "words": {"light": "warm"}},
    }
    optim = {"lr": {"float": [0.0, 0.1], "when": {"model.adapter.kind": "lora"}}, "steps": 3, "batch": 2}
    experiment = asked(tiny_pipeline, model=model, optim=optim)
    values: dict[str, Any] = {"model.adapter.kind": "prompt"}
    folder, _ = trained(experiment, tmp_path / "run", {"model.adapter.kind": "lora", "optim.lr": 0.05})
    reporter = FolderReporter(folder.checkpoints_dir("002"))
    train_run(
        experiment.concrete(values), trial_dir=folder.trial_dir("002"), base_dir=folder.base_dir, reporter=reporter
    )
    checkpoint = str((reporter.latest() or folder.path).relative_to(folder.path))
    row = TrialResult("002", "ok", values, values, metrics=reporter.reports[-1])
    append_result(folder.results_file, replace(row, checkpoint=checkpoint))
    picks = [pick_trial(trial, folder, experiment) for trial in ("001", "002")]

    with pytest.raises(UserError, match=r"conditioning is no LoRA.* got 'comfyui'; leave it out"):
        export_trials(picks, folder, experiment, on_export=pytest.fail, formats=["comfyui"])
    assert not folder.exports_dir.exists()
    made: list[Exported] = []
    export_trials(picks, folder, experiment, on_export=made.append)
    assert [(one.trial, one.format) for one in made] == [("001", "diffusers"), ("002", "conditioning")]
    assert find_lora_file(made[0].folder)
    assert json.loads((made[1].folder / "conditioning.json").read_text())["styled"] == "{prompt}, warm"
