"""ComfyUI's file by ComfyUI's own rules, written out here: which names it knows, and what it adds at a strength."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rltune.diffusion.lora import adapter_updates
from rltune.export.comfyui import FILE, ComfyUI
from rltune.export.header import header_of
from tests.export.random_lora import RandomLora

UNET_PARTS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
ATTENTION_PARTS = ("proj_in", "proj_out")
BLOCK_PARTS = (
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)


def known_names(num_down: int, num_up: int) -> set[str]:
    """What ``comfy/lora.py`` makes of ``unet_to_diffusers``: ``lora_unet_`` and diffusers' name with underscores."""
    resnets = [f"down_blocks.{i}.resnets.{j}" for i in range(num_down) for j in range(2)]
    resnets += [f"up_blocks.{i}.resnets.{j}" for i in range(num_up) for j in range(3)]
    resnets += [f"mid_block.resnets.{j}" for j in range(2)]
    attentions = [f"down_blocks.{i}.attentions.{j}" for i in range(num_down) for j in range(2)]
    attentions += [f"up_blocks.{i}.attentions.{j}" for i in range(num_up) for j in range(3)] + [
        "mid_block.attentions.0"
    ]
    names = {f"{resnet}.{part}" for resnet in resnets for part in UNET_PARTS}
    names |= {f"{attention}.{part}" for attention in attentions for part in ATTENTION_PARTS}
    names |= {f"{attention}.transformer_blocks.0.{part}" for attention in attentions for part in BLOCK_PARTS}
    names |= {f"down_blocks.{i}.downsamplers.0.conv" for i in range(num_down)}
    names |= {f"up_blocks.{i}.upsamplers.0.conv" for i in range(num_up)}
    names |= {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    return {f"lora_unet_{name.replace('.', '_')}" for name in names}


def merged(file: dict[str, Tensor], name: str, shape: torch.Size, strength: float) -> Tensor:
    """``LoRAAdapter.calculate_weight``: strength * alpha / rank * up @ down; without alpha the scale is 1."""
    up, down = file[f"{name}.lora_up.weight"], file[f"{name}.lora_down.weight"]
    alpha = file[f"{name}.alpha"].item() / down.shape[0] if f"{name}.alpha" in file else 1.0
    return strength * alpha * (up.flatten(1) @ down.flatten(1)).reshape(shape)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(16, marks=pytest.mark.long)])
@pytest.mark.parametrize("targets", ["attention", "all", ("linear_1", "time_emb_proj", "conv_in", "conv")], ids=str)
def test_every_tensor_has_a_name_that_comfyui_knows_and_adds_what_was_trained(
    deep_pipeline: Path, tmp_path: Path, targets: str | tuple[str, ...], rank: int
) -> None:
    lora = RandomLora(deep_pipeline, targets, rank=rank, alpha=3.0 * rank)
    ComfyUI().write(lora.model, lora.adapter, tmp_path)
    file = load_file(tmp_path / FILE)
    names = {name.split(".")[0] for name in file}
    assert names <= known_names(2, 2)
    expected = dict(adapter_updates(lora.model.network))
    assert names == {f"lora_unet_{layer.replace('.', '_')}" for layer in expected}
    for layer, update in expected.items():
        for strength in (1.0, -0.5):
            added = merged(file, f"lora_unet_{layer.replace('.', '_')}", update.shape, strength)
            torch.testing.assert_close(added, strength * update, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_header_says_what_managers_of_loras_read(deep_pipeline: Path, tmp_path: Path) -> None:
    lora = RandomLora(deep_pipeline, rank=4, alpha=1.0)
    ComfyUI().write(lora.model, lora.adapter, tmp_path)
    with safe_open(tmp_path / FILE, framework="pt") as opened:
        header = opened.metadata()
    assert header["ss_network_module"] == "networks.lora"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4")
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.title"] == header["ss_output_name"] == "rltune LoRA"
    assert (header["modelspec.implementation"], header["modelspec.prediction_type"]) == ("diffusers", "epsilon")
    assert "modelspec.architecture" not in header  # a tiny network of no known kind
    about = {"title": "mix 012", "description": "a <b>LoRA</b>", "resolution": "64x64"}
    lora.model.network.register_to_config(cross_attention_dim=1024)
    header = header_of(lora.model, replace(lora.adapter, about=about))
    assert {name: header[f"modelspec.{name}"] for name in about} == about
    assert header["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
    assert (header["ss_output_name"], header["ss_base_model_version"]) == ("mix 012", "sd_v2")
    assert {type(value) for value in header.values()} == {str}
