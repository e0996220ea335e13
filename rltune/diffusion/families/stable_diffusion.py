"""Stable Diffusion 1.x and 2.x, and every ``StableDiffusionPipeline`` folder, the built-in model among them.

B: images. P: prompts. L, D: text tokens and width. C, H, W: latent channels, rows, columns.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from rltune.diffusion.families.base import (
    ENCODE_BATCH,
    FAMILIES,
    Conditioning,
    Defaults,
    Described,
    TextBatch,
    described,
    linear_guidance,
    stack,
)
from rltune.diffusion.families.pipeline import cut_off, own_or_ddim
from rltune.diffusion.lora import target_modules
from rltune.diffusion.schedulers.base import Rule
from rltune.diffusion.table import ChainTable

OWN = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler")
"""Schedulers that are sampled as they ship, SD-Turbo's among them; others by DDIM on the same noise schedule."""


@FAMILIES.register("StableDiffusionPipeline")
class StableDiffusion:
    """A Stable Diffusion pipeline: CLIP text encoder, UNet, KL autoencoder, DDIM on the pipeline's own schedule."""

    lora_prefix = "unet"
    droppable: tuple[str, ...] = ()
    is_guidance_linear = True
    has_fixed_text = True
    collate = staticmethod(stack)
    guide = staticmethod(linear_guidance)

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._device = torch.device("cpu")
        self._scaling_factor = float(pipeline.vae.config.scaling_factor)
        size, factor = pipeline.unet.config.sample_size, int(pipeline.vae_scale_factor)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        self.size_px = (int(height) * factor, int(width) * factor)
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()

    @classmethod
    def defaults_of(cls, files: Described) -> Defaults:
        """Return 20 steps with guidance 5; those of SD-Turbo where the scheduler is that of a distilled model."""
        eta = files.own_eta if files.scheduler.get("_class_name") in OWN else 0.0
        if files.is_stable_diffusion_turbo:
            return Defaults(steps=4, guidance=1.0, eta=eta)
        return Defaults(steps=20, guidance=5.0, eta=eta)

    def defaults(self, base: str) -> Defaults:
        """Return the same for this model."""
        return self.defaults_of(described(self.pipeline, self.network, base=base))

    @property
    def network(self) -> nn.Module:
        """The UNet."""
        return cast(nn.Module, self.pipeline.unet)

    def lora_layers(self, targets: str | Sequence[str]) -> list[str]:
        """Return AlignProp's and TRL's choice for ``attention``; ``all`` adds feed-forward layers and convolutions."""
        return target_modules(targets)

    @property
    def decoder(self) -> nn.Module:
        """The KL autoencoder."""
        return cast(nn.Module, self.pipeline.vae)

    def read_table(
        self, *, num_steps: int, eta: float, shape: tuple[int, int, int], rule: Rule = "posterior"
    ) -> ChainTable:
        """Return the table of the scheduler that the pipeline ships, or of DDIM on its schedule; one for all sizes."""
        return own_or_ddim(self.pipeline.scheduler, num_steps=num_steps, eta=eta, rule=rule, own=OWN)

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """Return (C, H, W).

        Raises:
            ValueError: A side is not a multiple of the autoencoder's downsampling; the UNet takes any latent size.
        """
        factor = int(self.pipeline.vae_scale_factor)
        if height_px % factor or width_px % factor:
            raise ValueError(f"image sides must be multiples of {factor} px, got {height_px} x {width_px}")
        return int(self.pipeline.unet.config.in_channels), height_px // factor, width_px // factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Embed prompts -> ``text`` (L, D) each; the text encoder is back on the CPU afterwards."""
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        encoder.to(self._device)
        parts = []
        for start in range(0, len(prompts), ENCODE_BATCH):
            tokens = tokenizer(
                list(prompts[start : start + ENCODE_BATCH]),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            # pad tokens are attended to, as in diffusers' own StableDiffusionPipeline
            parts.append(encoder(tokens.input_ids.to(self._device))[0].cpu())
        encoder.to("cpu")
        return [{"text": text_LD} for part_PLD in parts for text_LD in part_PLD]

    def blank_text(self) -> Conditioning:
        """Return ``text`` (L, D) without values."""
        tokens, width = self.pipeline.tokenizer.model_max_length, self.pipeline.unet.config.cross_attention_dim
        return {"text": torch.empty(tokens, width, device="meta")}

    def encode_negative(self, prompt: str) -> None:
        """A negative prompt is embedded as any other is."""

    def pooled_text(self, text: TextBatch) -> Tensor:
        """Return the mean over tokens, (B, D)."""
        return cast(Tensor, text["text"]).float().mean(1)

    def cut_off(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return prompt -> the end of it that is cut off, as the tokenizer writes it, for those that are too long."""
        return cut_off(self.pipeline.tokenizer, prompts)

    def predict(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        """Run the UNet -> (B, C, H, W) float32; epsilon or v, as the model was trained."""
        dtype = self.pipeline.unet.dtype
        hidden_BLD = text["text"].to(dtype)
        output = self.pipeline.unet(x_BCHW.to(dtype), t, encoder_hidden_states=hidden_BLD, return_dict=False)
        return cast(Tensor, output[0]).to(x_BCHW.dtype)

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """Decode clean latents -> RGB in [0, 1], (B, 3, height, width) in the latents' dtype."""
        latents = (x_BCHW / self._scaling_factor).to(self.pipeline.vae.dtype)
        image_B3HW = self.pipeline.vae.decode(latents, return_dict=False)[0].to(x_BCHW.dtype)
        # as AlignProp: the clamp zeroes the gradient of pixels that are already out of range
        return cast(Tensor, (image_B3HW / 2 + 0.5).clamp(0, 1))

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Encode RGB in [0, 1] -> clean latents (B, C, H, W), the mode of the autoencoder's distribution."""
        pixels_B3HW = (2 * images_B3HW - 1).to(self.pipeline.vae.dtype)
        mode_BCHW = self.pipeline.vae.encode(pixels_B3HW).latent_dist.mode()
        return cast(Tensor, mode_BCHW).to(images_B3HW.dtype) * self._scaling_factor

    def to(self, device: torch.device) -> None:
        """Move UNet and VAE; the text encoder follows only while it encodes."""
        self._device = device
        self.pipeline.unet.to(device)
        self.pipeline.vae.to(device)
