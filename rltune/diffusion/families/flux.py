"""FLUX.1 dev and schnell: latents in tokens of 2 x 2, T5 and a pooled CLIP embedding, guidance as a number of dev's.

B: images. C, H, W: latent channels, rows, columns. N: image tokens.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from rltune.diffusion.families.base import FAMILIES, Conditioning, Defaults, Described, TextBatch
from rltune.diffusion.families.pipeline import JOINT, TWO_STREAM_FEED_FORWARD, FlowFamily, cut_off, pack, unpack

T5_TOKENS = 512


@FAMILIES.register("FluxPipeline")
class Flux(FlowFamily):
    """A FLUX.1 pipeline."""

    usual_tokens = T5_TOKENS
    has_fixed_text = True
    attention_layers = JOINT
    other_layers = (*TWO_STREAM_FEED_FORWARD, "proj_mlp")
    default_steps = 28
    default_embedded_guidance = 3.5

    @classmethod
    def defaults_of(cls, files: Described) -> Defaults:
        """Return dev's, or schnell's, whose network is told no guidance."""
        own = super().defaults_of(files)
        return replace(own, embedded_guidance=None) if cls.is_distilled(files) else own

    @classmethod
    def is_distilled(cls, files: Described) -> bool:
        """Whether it is schnell."""
        return not files.network.get("guidance_embeds", False)

    @property
    def num_channels(self) -> int:
        """C: a token has four places."""
        return super().num_channels // 4

    def cut_off(self, prompts: Any) -> dict[str, str]:
        """Return prompt -> the end of it that T5 does not read; CLIP's part is a summary of the beginning."""
        return cut_off(self.pipeline.tokenizer_2, prompts, T5_TOKENS)

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        text, pooled, _ = self.pipeline.encode_prompt(prompts, None, device=self._device, max_sequence_length=T5_TOKENS)
        return [{"text": text[i], "pooled": pooled[i]} for i in range(len(prompts))]

    def pooled_text(self, text: TextBatch) -> Tensor:
        """Return CLIP's pooled embedding."""
        return cast(Tensor, text["pooled"]).float()

    def _run(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        B, _, H, W = x_BCHW.shape
        device = x_BCHW.device
        is_told = self.pipeline.transformer.config.guidance_embeds
        output = self.pipeline.transformer(
            hidden_states=pack(x_BCHW),
            timestep=t.expand(B) / 1000,
            guidance=self.told_guidance(text, x_BCHW) if is_told else None,
            pooled_projections=text["pooled"],
            encoder_hidden_states=text["text"],
            txt_ids=torch.zeros(text["text"].shape[1], 3, device=device, dtype=x_BCHW.dtype),
            img_ids=image_places(H // 2, W // 2, x_BCHW),
            return_dict=False,
        )
        return unpack(output[0], H, W)


def image_places(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return (0, row, column) of every image token, ``(N, 3)``, on the device and in the dtype of ``like``."""
    ids_HW3 = torch.zeros(rows, columns, 3, device=like.device, dtype=like.dtype)
    ids_HW3[..., 1] += torch.arange(rows, device=like.device)[:, None]
    ids_HW3[..., 2] += torch.arange(columns, device=like.device)[None]
    return ids_HW3.reshape(-1, 3)
