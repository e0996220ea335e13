"""Models in the layout of transformers that are missing, broken or of another kind."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from rltune.errors import RunError, UserError
from rltune.rewards.diversity import DINO, DINO_FILES, build_diversity_dino
from rltune.rewards.owlv2 import load_owlv2
from rltune.rewards.pretrained import find_folder
from rltune.rewards.weights import WeightsFile


@pytest.fixture
def broken(dino_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dino_folder, tmp_path / "dino"))


def cache(monkeypatch: pytest.MonkeyPatch, files: dict[tuple[str, str], Path]) -> None:
    def look_up(repo: str, file: str) -> str | None:
        path = files.get((repo, file))
        return None if path is None else str(path)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", look_up)


def test_the_published_model_is_read_from_the_cache(dino_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(monkeypatch, {(DINO, file.file): dino_folder / file.file for file in DINO_FILES})
    images = torch.rand(2, 3, 32, 32)
    expected = build_diversity_dino(model=str(dino_folder))(images, ["a", "a"])
    assert torch.equal(build_diversity_dino()(images, ["a", "a"]), expected)


def test_another_model_of_the_hub_is_read_from_the_cache(dino_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(monkeypatch, {("some/dino", file.file): dino_folder / file.file for file in DINO_FILES})
    assert find_folder("diversity_dino", "some/dino", DINO_FILES) == dino_folder


def test_missing_published_files_are_named_with_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cache(monkeypatch, {})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RunError) as caught:
        build_diversity_dino()
    message = str(caught.value)
    for part in (
        "reward 'diversity_dino': model.safetensors, config.json of https://huggingface.co/facebook/dinov2-base",
        "346 MB, Apache-2.0",
        "rltune models fetch diversity_dino",
        "option 'model'",
    ):
        assert part in message


def test_missing_published_files_are_fetched(dino_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache(monkeypatch, {(DINO, "config.json"): dino_folder / "config.json"})
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    fetched = []

    def fetch(file: WeightsFile) -> Path:
        fetched.append(file.file)
        return dino_folder / file.file

    monkeypatch.setattr(WeightsFile, "_download", fetch)
    assert find_folder("diversity_dino", DINO, DINO_FILES) == dino_folder
    assert fetched == ["model.safetensors"]


def test_another_model_that_is_not_in_the_cache_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cache(monkeypatch, {})
    with pytest.raises(RunError, match=r"'some/dino' is no folder.* missing are model\.safetensors, config\.json; run"):
        build_diversity_dino(model="some/dino")


@pytest.mark.parametrize("model", [7, "", "a/b/c d"])
def test_what_is_no_name_is_refused(model: object) -> None:
    with pytest.raises(UserError, match=r"reward 'diversity_dino': model must be .*, got"):
        build_diversity_dino(model=model)  # type: ignore[arg-type]


def test_a_folder_without_a_network_is_named(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"reward 'diversity_dino': .* has no model\.safetensors; model must be"):
        build_diversity_dino(model=str(broken))


def test_missing_and_misshapen_weights_are_named(broken: Path) -> None:
    state = load_file(broken / "model.safetensors")
    del state["layernorm.bias"]
    state["layernorm.weight"] = torch.ones(3)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        build_diversity_dino(model=str(broken))
    for part in (str(broken), "model.safetensors", "no layernorm.bias", "layernorm.weight of another shape"):
        assert part in str(caught.value)


def test_many_missing_weights_are_counted(broken: Path) -> None:
    state = {key: value for key, value in load_file(broken / "model.safetensors").items() if "layer.1" not in key}
    num_missing = len(load_file(broken / "model.safetensors")) - len(state)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"and {num_missing - 3} more$"):
        build_diversity_dino(model=str(broken))


def test_a_cut_file_is_the_users_fault(broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"reward 'diversity_dino': .* does not load"):
        build_diversity_dino(model=str(broken))


def test_a_broken_config_is_the_users_fault(broken: Path) -> None:
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"reward 'diversity_dino': .* does not load"):
        build_diversity_dino(model=str(broken))


def test_a_model_of_another_kind_is_the_users_fault(owlv2_folder: Path) -> None:
    with pytest.raises(UserError, match=r"'diversity_dino': model must be of type 'dinov2', and that .* is 'owlv2'"):
        build_diversity_dino(model=str(owlv2_folder))


def test_a_folder_without_a_tokenizer_is_the_users_fault(owlv2_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(owlv2_folder, tmp_path / "owlv2"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"reward 'object_count': .* has no tokenizer"):
        load_owlv2("object_count", str(folder), ["cat"])


def test_a_tokenizer_is_read_from_the_published_files(owlv2_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(owlv2_folder, tmp_path / "owlv2"))
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    images = torch.rand(1, 3, 64, 64)
    expected = load_owlv2("object_count", str(owlv2_folder), ["red apple"]).logits(images)
    assert torch.equal(load_owlv2("object_count", str(folder), ["red apple"]).logits(images), expected)


def test_weights_in_half_precision_are_read_as_float32(broken: Path) -> None:
    state = {key: value.half() for key, value in load_file(broken / "model.safetensors").items()}
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    assert build_diversity_dino(model=str(broken)).features(torch.rand(1, 3, 32, 32), ["a"]).dtype == torch.float32
