"""Pipelines of diffusers as the one file that the models' authors publish: the inverse of diffusers' own conversion.

Names are those of CompVis' and Stability's code, as CivitAI's files have them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_unet(state: Mapping[str, Tensor], *, layers_per_block: int) -> Tensors:
    """Return a UNet's weights under the authors' names."""
    in_each = layers_per_block + 1
    attended = {m[1] for name in state if (m := re.match(r"(up_blocks\.\d+)\.attentions", name))}

    def place(name: str) -> str:
        for own, theirs in UNET_ENDS.items():
            if name.startswith(f"{own}."):
                return name.replace(own, theirs, 1)
        if m := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name):
            side, block, kind, number, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
            if kind == "downsamplers":
                return f"input_blocks.{in_each * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
            if kind == "upsamplers":
                second = 2 if f"up_blocks.{block}" in attended else 1
                return f"output_blocks.{in_each * block + layers_per_block}.{second}.{rest}"
            at = in_each * block + number + (1 if side == "down" else 0)
            where = f"{'input' if side == 'down' else 'output'}_blocks.{at}.{'0' if kind == 'resnets' else '1'}"
        else:
            m = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name)
            assert m, name
            kind, rest = m[1], m[3]
            where = f"middle_block.{1 if kind == 'attentions' else 2 * int(m[2])}"
        if kind == "resnets":
            part, _, ending = rest.partition(".")
            rest = f"{RESNET[part]}.{ending}"
        return f"{where}.{rest}"

    return {f"model.diffusion_model.{place(name)}": tensor for name, tensor in state.items()}


def original_vae(state: Mapping[str, Tensor], *, num_blocks: int) -> Tensors:
    """Return an autoencoder's weights under the authors' names; its attention is of 1 x 1 convolutions."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    file: Tensors = {}
    for name, tensor in state.items():
        place = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        place = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", place)
        for kind, theirs in (("resnets", "block"), ("upsamplers", "upsample")):
            if m := re.search(rf"up_blocks\.(\d+)\.{kind}\.(\d+)", place):
                number = f".{m[2]}" if kind == "resnets" else ""
                place = place.replace(m[0], f"up.{num_blocks - 1 - int(m[1])}.{theirs}{number}")
        place = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", place)
        place = place.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0." in place:
            for own, theirs in attention.items():
                place = place.replace(f"mid_block.attentions.0.{own}.", f"mid.attn_1.{theirs}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        file[f"first_stage_model.{place}"] = tensor
    return file


def original_open_clip(state: Mapping[str, Tensor], prefix: str) -> Tensors:
    """Return a CLIP text encoder's weights as open_clip has them: one matrix of q, k and v."""
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    ends = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
    }
    file: Tensors = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            file[f"{prefix}text_projection"] = tensor.T.contiguous()
            continue
        place = name.removeprefix("text_model.").replace("encoder.layers", "transformer.resblocks")
        if "q_proj" in place:
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            layer, _, kind = place.partition("self_attn.q_proj.")
            file[f"{prefix}{layer}attn.in_proj_{kind}"] = torch.cat(parts)
        elif "k_proj" not in place and "v_proj" not in place:
            for own, theirs in {**names, **ends, "self_attn.out_proj": "attn.out_proj"}.items():
                place = place.replace(own, theirs)
            file[f"{prefix}{place}"] = tensor
    return file


def state_of(folder: Path) -> Tensors:
    """Return the weights of a component's folder, under the names of its file."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def clip_names(state: Mapping[str, Tensor]) -> Tensors:
    """Return a CLIP's weights under the names that they have always had in files."""
    return {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in state.items()}


def write_original(folder: Path, file: Path, **keep: Any) -> Path:
    """Write a tiny SD or SDXL pipeline's folder as one file; ``vae=False`` and the like leave a component out."""
    layers = {"layers_per_block": 1}
    tensors = original_unet(state_of(folder / "unet"), **layers)
    if keep.get("vae", True):
        tensors |= original_vae(state_of(folder / "vae"), num_blocks=2)
    is_xl = (folder / "text_encoder_2").is_dir()
    if keep.get("text", True):
        prefix = "conditioner.embedders.0.transformer." if is_xl else "cond_stage_model.transformer."
        text = clip_names(state_of(folder / "text_encoder"))
        tensors |= {f"{prefix}{name}": tensor for name, tensor in text.items()}
    if keep.get("text", True) and is_xl:
        text = clip_names(state_of(folder / "text_encoder_2"))
        tensors |= original_open_clip(text, "conditioner.embedders.1.model.")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file
