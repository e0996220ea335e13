"""FLUX.2 dev and klein: latents already in patches, layers of a language model as text.

B: images. C, H, W: latent channels, rows, columns. L: text tokens. N: image tokens.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from rltune.diffusion.families.base import FAMILIES, Conditioning, Described, TextBatch
from rltune.diffusion.families.pipeline import JOINT, FlowFamily, cut_off, cut_off_in_chat


class Flux2(FlowFamily):
    """What dev and klein have in common."""

    max_tokens = 512
    has_fixed_text = True
    attention_layers = (*JOINT, "attn.to_qkv_mlp_proj")
    other_layers = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
    default_steps = 50
    layers: tuple[int, ...]
    """Of the language model, whose outputs are the text."""

    def lora_layers(self, targets: str | Sequence[str]) -> list[str]:
        """Return the layers of a preset; the output of a single block's attention ends as a list of others does."""
        layers = super().lora_layers(targets)
        blocks = len(self.pipeline.transformer.single_transformer_blocks)
        single = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(blocks)]
        return layers + (single if isinstance(targets, str) else [])

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """Return (C, H, W): a latent is a patch of 2 x 2 of the autoencoder's.

        Raises:
            ValueError: A side is not a multiple of a patch.
        """
        channels, height, width = super().latent_shape(height_px, width_px)
        return channels, height // 2, width // 2

    def mu(self, num_steps: int, shape: tuple[int, int, int]) -> float:
        """Return the shift that was fitted to tokens and steps, as the pipeline computes it."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu  # the pipeline and all it imports

        return float(compute_empirical_mu(shape[1] * shape[2], num_steps))

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        text, _ = self.pipeline.encode_prompt(
            prompts, device=self._device, max_sequence_length=self.max_tokens, text_encoder_out_layers=self.layers
        )
        return [{"text": text[i]} for i in range(len(prompts))]

    def _run(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        B, _, H, W = x_BCHW.shape
        device = x_BCHW.device
        zero = torch.zeros(1, dtype=torch.int64)
        image_ids = torch.cartesian_prod(zero, torch.arange(H), torch.arange(W), zero)
        text_ids = torch.cartesian_prod(zero, zero, zero, torch.arange(text["text"].shape[1]))
        output = self.pipeline.transformer(
            hidden_states=x_BCHW.flatten(2).transpose(1, 2),
            timestep=t.expand(B) / 1000,
            guidance=self.told_guidance(text, x_BCHW),
            encoder_hidden_states=text["text"],
            txt_ids=text_ids.to(device),
            img_ids=image_ids.to(device),
            return_dict=False,
        )
        return cast(Tensor, output[0]).transpose(1, 2).reshape(B, -1, H, W)

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """Decode clean latents, which a batch normalisation of the autoencoder has brought to unit variance."""
        vae, (mean, std) = self.pipeline.vae, self._unit(x_BCHW)
        latents = unpatch(x_BCHW * std + mean).to(vae.dtype)
        return self.to_image(vae.decode(latents, return_dict=False)[0], x_BCHW)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Encode RGB in [0, 1] -> clean latents (B, C, H, W), the mode of the autoencoder's distribution."""
        mean, std = self._unit(images_B3HW)
        return (pixel_unshuffle(self.mode(images_B3HW), 2) - mean) / std

    def _unit(self, like: Tensor) -> tuple[Tensor, Tensor]:
        bn = self.pipeline.vae.bn
        std = (bn.running_var.view(1, -1, 1, 1) + self.pipeline.vae.config.batch_norm_eps).sqrt()
        return bn.running_mean.view(1, -1, 1, 1).to(like), std.to(like)


def unpatch(x_BCHW: Tensor) -> Tensor:
    """Return the autoencoder's latents (B, C/4, 2 H, 2 W) of patches of 2 x 2, the place innermost in a channel."""
    B, C, H, W = x_BCHW.shape
    return x_BCHW.view(B, C // 4, 2, 2, H, W).permute(0, 1, 4, 2, 5, 3).reshape(B, C // 4, 2 * H, 2 * W)


@FAMILIES.register("Flux2Pipeline")
class Flux2Dev(Flux2):
    """FLUX.2 dev: Mistral, guidance as a number that the network is told."""

    default_embedded_guidance = 4.0
    layers = (10, 20, 30)

    def cut_off(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return prompt -> the end of it that is cut off; a system message stands before it."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input  # the pipeline and all it imports

        processor = self.pipeline.tokenizer
        tokenizer = getattr(processor, "tokenizer", processor)  # published ones have a processor of text and images
        chat = format_input(["<prompt>"], system_message=self.pipeline.system_message)
        before, _ = processor.apply_chat_template(chat, tokenize=False)[0].split("<prompt>")
        num_before = len(tokenizer(before, add_special_tokens=False).input_ids)
        return cut_off(tokenizer, prompts, self.max_tokens - num_before + int(tokenizer.num_special_tokens_to_add()))


@FAMILIES.register("Flux2KleinPipeline")
class Flux2Klein(Flux2):
    """FLUX.2 klein: Qwen3; the distilled models are sampled without guidance."""

    layers = (9, 18, 27)
    default_guidance = 4.0

    def cut_off(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return prompt -> the end of it that is cut off; it is the user's turn of a chat."""
        return cut_off_in_chat(self.pipeline.tokenizer, prompts, self.max_tokens)

    @classmethod
    def is_distilled(cls, files: Described) -> bool:
        """Whether it is distilled, as its index says."""
        return bool(files.pipeline.get("is_distilled"))
