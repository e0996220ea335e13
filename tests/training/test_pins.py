"""What an experiment names is known by its content."""

from pathlib import Path

from PIL import Image

from rltune.config.load import load_experiment
from rltune.config.model_section import LoraConfig
from rltune.runs.record import Pin
from rltune.training.pins import digests_for, find_pins
from rltune.training.setup import base_key
from tests.original_layout import write_original


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
    both = text.replace("model: {", "model: {adapter: {kind: {choice: [prompt, lora]}}, ")
    assert pins_of(tmp_path / "x.yaml", both).keys() >= {"model.lora.start"}


def test_a_checkpoint_in_one_file_is_pinned_with_its_settings(tiny_pipeline: Path, tmp_path: Path) -> None:
    file = write_original(tiny_pipeline, tmp_path / "model.safetensors")
    text = f"rewards: {{brightness: }}\nmodel: {{base: {file}, config: {tiny_pipeline}}}"
    pins = pins_of(tmp_path / "x.yaml", text)
    assert (list(pins["model.base"].files), pins["model.base"].path) == ([str(file)], str(file))
    assert str(tiny_pipeline / "unet" / "config.json") in pins["model.config"].files
    experiment = load_experiment(tmp_path / "x.yaml", must_find_files=False)
    named = digests_for(experiment.shared, list(pins.values()))
    file.write_bytes(file.read_bytes() + b" ")
    assert pins_of(tmp_path / "x.yaml", text)["model.base"].digest != named["model.base"]
    shared = experiment.shared
    updates = ({}, {"drop": ("text_encoder_3",)}, {"config": None}, {"lora": LoraConfig(start="x", dora=True)})
    models = [shared.model.model_copy(update=update) for update in updates]
    keys = {base_key(shared.model_copy(update={"model": model}), named) for model in models}
    assert len(keys) == 3  # the adapter has no part in what is measured of the base model


def test_pictures_of_a_reward_are_pinned_by_what_they_show(tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "seen" / "b.png"]
    files[1].parent.mkdir()
    for i, file in enumerate(files):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(file)
    setting = "rewards.centroid.options.images"

    def key(images: str) -> str:
        pins = pins_of(tmp_path / "x.yaml", f"rewards: {{centroid: {{options: {{images: {images}}}}}}}")
        named = digests_for(load_experiment(tmp_path / "x.yaml", must_find_files=False).shared, list(pins.values()))
        assert named[setting] == pins[setting].digest
        return base_key(load_experiment(tmp_path / "x.yaml", must_find_files=False).shared, named)

    both, alone = f"[{files[0]}, {files[1]}]", str(files[1].parent)
    first = key(both)
    assert key(alone) == key(str(files[1])) != first
    assert key(f"[{files[1]}, {files[0]}]") != first
    copy = tmp_path / "copy.png"
    copy.write_bytes(files[0].read_bytes())
    assert key(f"[{copy}, {files[1]}]") == first
    Image.new("RGB", (8, 8), "white").save(files[1])
    assert key(both) != first
    assert key(alone) != first
    pins = pins_of(tmp_path / "x.yaml", f"rewards: {{centroid: {{options: {{images: {both}}}}}}}")
    assert list(pins[setting].files) == [str(file) for file in files]
    assert pins[setting].path == str(tmp_path)
