"""AuraFlow: one text encoder whose padding is zeros, a grid of places that bounds the image's size.

B: images. C, H, W: latent channels, rows, columns.
"""

from math import isqrt
from typing import cast

from torch import Tensor

from rltune.diffusion.families.base import FAMILIES, Conditioning, TextBatch
from rltune.diffusion.families.pipeline import JOINT, FlowFamily


@FAMILIES.register("AuraFlowPipeline")
class AuraFlow(FlowFamily):
    """An AuraFlow pipeline."""

    passes_sigmas = False
    has_fixed_text = True
    max_tokens = 256
    default_steps = 50
    default_guidance = 3.5
    attention_layers = JOINT
    other_layers = tuple(
        f"{stream}.{layer}" for stream in ("ff", "ff_context") for layer in ("linear_1", "linear_2", "out_projection")
    )

    def _native_size(self) -> tuple[int, int]:
        side = int(self.pipeline.transformer.config.sample_size) * int(self.pipeline.vae_scale_factor)
        return side, side

    @property
    def most_patches(self) -> int:
        """Patches a side of the grid of places."""
        return isqrt(int(self.pipeline.transformer.config.pos_embed_max_size))

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        text, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self._device, max_sequence_length=self.max_tokens
        )
        return [{"text": text[i]} for i in range(len(prompts))]

    def _run(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        output = self.pipeline.transformer(
            x_BCHW, encoder_hidden_states=text["text"], timestep=t.expand(len(x_BCHW)) / 1000, return_dict=False
        )
        return cast(Tensor, output[0])
