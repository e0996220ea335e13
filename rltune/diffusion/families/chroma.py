"""Chroma: FLUX.1's latents and places, T5 alone, a mask of the tokens that count.

B: images. C, H, W: latent channels, rows, columns.
"""

import torch
from torch import Tensor

from rltune.diffusion.families.base import FAMILIES, Conditioning, TextBatch
from rltune.diffusion.families.flux import image_places
from rltune.diffusion.families.pipeline import JOINT, TWO_STREAM_FEED_FORWARD, FlowFamily, pack, unpack


@FAMILIES.register("ChromaPipeline")
class Chroma(FlowFamily):
    """A Chroma pipeline."""

    max_tokens = 512
    default_steps = 35
    default_guidance = 5.0
    mask_dtype = torch.float32
    attention_layers = JOINT
    other_layers = (*TWO_STREAM_FEED_FORWARD, "proj_mlp")

    @property
    def num_channels(self) -> int:
        """C: a token has four places."""
        return super().num_channels // 4

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        text, _, mask, *_ = self.pipeline.encode_prompt(
            prompts, device=self._device, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens
        )
        return [{"text": text[i], "mask": mask[i]} for i in range(len(prompts))]

    def _run(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        B, _, H, W = x_BCHW.shape
        # numbers and not yes-or-no, so that attention adds them to its scores: as the pipeline has it
        mask_BM = torch.cat([text["mask"], x_BCHW.new_ones(B, H * W // 4)], dim=1)
        output = self.pipeline.transformer(
            hidden_states=pack(x_BCHW),
            timestep=t.expand(B) / 1000,
            encoder_hidden_states=text["text"],
            txt_ids=x_BCHW.new_zeros(text["text"].shape[1], 3),
            img_ids=image_places(H // 2, W // 2, x_BCHW),
            attention_mask=mask_BM,
            return_dict=False,
        )
        return unpack(output[0], H, W)
