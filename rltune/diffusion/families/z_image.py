"""Z-Image and Z-Image-Turbo: prompts of their own length, images as lists, time that runs the other way.

B: images. C, H, W: latent channels, rows, columns. L: text tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rltune.diffusion.families.base import FAMILIES, Conditioning, Described, TextBatch, widened
from rltune.diffusion.families.pipeline import FlowFamily, cut_off_in_chat

SIZE_PX = 1024
TURBO_SHIFT = 3.0
"""Of Z-Image-Turbo's schedule; Z-Image's is shifted by 6."""


@FAMILIES.register("ZImagePipeline")
class ZImage(FlowFamily):
    """A Z-Image pipeline (arXiv:2511.22699). Its guidance_scale s is 1 + s here; Turbo is sampled without."""

    max_tokens = 512
    usual_tokens = 96
    default_steps = 50
    default_guidance = 6.0
    distilled_steps = 8
    other_layers = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    def _native_size(self) -> tuple[int, int]:
        return SIZE_PX, SIZE_PX

    @classmethod
    def is_distilled(cls, files: Described) -> bool:
        """Whether it is Z-Image-Turbo, by how its schedule is shifted."""
        return float(files.scheduler.get("shift", TURBO_SHIFT)) <= TURBO_SHIFT

    def collate(self, rows: Sequence[Conditioning], device: torch.device) -> TextBatch:
        """Keep texts apart: a caption's length decides where the image's places begin, so padding would move them."""
        return {"text": [widened(row["text"].to(device)) for row in rows]}

    def cut_off(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return prompt -> the end of it that is cut off; it is the user's turn of a chat."""
        return cut_off_in_chat(self.pipeline.tokenizer, prompts, self.max_tokens)

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        text, _ = self.pipeline.encode_prompt(prompts, device=self._device, do_classifier_free_guidance=False)
        return [{"text": text_LD} for text_LD in text]

    def _run(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        images = list(x_BCHW.unsqueeze(2).unbind(0))
        time_B = (1000 - t.expand(len(x_BCHW))) / 1000
        output = self.pipeline.transformer(images, time_B, text["text"], return_dict=False)[0]
        return -torch.stack(output).squeeze(2)
