"""Pipelines of diffusers as the one file that the models' authors publish: the inverse of diffusers' own conversion.

Names are those of CompVis' and Stability's code, as CivitAI's files have them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
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


SD3_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
SD3_PARTS = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_FUSED = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "x_block.attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "context_block.attn.qkv",
    ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
}
FLUX_ENDS = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
}
FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
FLUX_DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
FLUX_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
FLUX_SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
FLUX_DOUBLE_FUSED = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "img_attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "txt_attn.qkv",
}
FLUX_SINGLE_FUSED = {("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): "linear1"}


def swapped(tensor: Tensor) -> Tensor:
    """Return the modulation at the end as the authors have it: shift before scale."""
    return torch.cat(tensor.chunk(2)[::-1])


def moved(
    state: Mapping[str, Tensor],
    block: str,
    theirs: str,
    names: Mapping[str, str],
    fused: Mapping[tuple[str, ...], str],
    norms: Mapping[str, str] = MappingProxyType({}),
) -> Tensors:
    """Return the weights of one block under the authors' names, their joint matrices put together."""
    own = {name.removeprefix(f"{block}."): tensor for name, tensor in state.items() if name.startswith(f"{block}.")}
    file: Tensors = {}
    for parts, whole in fused.items():
        for end in ("weight", "bias"):
            if f"{parts[0]}.{end}" in own:
                file[f"{theirs}.{whole}.{end}"] = torch.cat([own.pop(f"{part}.{end}") for part in parts])
    for name, tensor in own.items():
        part, _, end = name.rpartition(".")
        file[f"{theirs}.{norms[part]}.scale" if part in norms else f"{theirs}.{names[part]}.{end}"] = tensor
    return file


def ends(state: Mapping[str, Tensor], names: Mapping[str, str]) -> Tensors:
    """Return what lies before and after the blocks under the authors' names."""
    file = {
        f"{theirs}.{end}": state[f"{own}.{end}"]
        for own, theirs in names.items()
        for end in ("weight", "bias")
        if f"{own}.{end}" in state
    }
    for end in ("weight", "bias"):
        file[f"final_layer.adaLN_modulation.1.{end}"] = swapped(state[f"norm_out.linear.{end}"])
    return file


def original_sd3(state: Mapping[str, Tensor], *, num_layers: int) -> Tensors:
    """Return an SD 3 transformer's weights under the names of Stability's code."""
    file = {"pos_embed": state["pos_embed.pos_embed"], **ends(state, SD3_ENDS)}
    for i in range(num_layers):
        file |= moved(state, f"transformer_blocks.{i}", f"joint_blocks.{i}", SD3_PARTS, SD3_FUSED)
    last = f"joint_blocks.{num_layers - 1}.context_block.adaLN_modulation.1"
    file |= {f"{last}.{end}": swapped(file[f"{last}.{end}"]) for end in ("weight", "bias")}
    return {f"model.diffusion_model.{name}": tensor for name, tensor in file.items()}


def original_flux(state: Mapping[str, Tensor], *, num_double: int, num_single: int) -> Tensors:
    """Return a FLUX.1 transformer's weights under the names of its authors, as in the file that they publish."""
    file = ends(state, FLUX_ENDS)
    for i in range(num_double):
        names = (f"transformer_blocks.{i}", f"double_blocks.{i}")
        file |= moved(state, *names, FLUX_DOUBLE, FLUX_DOUBLE_FUSED, FLUX_DOUBLE_NORMS)
    for i in range(num_single):
        names = (f"single_transformer_blocks.{i}", f"single_blocks.{i}")
        file |= moved(state, *names, FLUX_SINGLE, FLUX_SINGLE_FUSED, FLUX_SINGLE_NORMS)
    return file


def write_original_sd3(folder: Path, file: Path, *, has_text: bool = True) -> Path:
    """Write a tiny SD 3 pipeline's folder as one file, as Stability's with text encoders or without."""
    tensors = original_sd3(state_of(folder / "transformer"), num_layers=2)
    tensors |= original_vae(state_of(folder / "vae"), num_blocks=2)
    if has_text:
        for name, theirs in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
            text = clip_names(state_of(folder / name))
            if theirs == "clip_l":
                del text["text_projection.weight"]  # one: diffusers puts it there
            tensors |= {f"text_encoders.{theirs}.transformer.{key}": tensor for key, tensor in text.items()}
        text = state_of(folder / "text_encoder_3")
        tensors |= {f"text_encoders.t5xxl.transformer.{key}": tensor for key, tensor in text.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file
