import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from rltune.export.card import formats_told, measurements, write_card, write_experiment
from rltune.redaction import MASK
from rltune.runs.confirmations import Confirmation
from rltune.runs.layout import BASE_TRIAL
from rltune.runs.store import append_line
from tests.run_folders import experiment, result, write_run


def test_the_card_is_json(tmp_path: Path) -> None:
    write_card(tmp_path, {"trial": "001", "settings": {"optim.lr": 1e-3}})
    assert json.loads((tmp_path / "rltune.json").read_text()) == {"trial": "001", "settings": {"optim.lr": 1e-3}}


def test_the_formats_of_a_folder_are_those_whose_files_are_there(tmp_path: Path) -> None:
    assert formats_told(tmp_path) == {}
    told = {"one": {"files": ["a", "b"]}, "other": {"files": ["a"]}}
    write_card(tmp_path, {"formats": told})
    (tmp_path / "a").touch()
    assert formats_told(tmp_path) == {"other": told["other"]}
    (tmp_path / "b").touch()
    assert formats_told(tmp_path) == told


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"reloaded": {}}', '{"formats": []}', '{"formats": {"one": 3}}'])
def test_a_card_of_another_version_tells_of_no_format(tmp_path: Path, content: str) -> None:
    (tmp_path / "rltune.json").write_text(content)
    assert formats_told(tmp_path) == {}


def test_a_card_has_both_models_by_the_same_measurements(tmp_path: Path) -> None:
    trial = result("001", 0.9, 0.1, checkpoint="a")
    folder = write_run(tmp_path / "mix", experiment(), [result(BASE_TRIAL, 0.5), trial])
    config = experiment().shared
    assert measurements(trial, folder, config)[0] == trial.metrics
    for name, brightness, checkpoint in ((BASE_TRIAL, 0.4, ""), ("001", 0.7, "a")):
        fresh = {"eval/brightness": brightness}
        row = Confirmation(name, checkpoint, 8, fresh, prompts=("a", "b"), num_reused=0)
        append_line(folder.confirmed_file, json.dumps(asdict(row)))
    metrics, base_metrics, measured_on = measurements(trial, folder, config)
    assert (metrics["eval/brightness"], base_metrics["eval/brightness"]) == (0.7, 0.4)
    assert measured_on == {"prompts": 8, "fresh_prompts": 8}
    older = result("001", 0.9, 0.1, checkpoint="b")  # another checkpoint than was measured again
    assert measurements(older, folder, config)[:2] == (older.metrics, result(BASE_TRIAL, 0.5).metrics)


def test_a_secret_is_masked_in_card_and_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", 'long"secret')
    card = {"run": "mix", "trial": "001", "experiment": {"prompts": {"train": ['a long"secret']}, "seed": 3}}
    write_card(tmp_path, card)
    write_experiment(tmp_path, card)
    prompts = {"train": [f"a {MASK}"]}
    assert json.loads((tmp_path / "rltune.json").read_text())["experiment"]["prompts"] == prompts
    written = (tmp_path / "experiment.yaml").read_text()
    assert yaml.safe_load(written) == {"name": "mix-001", "prompts": prompts, "seed": 3}
