"""The experiments of single models: each is a whole plan for the pipeline it is written for."""

from pathlib import Path

import pytest

from rltune.cli.sweep import run_experiment
from rltune.orchestration import campaign, inspection
from tests.model_experiments import FOLDER, MODELS, SMALL
from tests.tiny_families import made, shared_out

ROOT = FOLDER.parents[1]


def test_each_file_is_tried_on_a_pipeline() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(MODELS)


@pytest.mark.long
@pytest.mark.parametrize("name", shared_out(MODELS, MODELS.keys() - {"sdxl", "flux1_schnell", "z_image_turbo"}))
def test_a_plan_is_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspection, "check_hub", lambda repo, file: None)  # weights of rewards could be fetched
    monkeypatch.setattr(inspection, "is_offline", lambda: False)
    monkeypatch.setattr(campaign, "find_address", lambda address: None)
    monkeypatch.chdir(ROOT)
    made(MODELS[name]).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    settings = (f"model.base={tmp_path / 'model'}", *SMALL)
    run_experiment(
        FOLDER / f"{name}.yaml", settings, address=None, name=None, storage=tmp_path, dry_run=True, is_sweep=True
    )
    assert f" experiment  {name}\n" in capsys.readouterr().err
