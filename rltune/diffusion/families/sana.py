"""SANA and SANA-Sprint: a language model that is given instructions, latents of a 32nd of the image's size.

B: images. C, H, W: latent channels, rows, columns.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rltune.diffusion.families.base import FAMILIES, Conditioning, TextBatch
from rltune.diffusion.families.pipeline import FlowFamily, cut_off


@FAMILIES.register("SanaPipeline")
class Sana(FlowFamily):
    """A SANA pipeline (arXiv:2410.10629). It ships DPM-Solver++ of second order; its first is Euler on the flow."""

    default_steps = 20
    default_guidance = 4.5
    passes_sigmas = False
    px_per_patch = 1
    max_tokens = 300
    mask_dtype = torch.int64
    other_layers = ("ff.conv_inverted", "ff.conv_point")

    def _native_size(self) -> tuple[int, int]:
        side = int(self.pipeline.transformer.config.sample_size) * int(self.pipeline.vae_scale_factor)
        return side, side

    def cut_off(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return prompt -> the end of it that is cut off; the first token and the instructions' last are read too."""
        return cut_off(self.pipeline.tokenizer, prompts, self.max_tokens - 1)

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        text, mask, *_ = self.pipeline.encode_prompt(
            prompts,
            device=self._device,
            max_sequence_length=self.max_tokens,
            complex_human_instruction=self._instructions(),
            **self._options(),
        )
        return [{"text": text[i], "mask": mask[i]} for i in range(len(prompts))]

    def _instructions(self) -> Any:
        """What the pipeline puts before a prompt by default: how a user's words are to be enriched."""
        return inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default

    def _options(self) -> dict[str, Any]:
        return {"do_classifier_free_guidance": False}

    def encode_negative(self, prompt: str) -> Conditioning | None:
        """A negative prompt goes without instructions, as in the pipeline."""
        with torch.no_grad(), self.encoders_here():
            text, mask, *_ = self.pipeline.encode_prompt(
                [prompt], device=self._device, max_sequence_length=self.max_tokens, **self._options()
            )
        return {"text": text[0].cpu(), "mask": mask[0].cpu()}

    def _run(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        output = self.pipeline.transformer(
            x_BCHW,
            encoder_hidden_states=text["text"],
            encoder_attention_mask=text["mask"],
            timestep=t.expand(len(x_BCHW)) * self.pipeline.transformer.config.timestep_scale,
            return_dict=False,
        )
        return cast(Tensor, output[0])[:, : x_BCHW.shape[1]]  # a learned variance, where there is one, comes behind


@FAMILIES.register("SanaSprintPipeline")
class SanaSprint(Sana):
    """SANA-Sprint (arXiv:2503.09641): steps in angles, guidance as a number that the network is told."""

    default_steps = 2
    default_guidance = 1.0
    default_embedded_guidance = 4.5

    def _options(self) -> dict[str, Any]:
        return {}

    def grid(self, num_steps: int, shape: tuple[int, int, int]) -> Mapping[str, Any]:
        """Return the number of steps; the angle between two is the pipeline's default, which it has for two alone."""
        between = {} if num_steps == 2 else {"intermediate_timesteps": None}
        return {"num_inference_steps": num_steps, **between}

    def predict(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        """Run the network, which was trained on a flow, at the place of the flow that the angle t is at -> f."""
        sigma = t.sin() / (t.cos() + t.sin())
        norm = (sigma**2 + (1 - sigma) ** 2).sqrt()
        flow_BCHW = x_BCHW * norm
        v_BCHW = super().predict(flow_BCHW, sigma, text)
        return ((1 - 2 * sigma) * flow_BCHW + (1 - 2 * sigma + 2 * sigma**2) * v_BCHW) / norm

    def _run(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        told_B = self.told_guidance(text, x_BCHW)
        assert told_B is not None
        told_B = told_B * float(self.pipeline.transformer.config.guidance_embeds_scale)
        output = self.pipeline.transformer(
            x_BCHW,
            encoder_hidden_states=text["text"],
            encoder_attention_mask=text["mask"],
            guidance=told_B.to(x_BCHW.dtype),
            timestep=t.expand(len(x_BCHW)),
            return_dict=False,
        )
        return cast(Tensor, output[0])
