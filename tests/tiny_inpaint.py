"""Inpainting pipelines of the true classes, small and random, and pictures to fill."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from rltune.canvas import Canvas, Picture
from tests import tiny_families
from tests.tiny import SD15_SCHEDULE
from tests.tiny_families import lively

SCHEDULE: dict[str, Any] = {**SD15_SCHEDULE, "clip_sample": False}


def sd_inpaint(channels: int = 9, scheduler: Any = None) -> StableDiffusionInpaintPipeline:
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return StableDiffusionInpaintPipeline(
        vae=tiny_families.autoencoder(4, scale=0.18215),
        text_encoder=CLIPTextModel(tiny_families.clip_config()),
        tokenizer=tiny_families.clip_tokenizer(),
        unet=unet,
        scheduler=scheduler or DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_inpaint(channels: int = 9, scheduler: Any = None) -> StableDiffusionXLInpaintPipeline:
    parts = dict(tiny_families.sdxl(scheduler).components)
    config = {**parts["unet"].config, "in_channels": channels, "out_channels": 4}
    parts["unet"] = UNet2DConditionModel.from_config(config)
    return StableDiffusionXLInpaintPipeline(**parts, force_zeros_for_empty_prompt=True, add_watermarker=False)


def sharp(pipeline: Any) -> Any:
    """Weights that text matters to, and an autoencoder whose distribution is as narrow as it can be: its draw is its
    mode to 3e-7, so that a pipeline that draws from it has one result."""
    pipeline = lively(pipeline)
    vae: AutoencoderKL = pipeline.vae
    with torch.no_grad():
        layer = vae.quant_conv if vae.quant_conv is not None else vae.encoder.conv_out
        half = layer.weight.shape[0] // 2
        layer.weight[half:] = 0
        layer.bias[half:] = -30  # of the logarithm of the variance, which is clamped here
    return pipeline


@dataclass(frozen=True)
class Noise:
    """A picture of noise, with a hole from row ``top`` and column ``left`` to the middle and beyond."""

    seed: int
    top: float = 0.25
    left: float = 0.25

    def read(self, height: int, width: int) -> Picture:
        image = np.random.default_rng(self.seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.bool_)
        mask[int(self.top * height) : int(0.75 * height), int(self.left * width) : int(0.75 * width)] = True
        return image, mask


def canvases(prompts: list[str]) -> list[str]:
    return [Canvas(prompt, Noise(i, left=0.25 * (i % 2))) for i, prompt in enumerate(prompts)]
