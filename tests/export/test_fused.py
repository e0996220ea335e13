"""The LoRA in the weights of a whole pipeline, as plain diffusers loads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from rltune.diffusion.lora import adapter_updates
from rltune.errors import RunError
from rltune.export.fused import Fused
from rltune.export.proof import check_reload
from tests.export.random_lora import RandomLora

NETWORK = "fused/unet/diffusion_pytorch_model.safetensors"
Change = Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def lora(tiny_pipeline: Path) -> RandomLora:
    return RandomLora(tiny_pipeline, "attention", rank=2, alpha=8.0, size=0.05)


@pytest.fixture(scope="module")
def folder(lora: RandomLora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fused")
    Fused().write(lora.model, lora.adapter, place)
    return place


@pytest.mark.slow
def test_the_weights_are_the_base_model_s_and_the_updates(lora: RandomLora, folder: Path, tiny_pipeline: Path) -> None:
    base = DiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    fused: dict[str, Any] = {"pipeline": None}
    exec(Fused().how_to_load(lora.model, folder), fused)
    pipeline = fused["pipeline"]
    updates = dict(adapter_updates(lora.model.network))
    assert len(updates) > 8
    for name, weight in pipeline.unet.state_dict().items():
        own = base.unet.state_dict()[name]
        added = updates.pop(name.removesuffix(".weight"), None)
        torch.testing.assert_close(weight, own if added is None else own + added, rtol=0, atol=0)
    assert not updates
    for part in ("vae", "text_encoder"):
        for one, other in zip(
            getattr(pipeline, part).state_dict().values(), getattr(base, part).state_dict().values(), strict=True
        ):
            assert torch.equal(one, other)
    assert type(pipeline.scheduler) is type(base.scheduler)


def test_the_model_that_was_written_is_left_as_it_was(lora: RandomLora, folder: Path) -> None:
    assert lora.model.pipeline.unet is lora.model.network
    torch.testing.assert_close(lora.trained.draw(lora.model), lora.trained.images_B3HW, rtol=0, atol=0)


def halfway(state: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (tensor + base[name]) / 2 for name, tensor in state.items()}


def one_layer_left_out(state: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    name = min(name for name in state if not torch.equal(state[name], base[name]))
    return {**state, name: base[name]}


def another_layer(state: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "conv_in.weight": base["conv_in.weight"] * 1.001}


def key_renamed(state: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}x" if name == min(state) else name: tensor for name, tensor in state.items()}


CHANGES: dict[str, Change] = {
    "the base model": lambda state, base: base,
    "half as strong": halfway,
    "a layer left out": one_layer_left_out,
    "a layer that was not trained": another_layer,
    "a key renamed": key_renamed,
    "a tensor too many": lambda state, base: {**state, "more.weight": base["conv_in.weight"].clone()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_the_adapter_is_refused(change: str, lora: RandomLora, folder: Path) -> None:
    file = folder / NETWORK
    content, fresh = file.read_bytes(), lora.fresh()
    try:
        save_file(CHANGES[change](load_file(file), fresh.network.state_dict()), file, metadata={"format": "pt"})
        with pytest.raises(RunError, match=f"^{folder}.*; it is not fit for use$"):
            check_reload(Fused(), folder, fresh, lora.trained)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("remains", [None, b"", b"{}"])
def test_a_file_that_is_gone_or_damaged_is_refused(remains: bytes | None, lora: RandomLora, folder: Path) -> None:
    file = folder / NETWORK
    content = file.read_bytes()
    try:
        file.unlink() if remains is None else file.write_bytes(remains)
        with pytest.raises(RunError, match=r"not a network that this base model can load .*; it is not fit for use$"):
            check_reload(Fused(), folder, lora.fresh(), lora.trained)
    finally:
        file.write_bytes(content)


@pytest.mark.slow
def test_an_update_that_float32_weights_cannot_take_up_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    faint = RandomLora(tiny_pipeline, size=1e-5)
    Fused().write(faint.model, faint.adapter, tmp_path)
    with pytest.raises(RunError, match=r"it is not fit for use$"):
        check_reload(Fused(), tmp_path, faint.fresh(), faint.trained)
