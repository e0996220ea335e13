"""The folder is what peft itself would have written, and what ``rltune sample`` draws."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, load_peft_weights
from peft.utils import set_peft_model_state_dict

from rltune.diffusion.lora import lora_parameters
from rltune.diffusion.lora_files import find_lora_file, load_lora_file
from rltune.errors import UserError
from rltune.export.peft import Peft
from tests.export.random_lora import RandomLora, greatest_difference

TARGETS = ("to_q", "conv1", "linear_1")


@pytest.fixture(scope="module")
def lora(tiny_pipeline: Path) -> RandomLora:
    return RandomLora(tiny_pipeline, TARGETS, rank=4, alpha=2.0)


@pytest.fixture(scope="module")
def folder(lora: RandomLora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "exports" / "001"
    Peft().write(lora.model, lora.adapter, folder)
    return folder


@pytest.mark.slow
def test_it_is_what_peft_writes_of_the_same_adapter(lora: RandomLora, folder: Path, tmp_path: Path) -> None:
    """Of alpha 2 and rank 4, its B halved: the scale is in the weights."""
    network = lora.fresh().network
    config = LoraConfig(r=4, lora_alpha=4, target_modules=list(TARGETS))
    model = get_peft_model(network, config)
    halved = {name: tensor / 2 if "lora_B" in name else tensor for name, tensor in lora.adapter.state.items()}
    set_peft_model_state_dict(model, {f"base_model.model.{name}": tensor for name, tensor in halved.items()})
    model.save_pretrained(tmp_path)
    own, theirs = load_peft_weights(str(folder)), load_peft_weights(str(tmp_path))
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name].cpu(), theirs[name].cpu()) for name in own)
    settings, expected = (json.loads((place / "adapter_config.json").read_text()) for place in (folder, tmp_path))
    assert settings.pop("target_modules") == list(TARGETS)
    assert set(expected.pop("target_modules")) == set(TARGETS)
    differing = {name for name in settings | expected if settings.get(name) != expected.get(name)}
    assert differing <= {"auto_mapping", "base_model_name_or_path"}  # the classes and the place of the base model


def test_our_own_reader_draws_the_folder_as_it_is(lora: RandomLora, folder: Path) -> None:
    model = lora.fresh()
    load_lora_file(model, find_lora_file(folder))
    # float32 through 4 steps, with updates of the size of the weights
    assert greatest_difference(lora.trained.draw(model), lora.trained.images_B3HW) < 2e-4


def test_the_adapter_stays_float32_in_a_half_precision_base(lora: RandomLora, folder: Path) -> None:
    half = lora.fresh("bf16")
    Peft().load(half, folder)
    assert {parameter.dtype for parameter in lora_parameters(half.network)} == {torch.float32}


def test_a_rank_that_is_not_the_weights_is_refused(lora: RandomLora, folder: Path, tmp_path: Path) -> None:
    Peft().write(lora.model, lora.adapter, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 8}))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: peft cannot load it into this base model"):
        Peft().load(lora.fresh(), tmp_path)
