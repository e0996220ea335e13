"""What the CLIP rewards cost together: memory of their weights and of a backward pass, and time, at their true sizes.

No published weights are needed: files of the published layouts and sizes are written with random values, equal where
HPSv2's training leaves CLIP-H as it was (github.com/tgxs002/HPSv2, hpsv2/configs/HPSv2.sh: all but the last 20 image
and 11 text groups are locked). They take 10 GB, and loading all of them about 16 GB of memory.

    python tests/benchmarks/reward_memory.py --work FOLDER
"""

import argparse
import json
import resource
import time
from itertools import pairwise
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rltune.diffusion.memory import stored_bytes
from rltune.rewards.aesthetic import LAION_WIDTHS
from rltune.rewards.base import REWARDS, Reward
from rltune.rewards.clip import embeddings_kept
from rltune.rewards.frozen import held_bytes
from rltune.training.checking import networks_of

NUM_LOCKED_IMAGE_BLOCKS = 32 + 2 - 20  # groups: stem, 32 blocks, projection; the stem counts as one of the 14
NUM_LOCKED_TEXT_BLOCKS = 24 + 2 - 11
PROMPT = "a photo of an astronaut riding a horse on mars"
GIB = 2**30


def random_state(model: str, seed: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = open_clip.CLIP(**open_clip.get_model_config(model)).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in shapes.items()}


def is_locked(name: str) -> bool:
    """Whether HPSv2's training leaves a tensor of CLIP-H as it was."""
    for prefix, num_locked in (
        ("visual.transformer", NUM_LOCKED_IMAGE_BLOCKS),
        ("transformer", NUM_LOCKED_TEXT_BLOCKS),
    ):
        if name.startswith(f"{prefix}.resblocks."):
            return int(name.removeprefix(f"{prefix}.resblocks.").split(".")[0]) < num_locked - 1
    stem = ("visual.conv1", "visual.class_embedding", "visual.positional_embedding", "visual.ln_pre")
    return name.startswith((*stem, "token_embedding", "positional_embedding"))


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names and layout to those of transformers' CLIPModel, for PickScore's file."""
    renamed: dict[str, Tensor] = {}
    tops = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "text_projection": "text_projection.weight",
        "visual.proj": "visual_projection.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    }
    starts = {
        "visual.transformer.resblocks.": "vision_model.encoder.layers.",
        "transformer.resblocks.": "text_model.encoder.layers.",
        "visual.ln_pre.": "vision_model.pre_layrnorm.",
        "visual.ln_post.": "vision_model.post_layernorm.",
        "ln_final.": "text_model.final_layer_norm.",
    }
    inner = {".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}
    inner[".attn.out_proj."] = ".self_attn.out_proj."
    for name, value in state.items():
        if name in tops:
            renamed[tops[name]] = (value.T if "proj" in name else value).contiguous()
            continue
        for start, other in starts.items():
            if name.startswith(start):
                name = other + name.removeprefix(start)
                break
        for part, other in inner.items():
            name = name.replace(part, other)
        if ".attn.in_proj_" in name:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace(".attn.in_proj_", f".self_attn.{letter}_proj.")] = third.contiguous()
        else:
            renamed[name] = value
    return renamed


def write_files(work: Path) -> dict[str, dict[str, str]]:
    """Write the files, unless they are there, and return the options of each reward."""
    work.mkdir(parents=True, exist_ok=True)
    files = {"hpsv2": work / "HPS_v2_compressed.pt", "hpsv2_1": work / "HPS_v2.1_compressed.pt"}
    if not all(path.is_file() for path in files.values()):
        base = random_state("ViT-H-14", 0)
        for seed, path in enumerate(files.values(), start=1):
            tuned = {name: value if is_locked(name) else value + 1e-2 * seed for name, value in base.items()}
            torch.save({"state_dict": {name: value.half() for name, value in tuned.items()}}, path)
    pickscore = work / "pickscore.safetensors"
    if not pickscore.is_file():
        save_file(to_transformers(random_state("ViT-H-14", 3)), pickscore)
    clip_l, head = work / "clip_l", work / "head.pth"
    if not head.is_file():
        clip_l.mkdir(exist_ok=True)
        save_file(random_state("ViT-L-14-quickgelu", 4), clip_l / "open_clip_model.safetensors")
        cfg = open_clip.get_model_config("ViT-L-14-quickgelu")
        preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
        preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
        (clip_l / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocess}))
        state = {}
        for i, (width_in, width_out) in zip((0, 2, 4, 6, 7), pairwise(LAION_WIDTHS), strict=True):
            layer = nn.Linear(width_in, width_out)
            state |= {f"layers.{i}.weight": layer.weight.detach(), f"layers.{i}.bias": layer.bias.detach()}
        torch.save(state, head)
    options = {name: {"weights": str(path)} for name, path in files.items()}
    options["pickscore"] = {"weights": str(pickscore)}
    options["laion_aesthetic"] = {"head": str(head), "clip": str(clip_l)}
    options["clip_score"] = {"model": str(clip_l)}
    return options


def resident_gib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the files, kept for the next call")
    options = write_files(parser.parse_args().work)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)).to(device)
    loaded: dict[str, Reward] = {}
    print("| reward | alone, GiB | together so far, GiB | process, GiB | loading, s | score, s | and gradient, s "
          "| kept for the backward pass, MiB |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for name, chosen in options.items():
        start = time.perf_counter()
        reward = loaded[name] = REWARDS.build(name, chosen).to(device)
        loading_s = time.perf_counter() - start
        own = networks_of(reward)
        with torch.no_grad():
            reward(image, [PROMPT])  # the prompt's embedding is kept from here on
            start = time.perf_counter()
            reward(image, [PROMPT])
            score_s = time.perf_counter() - start
        probe = image.clone().requires_grad_()
        start = time.perf_counter()
        torch.autograd.grad(reward(probe, [PROMPT]).sum(), probe)
        gradient_s = time.perf_counter() - start
        kept = stored_bytes(lambda: reward(probe, [PROMPT]), nn.ModuleList(own))  # noqa: B023, called at once
        together = held_bytes([network for each in loaded.values() for network in networks_of(each)])
        print(f"| {name} | {held_bytes(own) / GIB:.2f} | {together / GIB:.2f} | {resident_gib():.2f} | {loading_s:.1f} "
              f"| {score_s:.2f} | {gradient_s:.2f} | {kept / 2**20:.0f} |", flush=True)  # fmt: skip
    with torch.no_grad():
        start = time.perf_counter()
        for reward in (loaded["laion_aesthetic"], loaded["clip_score"]):
            reward(image, [PROMPT])
        apart_s = time.perf_counter() - start
        start = time.perf_counter()
        with embeddings_kept():
            for reward in (loaded["laion_aesthetic"], loaded["clip_score"]):
                reward(image, [PROMPT])
    mixture_s = time.perf_counter() - start
    print(f"\nlaion_aesthetic and clip_score: {apart_s:.2f} s one by one, {mixture_s:.2f} s in a mixture")


if __name__ == "__main__":
    main()
