"""Parts of a Stable Diffusion pipeline, of the true classes and file layout, small and random."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TRAIN_PROMPTS = ["a cat", "a dog", "two red birds", "a blue fish", "one fox"]
EVAL_PROMPTS = ["a snail", "an octopus", "a lobster"]


def byte_tokenizer(length: int = 16) -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length)


def tiny_unet(*, is_deep: bool = True) -> UNet2DConditionModel:
    """Two levels and a middle between them, a block of every kind; or one level, in half the time."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D") if is_deep else ("CrossAttnDownBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn" if is_deep else None,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D") if is_deep else ("CrossAttnUpBlock2D",),
        block_out_channels=(16, 32) if is_deep else (16,),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def make_pipeline(folder: Path, scheduler: Any, *, is_deep: bool = False) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=tiny_unet(is_deep=is_deep),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def hollow(folder: Path) -> None:
    """Take the values out of a folder's weights: files of the same length, with their heads, and no more."""
    for path in folder.rglob("*.safetensors"):
        content = path.read_bytes()
        head = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[:head] + bytes(len(content) - head))


SD15_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
"""scheduler_config.json of stable-diffusion-v1-5."""
