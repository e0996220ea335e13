"""Qwen-Image: prompts of their own length through a language model, guidance that keeps the length of each token.

B: images. C, H, W: latent channels, rows, columns. L: text tokens.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rltune.diffusion.families.base import FAMILIES, Conditioning, TextBatch, widened
from rltune.diffusion.families.pipeline import JOINT, FlowFamily, cut_off_behind, pack, unpack


@FAMILIES.register("QwenImagePipeline")
class QwenImage(FlowFamily):
    """A Qwen-Image pipeline (arXiv:2508.02324)."""

    is_guidance_linear = False
    max_tokens = 1024
    usual_tokens = 128
    attention_layers = JOINT
    other_layers = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")

    default_steps = 50
    default_guidance = 4.0

    @property
    def num_channels(self) -> int:
        """C: a token has four places."""
        return super().num_channels // 4

    def collate(self, rows: Sequence[Conditioning], device: torch.device) -> TextBatch:
        """Pad texts to the longest, with a mask where any is shorter."""
        lengths = torch.tensor([len(row["text"]) for row in rows])
        text_BLD = widened(pad_sequence([row["text"] for row in rows], batch_first=True).to(device))
        mask_BL = torch.arange(text_BLD.shape[1])[None] < lengths[:, None]
        return {"text": text_BLD} if bool(mask_BL.all()) else {"text": text_BLD, "mask": mask_BL.to(device)}

    def guide(self, text_BCHW: Tensor, negative_BCHW: Tensor, scale: float) -> Tensor:
        """Combine linearly, then bring every token of 2 x 2 to the length of the text branch's."""
        height, width = text_BCHW.shape[-2:]
        text_BND, negative_BND = pack(text_BCHW), pack(negative_BCHW)
        mixed_BND = negative_BND + scale * (text_BND - negative_BND)
        wanted, got = (torch.linalg.vector_norm(f, dim=-1, keepdim=True) for f in (text_BND, mixed_BND))
        return unpack(mixed_BND * (wanted / got), height, width)

    def cut_off(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return prompt -> the end of it that is cut off; the tokens of the template are dropped, so that all count."""
        start = self.pipeline.prompt_template_encode.partition("{}")[0]
        num_read = self.max_tokens + self.pipeline.prompt_template_encode_start_idx
        return cut_off_behind(start, self.pipeline.tokenizer, prompts, num_read)

    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        # one at a time, so that nothing is padded and nothing depends on what is beside it
        return [{"text": self.pipeline.encode_prompt([prompt], device=self._device)[0][0]} for prompt in prompts]

    def _run(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        B, _, H, W = x_BCHW.shape
        output = self.pipeline.transformer(
            hidden_states=pack(x_BCHW),
            timestep=t.expand(B) / 1000,
            guidance=None,
            encoder_hidden_states=text["text"],
            encoder_hidden_states_mask=text.get("mask"),
            img_shapes=[[(1, H // 2, W // 2)]] * B,
            return_dict=False,
        )
        return unpack(output[0], H, W)

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """Decode clean latents as a video of one frame."""
        mean, std = self._unit(x_BCHW)
        latents = (x_BCHW * std + mean)[:, :, None].to(self.pipeline.vae.dtype)
        video = cast(Tensor, self.pipeline.vae.decode(latents, return_dict=False)[0])
        return self.to_image(video[:, :, 0], x_BCHW)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Encode RGB in [0, 1] -> clean latents (B, C, H, W), the mode of the autoencoder's distribution."""
        mean, std = self._unit(images_B3HW)
        return (self.mode(images_B3HW[:, :, None])[:, :, 0] - mean) / std

    def _unit(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1).to(like) for name in ("latents_mean", "latents_std"))
        return mean, std
