"""What the families of this package have in common: a diffusers pipeline, its encoders, its network, its decoder.

B: images. C, H, W: latent channels, rows, columns. L, D: text tokens and width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from rltune.diffusion.families.base import (
    EMBEDDED_GUIDANCE,
    ENCODE_BATCH,
    Conditioning,
    Defaults,
    Described,
    TextBatch,
    described,
    linear_guidance,
    stack,
)
from rltune.diffusion.families.turns import taking_turns
from rltune.diffusion.lora import ATTENTION
from rltune.diffusion.schedulers.base import Rule, only_posterior, read_scheduler
from rltune.diffusion.table import ChainTable, read_ddim_table


class PipelineFamily(ABC):
    """Everything of a family but how prompts are encoded and how the network is called; each may be another's own."""

    lora_prefix = "transformer"
    droppable: tuple[str, ...] = ()
    is_guidance_linear = True
    has_fixed_text = False
    px_per_patch = 2
    """Latent rows and columns that the network takes together; sides must be a multiple."""
    max_tokens: ClassVar[int | None] = None
    """Tokens of a prompt that are read, special ones included; None for the tokenizer's own limit."""

    usual_tokens: ClassVar[int | None] = None
    """Tokens of a prompt as the network gets them, where they are others than ``max_tokens``."""
    mask_dtype: ClassVar[torch.dtype | None] = None
    """Of the mask of tokens that count, where the encoder gives one."""

    attention_layers: ClassVar[tuple[str, ...]] = ATTENTION
    """Endings of the layers that ``model.lora.targets: attention`` means."""
    other_layers: ClassVar[tuple[str, ...]] = ()
    """Those that ``all`` adds."""

    default_steps: ClassVar[int]
    """Steps where an experiment does not say; as a rule those of the pipeline's own call."""
    default_guidance: ClassVar[float] = 1.0
    distilled_steps: ClassVar[int] = 4
    """Steps of the family's distilled models, whose guidance is 1."""
    default_embedded_guidance: ClassVar[float | None] = None
    """What the network is told of guidance; None where it is told nothing."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._device = torch.device("cpu")
        for module in self._modules().values():
            module.requires_grad_(False).eval()
        self.size_px = self._native_size()

    def _modules(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    def _native_size(self) -> tuple[int, int]:
        side = int(self.pipeline.default_sample_size) * int(self.pipeline.vae_scale_factor)
        return side, side

    @classmethod
    def defaults_of(cls, files: Described) -> Defaults:
        """Return what a model of this family is sampled with where an experiment does not say."""
        is_distilled = cls.is_distilled(files)
        return Defaults(
            steps=cls.distilled_steps if is_distilled else cls.default_steps,
            guidance=1.0 if is_distilled else cls.default_guidance,
            eta=files.own_eta,
            embedded_guidance=cls.default_embedded_guidance,
        )

    @classmethod
    def is_distilled(cls, files: Described) -> bool:
        """Whether the files are those of a model for few steps without guidance."""
        return False

    def defaults(self, base: str) -> Defaults:
        """Return the same for this model."""
        return self.defaults_of(described(self.pipeline, self.network, base=base))

    @property
    def network(self) -> nn.Module:
        """The denoising network that adapters are attached to."""
        return cast(nn.Module, getattr(self.pipeline, self.lora_prefix))

    @property
    def decoder(self) -> nn.Module:
        """The autoencoder."""
        return cast(nn.Module, self.pipeline.vae)

    def lora_layers(self, targets: str | Sequence[str]) -> list[str]:
        """Return the layers that ``attention`` or ``all`` stands for, of those that are there; a list is itself."""
        if not isinstance(targets, str):
            return list(targets)
        wanted = self.attention_layers if targets == "attention" else (*self.attention_layers, *self.other_layers)
        names = [f".{name}" for name, _ in self.network.named_modules()]
        return [layer for layer in wanted if any(name.endswith(f".{layer}") for name in names)]

    @property
    def num_channels(self) -> int:
        """C."""
        return int(cast(Any, self.network).config.in_channels)

    @property
    def most_patches(self) -> int | None:
        """Patches a side that the network knows places of; None for any number."""
        return None

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """Return (C, H, W).

        Raises:
            ValueError: A side is not a multiple of the autoencoder's downsampling times the network's patches, or has
                more patches than the network knows places of.
        """
        factor = int(self.pipeline.vae_scale_factor)
        divisor = factor * self.px_per_patch
        if height_px % divisor or width_px % divisor:
            raise ValueError(f"image sides must be multiples of {divisor} px, got {height_px} x {width_px}")
        if self.most_patches is not None and max(height_px, width_px) > self.most_patches * divisor:
            most = self.most_patches * divisor
            raise ValueError(f"image sides must be at most {most} px, got {height_px} x {width_px}")
        return self.num_channels, height_px // factor, width_px // factor

    def read_table(
        self, *, num_steps: int, eta: float, shape: tuple[int, int, int], rule: Rule = "posterior"
    ) -> ChainTable:
        """Return the table of the pipeline's own scheduler."""
        grid = self.grid(num_steps, shape)
        return read_scheduler(self.pipeline.scheduler, num_steps=num_steps, eta=eta, rule=rule, grid=grid)

    def grid(self, num_steps: int, shape: tuple[int, int, int]) -> Mapping[str, Any] | None:
        """Return what the pipeline hands to ``set_timesteps``; None for the number of steps alone."""
        return None

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Embed prompts; the text encoders are back on the CPU afterwards."""
        with torch.no_grad(), self.encoders_here():
            rows: list[Conditioning] = []
            for start in range(0, len(prompts), ENCODE_BATCH):
                # a list of its own: some pipelines write into what they are given
                rows += self._encode(list(prompts[start : start + ENCODE_BATCH]))
        return [{name: tensor.cpu() for name, tensor in row.items()} for row in rows]

    @abstractmethod
    def _encode(self, prompts: list[str]) -> list[Conditioning]:
        """Embed a few prompts by the pipeline's own method."""

    def blank_text(self) -> Conditioning:
        """Return a conditioning without values; the sizes are those that the network's configuration names."""
        config = cast(Any, self.network).config
        width = next(config[name] for name in TEXT_WIDTHS if config.get(name))
        tokens = self.usual_tokens or self.max_tokens or int(self.pipeline.tokenizer.model_max_length)
        row = {"text": torch.empty(tokens, width, device="meta")}
        if config.get("pooled_projection_dim") is not None:
            row["pooled"] = torch.empty(config.pooled_projection_dim, device="meta")
        if self.mask_dtype is not None:
            row["mask"] = torch.empty(tokens, dtype=self.mask_dtype, device="meta")
        return row

    @contextmanager
    def encoders_here(self) -> Iterator[None]:
        """Have the text encoders where the network runs inside the block, on the CPU after it."""
        encoders = [part for name, part in self._modules().items() if name.startswith("text_encoder")]
        with taking_turns(encoders, (self.network, self.decoder), self._device):
            yield

    def encode_negative(self, prompt: str) -> Conditioning | None:
        """A negative prompt is embedded as any other is."""
        return None

    def collate(self, rows: Sequence[Conditioning], device: torch.device) -> TextBatch:
        """Stack conditionings of one shape."""
        return stack(rows, device)

    def guide(self, text_BCHW: Tensor, negative_BCHW: Tensor, scale: float) -> Tensor:
        """Combine linearly."""
        return linear_guidance(text_BCHW, negative_BCHW, scale)

    def pooled_text(self, text: TextBatch) -> Tensor:
        """Return the mean over the tokens that count, (B, D) float32."""
        if isinstance(text["text"], list):
            return torch.stack([text_LD.float().mean(0) for text_LD in text["text"]])
        text_BLD = cast(Tensor, text["text"]).float()
        if "mask" not in text:
            return text_BLD.mean(1)
        mask_BL1 = cast(Tensor, text["mask"]).float()[..., None]
        return (text_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1)

    def cut_off(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return prompt -> the end of it that is cut off, as the tokenizer writes it, for those that are too long."""
        return cut_off(self.pipeline.tokenizer, prompts, self.max_tokens)

    def predict(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        """Run the network once -> f (B, C, H, W) in the latents' dtype."""
        dtype = cast(Any, self.network).dtype
        inputs = {name: _cast(value, dtype) for name, value in text.items()}
        return self._run(x_BCHW.to(dtype), t, inputs).to(x_BCHW.dtype)

    @abstractmethod
    def _run(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        """Call the network, latents and text in its dtype -> its output as the table means it."""

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """Decode clean latents -> RGB in [0, 1], (B, 3, height, width) in the latents' dtype."""
        config = self.pipeline.vae.config
        latents = x_BCHW / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return self.to_image(
            self.pipeline.vae.decode(latents.to(self.pipeline.vae.dtype), return_dict=False)[0], x_BCHW
        )

    def told_guidance(self, text: TextBatch, x_BCHW: Tensor) -> Tensor | None:
        """Return the guidance that the network is told, (B,): the sampler's, or the family's where there is none."""
        told_B, own = text.get(EMBEDDED_GUIDANCE), self.default_embedded_guidance
        if told_B is None and own is not None:
            return torch.full((len(x_BCHW),), own, device=x_BCHW.device)
        return cast(Tensor | None, told_B)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Encode RGB in [0, 1] -> clean latents (B, C, H, W), the mode of the autoencoder's distribution."""
        config = self.pipeline.vae.config
        return (self.mode(images_B3HW) - (config.get("shift_factor") or 0.0)) * float(config.scaling_factor)

    def mode(self, images_B3HW: Tensor) -> Tensor:
        """Return the mode of the autoencoder's own latents of RGB in [0, 1], in the images' dtype."""
        pixels_B3HW = (2 * images_B3HW - 1).to(self.pipeline.vae.dtype)
        encoded = self.pipeline.vae.encode(pixels_B3HW)
        # SANA's autoencoder has no distribution
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        return cast(Tensor, latents).to(images_B3HW.dtype)

    def to_image(self, decoded_B3HW: Tensor, x_BCHW: Tensor) -> Tensor:
        """Bring a decoder's output to [0, 1]; the clamp zeroes the gradient of pixels that are out of range."""
        return (decoded_B3HW.to(x_BCHW.dtype) / 2 + 0.5).clamp(0, 1)

    def to(self, device: torch.device) -> None:
        """Move network and decoder; the text encoders follow only while they encode."""
        self._device = device
        self.network.to(device)
        self.decoder.to(device)


class FlowFamily(PipelineFamily):
    """A flow model that is sampled by Euler steps on levels that may depend on the size of the image."""

    passes_sigmas = True
    """Whether the pipeline hands its own levels, linspace(1, 1/T, T), to the scheduler."""

    def grid(self, num_steps: int, shape: tuple[int, int, int]) -> Mapping[str, Any]:
        """Return the levels and, where the scheduler shifts them by the image's size, mu."""
        shifts = self.pipeline.scheduler.config.get("use_dynamic_shifting", False)
        mu = {"mu": self.mu(num_steps, shape)} if shifts else {}
        if self.passes_sigmas:
            return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), **mu}
        return {"num_inference_steps": num_steps, **mu}

    def mu(self, num_steps: int, shape: tuple[int, int, int]) -> float:
        """Return the shift's parameter: linear in the number of image tokens of 2 x 2, as FLUX.1 has it."""
        config = self.pipeline.scheduler.config
        num_tokens = shape[1] * shape[2] // 4
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return float(config.base_shift + slope * (num_tokens - config.base_image_seq_len))


TEXT_WIDTHS = ("joint_attention_dim", "cap_feat_dim", "caption_channels", "cross_attention_dim")
"""Names under which networks keep the width of their text."""
JOINT = tuple(
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
"""Attention of networks in which text and image have streams of their own."""
TWO_STREAM_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


def own_or_ddim(scheduler: Any, *, num_steps: int, eta: float, rule: Rule, own: Sequence[str]) -> ChainTable:
    """Return the table of a scheduler whose class is among ``own``, else DDIM's on its noise schedule.

    Raises:
        ValueError: It has no such schedule, which a flow model's has not; or the rule is a flow model's.
    """
    if type(scheduler).__name__ in own or not hasattr(scheduler, "betas"):
        return read_scheduler(scheduler, num_steps=num_steps, eta=eta, rule=rule)
    only_posterior(rule, "DDIM")
    return read_ddim_table(scheduler, num_steps=num_steps, eta=eta)


def cut_off(tokenizer: Any, prompts: Sequence[str], max_tokens: int | None = None) -> dict[str, str]:
    """Return prompt -> the end of it that a tokenizer cuts off, for those that are too long."""
    num_read = (max_tokens or int(tokenizer.model_max_length)) - int(tokenizer.num_special_tokens_to_add())
    # a token is a byte or more: most prompts need not be looked at
    long = [prompt for prompt in dict.fromkeys(prompts) if len(prompt.encode()) > num_read]
    ids = tokenizer(long, add_special_tokens=False, verbose=False).input_ids if long else []
    return {
        prompt: tokenizer.decode(tokens[num_read:])
        for prompt, tokens in zip(long, ids, strict=True)
        if len(tokens) > num_read
    }


def cut_off_in_chat(tokenizer: Any, prompts: Sequence[str], max_tokens: int) -> dict[str, str]:
    """Return the same of prompts that are the user's turn of a chat, whose opening takes some of the tokens."""
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "<prompt>"}], tokenize=False)
    return cut_off_behind(chat.partition("<prompt>")[0], tokenizer, prompts, max_tokens)


def cut_off_behind(start: str, tokenizer: Any, prompts: Sequence[str], max_tokens: int) -> dict[str, str]:
    """Return the same of prompts that stand behind a text of their own, which takes some of the tokens."""
    return cut_off(tokenizer, prompts, max_tokens - len(tokenizer(start, add_special_tokens=False).input_ids))


def pack(x_BCHW: Tensor) -> Tensor:
    """Return tokens of 2 x 2 latents, (B, H/2 W/2, 4 C), the channel outermost in each."""
    B, C, H, W = x_BCHW.shape
    return x_BCHW.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, C * 4)


def unpack(tokens_BND: Tensor, height: int, width: int) -> Tensor:
    """Return the latents (B, C, H, W) of tokens of 2 x 2."""
    B, _, D = tokens_BND.shape
    return (
        tokens_BND.view(B, height // 2, width // 2, D // 4, 2, 2)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(B, D // 4, height, width)
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_cast(part, dtype) for part in value]
    return value.to(dtype) if value.is_floating_point() else value
