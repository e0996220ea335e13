"""Weights that lie in their file instead of in a process's own memory."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rltune.rewards.clip_loading import load_clip
from rltune.rewards.frozen import map_weights
from tests.mappings import is_mapped

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")


@linux_only
def test_equal_weights_are_the_files_own_pages(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.float64), nn.Linear(8, 8), nn.Linear(8, 8))
    stored = {name: value.clone() for name, value in network.state_dict().items()}
    stored["1.weight"] = stored["1.weight"].float()  # another dtype
    stored["2.weight"][0, 0] += 1  # another value
    stored["3.weight"] = stored["3.weight"][:4].clone()  # another shape
    stored["4.weight"] = torch.zeros(3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    path = tmp_path / "x.safetensors"
    save_file(stored, path)
    assert map_weights(network, path) is network
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    mapped = {name for name, parameter in network.named_parameters() if is_mapped(parameter, path)}
    assert mapped == {"0.weight", "0.bias", "1.bias", "2.bias", "3.bias"}


@linux_only
def test_who_writes_into_a_mapped_weight_leaves_the_file_alone(tmp_path: Path) -> None:
    network, path = nn.Linear(8, 8), tmp_path / "x.safetensors"
    save_file({name: value.clone() for name, value in network.state_dict().items()}, path)
    content = path.read_bytes()
    map_weights(network, path)
    nn.init.zeros_(network.weight)
    assert path.read_bytes() == content


@linux_only
def test_a_clip_tower_lies_in_its_file(clip_folder: Path) -> None:
    tower = load_clip(str(clip_folder))
    path = clip_folder / "open_clip_model.safetensors"
    assert all(is_mapped(parameter, path) for parameter in tower.model.parameters())
