"""Stable Diffusion 3 and 3.5: two CLIP encoders and T5, which may be left out.

B: images. C, H, W: latent channels, rows, columns.
"""

from collections.abc import Sequence
from pathlib import PurePath
from typing import cast

from torch import Tensor

from rltune.diffusion.families.base import FAMILIES, Conditioning, Described, TextBatch
from rltune.diffusion.families.pipeline import JOINT, TWO_STREAM_FEED_FORWARD, FlowFamily, cut_off

T5_TOKENS = 256
CLIP_TOKENS = 77


@FAMILIES.register("StableDiffusion3Pipeline")
class StableDiffusion3(FlowFamily):
    """A Stable Diffusion 3 pipeline (arXiv:2403.03206); padding is attended to, as in diffusers."""

    passes_sigmas = False
    has_fixed_text = True
    droppable = ("text_encoder_3",)  # zeros stand for T5's part then, as in the pipeline
    attention_layers = (*JOINT, "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
    other_layers = TWO_STREAM_FEED_FORWARD
    default_steps = 28
    default_guidance = 7.0
    usual_tokens = CLIP_TOKENS + T5_TOKENS

    def cut_off(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return prompt -> the end of it that T5 does not read, or, where it is left out, CLIP."""
        if self.pipeline.text_encoder_3 is None:
            return super().cut_off(prompts)
        return cut_off(self.pipeline.tokenizer_3, prompts, T5_TOKENS)

    @classmethod
    def is_distilled(cls, files: Described) -> bool:
        """Whether it is 3.5 large turbo: its files are those of 3.5 large, so that only its name tells."""
        return "turbo" in PurePath(files.base).name.lower()

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            prompts,
            prompts,
            device=self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=T5_TOKENS,
        )
        return [{"text": text[i], "pooled": pooled[i]} for i in range(len(prompts))]

    def pooled_text(self, text: TextBatch) -> Tensor:
        """Return the pooled embedding of both CLIP encoders."""
        return cast(Tensor, text["pooled"]).float()

    @property
    def most_patches(self) -> int:
        """Patches a side of the grid of places."""
        return int(self.pipeline.transformer.config.pos_embed_max_size)

    def _run(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        output = self.pipeline.transformer(
            hidden_states=x_BCHW,
            timestep=t.expand(len(x_BCHW)),
            encoder_hidden_states=text["text"],
            pooled_projections=text["pooled"],
            return_dict=False,
        )
        return cast(Tensor, output[0])
