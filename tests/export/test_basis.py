"""A basis as files: each of its LoRAs, their sum, and any point between them, as the tools that load them see it."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rltune.config.load import Experiment
from rltune.diffusion.lora_files import WEIGHT_FILE
from rltune.export.picks import pick_trial
from rltune.export.soup import export_soup
from rltune.export.trials import export_trials
from rltune.export.write import Exported
from rltune.runs.confirmations import Confirmation
from rltune.runs.layout import BASE_TRIAL, RunFolder
from rltune.runs.mixtures import Mixture
from rltune.runs.results import read_results
from rltune.runs.store import append_line
from rltune.training.evaluation import draw_images
from rltune.training.model_cache import load_base_model
from rltune.training.sampling import make_sampler
from rltune.training.setup import eval_image_set
from tests.export.test_trials import VALUES, asked, trained

NAMES = ["brightness", "smoothness"]
Run = tuple[RunFolder, Experiment]


@pytest.fixture(scope="module")
def run(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    lora = {"rank": {"choice": [2, 4]}, "alpha": 6.0}
    model = {"base": str(tiny_pipeline), "lora": lora, "adapter": {"kind": "basis"}}
    rewards = {"brightness": {"weight": 3.0}, "smoothness": {"weight": 1.0}}
    experiment = asked(tiny_pipeline, model=model, rewards=rewards)
    return trained(experiment, tmp_path_factory.mktemp("runs") / "tiny")


def export(run: Run, *formats: str) -> list[Exported]:
    exported: list[Exported] = []
    folder, experiment = run
    export_trials([pick_trial("001", *run)], folder, experiment, on_export=exported.append, formats=formats)
    return exported


def drawn(run: Run, weights: dict[str, float]) -> Tensor:
    """Images of files in one pipeline, at strengths, as a user of diffusers sets them."""
    folder, experiment = run
    config = experiment.concrete(VALUES)
    model = load_base_model(config, torch.device("cpu"))
    pipeline: Any = model.pipeline
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of one adapter beside another
        for i, name in enumerate(weights):
            pipeline.load_lora_weights(
                str(folder.exports_dir / name), weight_name=WEIGHT_FILE, adapter_name=f"lora_{i}"
            )
    pipeline.set_adapters([f"lora_{i}" for i in range(len(weights))], list(weights.values()))
    images = eval_image_set(config, model)
    return draw_images(make_sampler(config, model), images, range(4), torch.device("cpu"))


@pytest.mark.long
def test_each_lora_is_a_file_whose_strength_is_its_weight(run: Run) -> None:
    folder, _ = run
    exported = export(run, "diffusers", "comfyui", "peft")
    assert [(one.trial, one.format) for one in exported] == [
        (name, form)
        for name in ("001", "001-brightness", "001-smoothness")
        for form in ("diffusers", "comfyui", "peft")
    ]
    own = drawn(run, {"001": 1.0})
    # one sum of float32 products and two, through a chain and a decoder
    torch.testing.assert_close(drawn(run, {"001-brightness": 0.75, "001-smoothness": 0.25}), own, rtol=0, atol=1e-4)
    assert float((drawn(run, {"001-brightness": 0.25, "001-smoothness": 0.75}) - own).abs().max()) > 1e-3
    cards = {one.trial: json.loads((one.folder / "rltune.json").read_text()) for one in exported}
    assert cards["001"]["basis"] == {"brightness": 0.75, "smoothness": 0.25}
    for name in NAMES:
        told = cards[f"001-{name}"]["strength"]
        assert f"pipeline.set_adapters({NAMES}, [0.75, 0.25])" in told
        assert "(001-brightness, 001-smoothness)" in told
        assert (
            "One of 2 LoRAs that were trained together"
            in (folder.exports_dir / f"001-{name}" / "README.md").read_text()
        )


@pytest.mark.long
def test_a_point_is_one_lora_of_their_sum(run: Run) -> None:
    folder, experiment = run
    export(run, "diffusers")
    result = pick_trial("001", folder, experiment)
    base = next(row for row in read_results(folder.results_file) if row.trial == BASE_TRIAL and row.is_ok)
    values = {name: [0.1, 0.2] for name in NAMES}
    row = Confirmation(BASE_TRIAL, "", 2, base.metrics, values=values, prompts=("a", "b"))
    append_line(folder.confirmed_file, json.dumps(row.__dict__ | {"metrics": dict(row.metrics)}))
    mix = {"brightness": 0.25, "smoothness": 0.75}
    point = Mixture(
        "001@0.25,0.75", {"001": 1.0}, {"001": result.checkpoint}, 2, result.metrics, values, ("a", "b"), mix=mix
    )
    exported: list[Exported] = []
    export_soup(point, {"001": result}, folder, experiment, on_export=exported.append)
    (one,) = exported
    parts = drawn(run, {"001-brightness": 0.25, "001-smoothness": 0.75})
    torch.testing.assert_close(drawn(run, {one.trial: 1.0}), parts, rtol=0, atol=1e-4)
    card = json.loads((one.folder / "rltune.json").read_text())
    assert card["soup"]["method"] == "basis"
    assert card["soup"]["weights"] == mix
