"""Lumina-Image 2.0: a language model with a system prompt, time that runs the other way, guidance that keeps lengths.

B: images. C, H, W: latent channels, rows, columns.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from rltune.diffusion.families.base import FAMILIES, Conditioning, TextBatch, linear_guidance
from rltune.diffusion.families.pipeline import FlowFamily, cut_off


@FAMILIES.register("Lumina2Pipeline")
class Lumina2(FlowFamily):
    """A Lumina-Image 2.0 pipeline (arXiv:2503.21758)."""

    default_steps = 30
    default_guidance = 4.0
    is_guidance_linear = False
    max_tokens = 256
    mask_dtype = torch.int64
    other_layers = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")

    def guide(self, text_BCHW: Tensor, negative_BCHW: Tensor, scale: float) -> Tensor:
        """Combine linearly, then bring every row of every channel to the length of the text branch's."""
        mixed_BCHW = linear_guidance(text_BCHW, negative_BCHW, scale)
        wanted, got = (torch.linalg.vector_norm(f, dim=-1, keepdim=True) for f in (text_BCHW, mixed_BCHW))
        return cast(Tensor, mixed_BCHW * (wanted / got))

    def cut_off(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return prompt -> the end of it that is cut off; the system prompt stands before it."""
        tokenizer = self.pipeline.tokenizer
        before = tokenizer(f"{self.pipeline.system_prompt} <Prompt Start> ", add_special_tokens=False).input_ids
        return cut_off(tokenizer, prompts, self.max_tokens - len(before))

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        text, mask, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self._device, max_sequence_length=self.max_tokens
        )
        return [{"text": text[i], "mask": mask[i]} for i in range(len(prompts))]

    def encode_negative(self, prompt: str) -> Conditioning | None:
        """A negative prompt goes without the system prompt, as in the pipeline."""
        with torch.no_grad(), self.encoders_here():
            *_, text, mask = self.pipeline.encode_prompt(
                [""], negative_prompt=[prompt], device=self._device, max_sequence_length=self.max_tokens
            )
        return {"text": text[0].cpu(), "mask": mask[0].cpu()}

    def _run(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        mask_BL = text["mask"]
        if mask_BL.is_meta:  # the network asks for the texts' lengths
            mask_BL = torch.ones_like(mask_BL, device="cpu")
        output = self.pipeline.transformer(
            hidden_states=x_BCHW,
            timestep=1 - t.expand(len(x_BCHW)) / 1000,
            encoder_hidden_states=text["text"],
            encoder_attention_mask=mask_BL,
            return_dict=False,
        )
        return -cast(Tensor, output[0])
