"""What processes on one node that load the same pipeline hold of its weights, each for itself and together. Linux.

    python tests/benchmarks/shared_weights.py [FOLDER] [--processes 2] [--copied]

Without a folder a random pipeline of Stable Diffusion's classes is made, of about 330 MB in float32, as published
models are stored. ``--copied`` reads the weights into each process's own memory for comparison. Prints, for each
process, the increase over its libraries in MiB: private (nobody else has it), shared, and its fair part of all (Pss).
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rltune.diffusion.loading import load_model

KINDS = {"private": ("Private_Clean", "Private_Dirty"), "shared": ("Shared_Clean", "Shared_Dirty"), "fair": ("Pss",)}
"""Pages of a file that was just written are called dirty too."""


def memory() -> dict[str, float]:
    """Return this process's memory by kind, MiB."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    sizes = {line[0].rstrip(":"): int(line[1]) / 1024 for line in lines}
    return {kind: sum(sizes[name] for name in names) for kind, names in KINDS.items()}


def make_pipeline(folder: Path) -> None:
    """Write a random pipeline."""
    torch.manual_seed(0)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=len(vocab) - 2,
        eos_token_id=len(vocab) - 1,
        pad_token_id=len(vocab) - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(128, 256, 512),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=256,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(64, 256),
        latent_channels=4,
        layers_per_block=2,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def worker(folder: Path, *, is_copied: bool) -> None:
    """Load, run once, and print what memory that took; waits for a line before each measurement."""
    before = memory()

    def measure(what: str) -> None:
        print("ready", flush=True)
        sys.stdin.readline()  # until the other processes are as far
        now = memory()
        print(what, *(f"{now[kind] - before[kind]:.0f}" for kind in KINDS), flush=True)

    model = load_model(str(folder))
    networks: list[nn.Module] = [getattr(model.pipeline, name) for name in ("unet", "vae", "text_encoder")]
    if is_copied:
        for network in networks:
            for parameter in network.parameters():
                parameter.data = parameter.data.clone()
    for network in networks:  # the pages come with the first use
        for parameter in network.parameters():
            parameter.sum()
    measure("loaded")
    text = model.collate(model.encode_prompts(["a"]), torch.device("cpu"))
    x_BCHW = torch.zeros(1, *model.latent_shape(*model.size_px))
    with torch.no_grad():
        model.decode(model.predict(x_BCHW, torch.tensor(1), text))
    measure("after-a-pass")
    sys.stdin.readline()  # who leaves would leave its shared pages to the others


def main() -> None:
    """Start the processes and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--copied", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.folder, is_copied=arguments.copied)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder
        if folder is None:
            folder = Path(made)
            make_pipeline(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**20
        print(f"{folder if arguments.folder else 'a random pipeline'}: {size:.0f} MiB of weights on disk")
        command = [sys.executable, __file__, str(folder), "--worker", *(["--copied"] if arguments.copied else [])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(arguments.processes)]
        print(f"{'':>22}" + "".join(f"{kind:>15}" for kind in KINDS))
        for _ in ("loaded", "after-a-pass"):
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for number, process in enumerate(processes):
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                what, *values = process.stdout.readline().split()
                print(f"{number} {what:>20}" + "".join(f"{value:>15}" for value in values))
        for process in processes:
            process.communicate("\n")


if __name__ == "__main__":
    main()
