"""Writes the finished networks as the files that ship: half precision, readable by everyone, in stock formats."""

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from rltune.builtin.denoiser import Denoiser
from rltune.builtin.image_text import ImageText
from rltune.builtin.networks import AestheticHead, image_text_config, make_scheduler
from rltune.builtin.scenes import make_scene

NUM_TRAIN_PROMPTS = 512
NUM_HELDOUT_PROMPTS = 256


def export_pipeline(folder: Path, *, autoencoder: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer) -> None:
    """A diffusers ``StableDiffusionPipeline`` folder, stored in float16. Converts the networks in place."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder.half().cpu(),
        text_encoder=denoiser.text_encoder.half().cpu(),
        tokenizer=tokenizer,
        unet=denoiser.unet.half().cpu(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    # who names no dtype gets transformers' parts in that of their config and diffusers' in float32: one for all
    settings = folder / "text_encoder" / "config.json"
    write_text(settings, json.dumps({**json.loads(settings.read_text()), "dtype": "float32"}, indent=2).splitlines())
    make_readable(folder)


def export_image_text(folder: Path, *, model: ImageText, tokenizer: CLIPTokenizer) -> None:
    """An open_clip ``local-dir:`` folder."""
    tokenizer.save_pretrained(folder)
    config = {
        "model_cfg": image_text_config(len(tokenizer)),
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(_half(model.clip), folder / "open_clip_model.safetensors")
    make_readable(folder)


def export_reader(path: Path, reader: nn.Module) -> None:
    """The weights of the counter or the judge, in half precision."""
    save_file(_half(reader), path)
    path.chmod(0o644)


def export_head(path: Path, head: AestheticHead) -> None:
    """The head's weights; the header says how to build it and how to read its score."""
    metadata = {
        "in": str(head.in_dim),
        "hidden": json.dumps(list(head.hidden)),
        "activation": "silu",
        "offset": str(head.offset),
        "scale": str(head.scale),
        "reads": "the L2-normalised image embedding; score = offset + scale * mlp(embedding)",
    }
    save_file(_half(head), path, metadata=metadata)
    path.chmod(0o644)


def load_head(path: Path) -> AestheticHead:
    """Build the head that ``export_head`` wrote, in float32 and eval mode."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
    head = AestheticHead(
        int(metadata["in"]),
        tuple(json.loads(metadata["hidden"])),
        offset=float(metadata["offset"]),
        scale=float(metadata["scale"]),
    )
    head.load_state_dict(state)
    return head.eval()


def distinct_prompts(seed: int, count: int, *, is_heldout: bool) -> tuple[str, ...]:
    """``count`` captions of one split, no two alike, all naming the ground: they say the whole content."""
    prompts: dict[str, None] = {}
    index = 0
    while len(prompts) < count:
        scene = make_scene(seed, index)
        if scene.is_heldout() == is_heldout:
            prompts[scene.caption(random.Random(f"{seed}/{index}"), always_names_ground=True)] = None
        index += 1
    return tuple(prompts)


def export_prompts(folder: Path, seed: int) -> None:
    """``train.txt`` and ``heldout.txt``, one prompt a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, is_heldout in (("train", NUM_TRAIN_PROMPTS, False), ("heldout", NUM_HELDOUT_PROMPTS, True)):
        write_text(folder / f"{name}.txt", distinct_prompts(seed, count, is_heldout=is_heldout))


def write_text(path: Path, lines: Sequence[str]) -> None:
    """Write ``lines``, replacing the file in one go."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def write_figures(path: Path, figures: Mapping[str, Mapping[str, float]]) -> None:
    """All measured figures by stage, as JSON."""
    write_text(path, json.dumps(figures, indent=2).splitlines())


def make_readable(folder: Path) -> None:
    """Safetensors files come out with mode 0600; a wheel built from those is unreadable for other users."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _half(module: nn.Module) -> dict[str, Tensor]:
    def convert(value: Tensor) -> Tensor:
        return value.detach().to(torch.float16 if value.is_floating_point() else value.dtype).cpu().contiguous()

    return {name: convert(value) for name, value in module.state_dict().items()}
