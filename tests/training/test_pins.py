"""What an experiment names is known by its content."""

from pathlib import Path

from rltune.config.load import load_experiment
from rltune.runs.record import Pin
from rltune.training.pins import find_pins


def pins_of(file: Path, text: str) -> dict[str, Pin]:
    file.write_text(text)
    return {pin.setting: pin for pin in find_pins(load_experiment(file, must_find_files=False))}


def test_a_lora_to_start_from_is_pinned_by_what_it_holds(tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "x.safetensors").write_bytes(b"one")
    text = f"rewards: {{brightness: }}\nmodel: {{lora: {{start: {lora}}}}}"
    first = pins_of(tmp_path / "x.yaml", text)["model.lora.start"]
    assert [Path(file).name for file in first.files] == ["x.safetensors"]
    assert pins_of(tmp_path / "x.yaml", text)["model.lora.start"] == first
    (lora / "x.safetensors").write_bytes(b"another")
    assert pins_of(tmp_path / "x.yaml", text)["model.lora.start"].digest != first.digest
    assert "model.lora.start" not in pins_of(tmp_path / "x.yaml", "rewards: {brightness: }")
