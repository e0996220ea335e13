"""SDXL and SDXL-Turbo: two CLIP text encoders, a pooled embedding and the image's size beside the text.

B: images. C, H, W: latent channels, rows, columns.
"""

from typing import cast

import torch
from torch import Tensor

from rltune.diffusion.families.base import FAMILIES, Conditioning, Described, TextBatch
from rltune.diffusion.families.pipeline import PipelineFamily, own_or_ddim
from rltune.diffusion.lora import ALL_LAYERS, ATTENTION
from rltune.diffusion.schedulers.base import Rule
from rltune.diffusion.table import ChainTable

OWN = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers that are sampled as they ship; others by DDIM on the same noise schedule."""


CLIP_TOKENS = 77


@FAMILIES.register("StableDiffusionXLPipeline")
class StableDiffusionXL(PipelineFamily):
    """An SDXL pipeline (arXiv:2307.01952)."""

    lora_prefix = "unet"
    has_fixed_text = True
    px_per_patch = 1
    other_layers = ALL_LAYERS[len(ATTENTION) :]
    default_steps = 50
    default_guidance = 5.0

    @classmethod
    def is_distilled(cls, files: Described) -> bool:
        """Whether it is SDXL-Turbo, by its scheduler."""
        return files.is_stable_diffusion_turbo

    def read_table(
        self, *, num_steps: int, eta: float, shape: tuple[int, int, int], rule: Rule = "posterior"
    ) -> ChainTable:
        """Return the table of the scheduler that the pipeline ships, one for all sizes."""
        return own_or_ddim(self.pipeline.scheduler, num_steps=num_steps, eta=eta, rule=rule, own=OWN)

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self._device, do_classifier_free_guidance=False
        )
        return [{"text": text[i], "pooled": pooled[i]} for i in range(len(prompts))]

    def blank_text(self) -> Conditioning:
        """Return text and pooled text without values."""
        config = self.pipeline.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim  # six sizes
        return {
            "text": torch.empty(CLIP_TOKENS, config.cross_attention_dim, device="meta"),
            "pooled": torch.empty(pooled, device="meta"),
        }

    def encode_negative(self, prompt: str) -> Conditioning | None:
        """Zeros for no negative prompt where the model was trained so, as the pipeline has it."""
        if prompt or not self.pipeline.config.force_zeros_for_empty_prompt:
            return None
        return {name: torch.zeros_like(value) for name, value in self.encode_prompts([prompt])[0].items()}

    def pooled_text(self, text: TextBatch) -> Tensor:
        """Return the second encoder's pooled embedding."""
        return cast(Tensor, text["pooled"]).float()

    def _run(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        factor = int(self.pipeline.vae_scale_factor)
        height, width = x_BCHW.shape[2] * factor, x_BCHW.shape[3] * factor
        # original size, crop, target size: the image is whole and of the size that it is drawn in
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=x_BCHW.dtype, device=x_BCHW.device)
        added = {"text_embeds": text["pooled"], "time_ids": sizes.expand(len(x_BCHW), -1)}
        output = self.pipeline.unet(x_BCHW, t, text["text"], added_cond_kwargs=added, return_dict=False)
        return cast(Tensor, output[0])

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """Decode clean latents -> RGB in [0, 1]; a fine-tuned autoencoder may have a mean and a deviation a channel."""
        if (unit := self._unit(x_BCHW)) is None:
            return super().decode(x_BCHW)
        mean, std = unit
        latents = (x_BCHW * std / self.pipeline.vae.config.scaling_factor + mean).to(self.pipeline.vae.dtype)
        return self.to_image(self.pipeline.vae.decode(latents, return_dict=False)[0], x_BCHW)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Encode RGB in [0, 1] -> clean latents (B, C, H, W), the mode of the autoencoder's distribution."""
        if (unit := self._unit(images_B3HW)) is None:
            return super().encode(images_B3HW)
        mean, std = unit
        return (self.mode(images_B3HW) - mean) * float(self.pipeline.vae.config.scaling_factor) / std

    def _unit(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return mean and deviation that the latents of a fine-tuned autoencoder have, None where there are none."""
        config = self.pipeline.vae.config
        if config.get("latents_mean") is None:
            return None
        mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1).to(like) for name in ("latents_mean", "latents_std"))
        return mean, std
