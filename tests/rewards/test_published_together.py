"""The published rewards in one process and one run: nothing about them fights."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rltune.config.load import load_experiment
from rltune.orchestration.known import known_names
from rltune.training.loop import train_run
from rltune.training.reporter import FolderReporter

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "sd15_preferences.yaml"
TRAINED, WATCHED = ("hpsv2_1", "imagereward"), ("pickscore", "laion_aesthetic", "hpsv2")


@pytest.mark.long
def test_an_experiment_on_published_rewards_trains_on_files_of_their_layouts(
    tiny_pipeline: Path,
    reward_options: Mapping[str, Mapping[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(EXPERIMENT.parents[1])  # its prompt files are named from there
    overrides = [
        f"model.base={tiny_pipeline}",
        "sampler={steps: 4, guidance: 2.0}",
        "estimator.k=2",
        "optim={lr: 1.0e-2, steps: 2, batch: 4, micro_batch: 2}",
        "rewards.imagereward.micro_batch=1",
        "evaluate={every: 2, prompts: 2, images_per_prompt: 2, judges: [diversity, drift]}",
        "constraints={pickscore: {min_ratio_to_base: 0.01}}",
    ]
    overrides += [f"rewards.{name}.weight=0" for name in WATCHED]
    for name in (*TRAINED, *WATCHED):
        overrides += [f"rewards.{name}.options.{option}={path}" for option, path in reward_options[name].items()]
    config = load_experiment(EXPERIMENT, overrides, known_names()).shared
    assert config.mixture.method == "gradient_balance"
    reporter = FolderReporter(tmp_path / "checkpoints")
    train_run(config, trial_dir=tmp_path / "trial", base_dir=tmp_path / "base", reporter=reporter)
    last = reporter.reports[-1]
    assert last["step"] == 2
    assert all(math.isfinite(value) for value in last.values())
    assert {f"gain/{name}" for name in (*TRAINED, *WATCHED, "diversity")} <= last.keys()
    assert last["gain/drift"] > 0  # the adapters have moved
