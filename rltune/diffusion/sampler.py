"""A model with its sampler settings: from prompts and noise to images, in as many pieces as an estimator needs.

B: images. D: text width. C, H, W: latent channels, rows, columns.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rltune.diffusion.attention import Attended, AttentionPlan
from rltune.diffusion.chain import NO_GRADIENT, Denoiser, GradientPlan, Observer, StepNoise, run_chain
from rltune.diffusion.conditioning import TextAt, attached_mix, styled
from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import EMBEDDED_GUIDANCE, Conditioning, ModelFamily, TextBatch
from rltune.diffusion.inpaint import Blend, blend_of, given_of, told
from rltune.diffusion.mix import Mix, image_keys, mixed_denoiser
from rltune.diffusion.switches import LORA_SWITCHES, Switches
from rltune.diffusion.table import ChainTable
from rltune.diffusion.tiles import Tiling, decode_in_tiles
from rltune.errors import UserError

GuidanceGradient = Literal["both", "text", "text_rescaled"]
"""Which branches of classifier-free guidance carry gradient."""


def guided_denoiser(
    model: ModelFamily | Attended,
    rows: Sequence[Conditioning],
    negative: Conditioning,
    device: torch.device,
    *,
    guidance_scale: float,
    embedded_guidance: float | None = None,
    gradient: GuidanceGradient = "both",
    told: Sequence[Conditioning] = (),
    text_at: TextAt | None = None,
) -> Denoiser:
    """Return the network with classifier-free guidance (arXiv:2207.12598), combined as the model's family does.

    Args:
        model: The network.
        rows: What the prompt of each image tells it.
        negative: What the negative prompt does.
        device: Where the network runs.
        guidance_scale: g; at 1 the negative branch cancels, and there or below there is no guidance, as in diffusers,
            and that branch is not run.
        embedded_guidance: What the network itself is told of guidance, in both branches; None for one that is not.
        gradient: ``both`` is the derivative of the combination. ``text`` runs the negative branch without gradient,
            which leaves g df_text where it is linear; ``text_rescaled`` leaves df_text, so that the gradient's size
            does not follow g. Both are other estimators, and cheaper; the value is the same.
        told: What it is told of each image besides, with a prompt and with the negative one.
        text_at: What it is told of the prompts at a timestep, where that is not the same at all.
    """
    without: Sequence[Conditioning] = [negative] * len(rows)
    if told:
        rows, without = ([{**row, **more} for row, more in zip(part, told, strict=True)] for part in (rows, without))

    def run(x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        return model.predict(x_BCHW, t, text if text_at is None else text_at(text, t))

    collate = partial(_collated, model, device, embedded_guidance)
    text = collate(rows)
    if guidance_scale <= 1.0:
        return lambda x_BCHW, t: run(x_BCHW, t, text)
    both = collate([*without, *rows])
    negatives = collate(without) if gradient != "both" else None

    def denoise(x_BCHW: Tensor, t: Tensor) -> Tensor:
        negative_BCHW, text_BCHW = run(torch.cat([x_BCHW, x_BCHW]), t, both).chunk(2)
        return model.guide(text_BCHW, negative_BCHW, guidance_scale)

    def denoise_text(x_BCHW: Tensor, t: Tensor) -> Tensor:
        if negatives is None or not torch.is_grad_enabled():
            return denoise(x_BCHW, t)
        with torch.no_grad():
            negative_BCHW = model.predict(x_BCHW, t, negatives)
        text_BCHW = run(x_BCHW, t, text)
        if gradient == "text":
            return model.guide(text_BCHW, negative_BCHW, guidance_scale)
        if model.is_guidance_linear:  # the same as below, one rounding less
            return text_BCHW + (guidance_scale - 1) * (text_BCHW.detach() - negative_BCHW)
        guided_BCHW = model.guide(text_BCHW.detach(), negative_BCHW, guidance_scale)
        return text_BCHW + (guided_BCHW - text_BCHW.detach())

    return denoise_text


def _collated(
    model: ModelFamily | Attended,
    device: torch.device,
    embedded_guidance: float | None,
    rows: Sequence[Conditioning],
) -> TextBatch:
    batch = model.collate(rows, device)
    if embedded_guidance is None:
        return batch
    return {**batch, EMBEDDED_GUIDANCE: torch.full((len(rows),), embedded_guidance, device=device)}


def frozen_denoiser(
    denoise: Denoiser,
    network: nn.Module,
    device: torch.device,
    *,
    use_bf16: bool,
    switches: Switches | None = LORA_SWITCHES,
) -> Denoiser:
    """Return the same network for steps without gradient, as fast as it goes for the adapters' present values.

    Adapters are merged into the weights where their ``switches`` can, the same function to rounding; not where there
    are none. ``use_bf16`` runs in bfloat16 by autocast besides.
    """
    merged = None if switches is None else switches.merged(network)

    def run(x_BCHW: Tensor, t: Tensor) -> Tensor:
        swapped: AbstractContextManager[None] = nullcontext() if merged is None else merged.swapped_in()
        with swapped, in_bf16(device, enabled=use_bf16):
            return denoise(x_BCHW, t).to(x_BCHW.dtype)

    return run


def in_bf16(device: torch.device, *, enabled: bool) -> AbstractContextManager[Any]:
    """Return the context in which networks run in bfloat16, if ``enabled``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@dataclass(frozen=True)
class Sampler:
    """A model with its sampler settings."""

    model: ModelFamily
    embeddings: PromptEmbeddings
    table: ChainTable
    guidance_scale: float
    negative_prompt: str = ""
    embedded_guidance: float | None = None
    """What the network is told of guidance, where it is told any."""
    num_base_steps: int = 0
    """First steps that the base model takes, adapters off: combined generation."""
    guidance_gradient: GuidanceGradient = "both"
    num_kept: int = 0
    """Active steps that keep their activations instead of being computed again in the backward pass."""
    is_decoder_kept: bool = False
    """Whether the image decoder keeps its activations."""
    tiling: Tiling | None = None
    """Tiles in which images are decoded where gradient flows; without gradient they are decoded whole."""
    is_decoded_singly: bool = False
    """Whether images without gradient are decoded one at a time, since few of them fit into memory."""
    use_bf16_prefix: bool = False
    """Run the steps without gradient in bfloat16: faster on hardware that has it, a trajectory that differs by it."""
    size_px: tuple[int, int] | None = None
    """Height and width of the images; needed where prompts come with pictures."""
    switches: Switches = LORA_SWITCHES
    """How what is trained on the model is turned off, and merged."""
    mix: Mix | None = None
    """How several adapters share the steps, for chains without gradient; None runs those that are active."""
    attention: AttentionPlan | None = None
    """What becomes of the network's cross-attention; None leaves it alone."""

    @property
    def num_steps(self) -> int:
        """Steps that adapters have a part in: what an estimator chooses from."""
        return self.table.num_steps - self.num_base_steps

    def open(
        self,
        prompts: Sequence[str],
        x_BCHW: Tensor,
        noise: StepNoise | None,
        strengths_BM: Tensor | None = None,
    ) -> "Chain":
        """Return the chain of a batch as it stands after the base model's steps; ``x_BCHW`` is x_T.

        Where prompts come with pictures (``Canvas``), their given parts are kept to. ``strengths_BM`` are every image's
        own strengths of what is trained, where it is a basis.

        Raises:
            UserError: The picture of a prompt is gone, or is not what it was; or adapters share the steps of a chain
                whose attention is regulated.
        """
        mix = attached_mix(self.model.network)
        others = () if mix is None else self.embeddings.rows([styled(mix.template, prompt) for prompt in prompts])
        rows = others if mix is not None and mix.is_whole and not mix.is_off else self.embeddings.rows(prompts)
        given = given_of(prompts, self.size_px, x_BCHW.device)
        known = None if given is None else told(self.model, given)
        blend = None if given is None or known else blend_of(self.model, given, x_BCHW, self.table)
        keys = () if self.mix is None else tuple(image_keys(x_BCHW))
        x_BCHW = x_BCHW * self.table.init_scale
        attended = self._attended()
        denoise = guided_denoiser(
            self.model if attended is None else attended,
            rows if attended is None else attended.rows(rows, prompts),
            self.embeddings.negative(self.negative_prompt),
            x_BCHW.device,
            guidance_scale=self.guidance_scale,
            embedded_guidance=self.embedded_guidance,
            gradient=self.guidance_gradient,
            told=known or (),
            text_at=None if mix is None or mix.is_whole else mix.over(self.model, rows, others, x_BCHW.device),
        )
        denoise = self.switches.bound(denoise, strengths_BM)
        chain = Chain(self, denoise, self.table, x_BCHW, noise, rows, blend, keys, strengths_BM, attended)
        if self.num_base_steps == 0:
            return chain
        off, in_half = self.switches.off(self.model.network), in_bf16(x_BCHW.device, enabled=self.use_bf16_prefix)
        with torch.no_grad(), off, in_half:
            head = self.table.part(0, self.num_base_steps)
            x_BCHW = run_chain(lambda x, t: denoise(x, t).to(x.dtype), x_BCHW, head, noise=noise, blend=blend)
        return chain.starting(self.num_base_steps, x_BCHW)

    def _attended(self) -> Attended | None:
        if self.attention is None or (self.mix is not None and self.attention.num_steps == 0):
            return None
        if self.mix is not None:
            raise UserError(
                "sampler.attention: the edit is one for all adapters of a step, got several that share it; mix their "
                "weights, or sample without"
            )
        return Attended(self.model, self.attention, self.table.timesteps_T)

    def latents(self, prompts: Sequence[str], x_BCHW: Tensor, *, plan: GradientPlan, noise: StepNoise | None) -> Tensor:
        """Run the whole chain from x_T -> x_0 (B, C, H, W), differentiable as ``plan`` says of the adapters' steps."""
        return self.open(prompts, x_BCHW, noise).run(plan)

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """Decode x_0 -> RGB in [0, 1] (B, 3, height, width)."""
        if not x_BCHW.requires_grad:
            parts = x_BCHW.split(1) if self.is_decoded_singly else [x_BCHW]
            return (
                torch.cat([self.model.decode(part) for part in parts]) if len(parts) > 1 else self.model.decode(x_BCHW)
            )
        if self.tiling is not None:
            return decode_in_tiles(self.model.decode, x_BCHW, self.tiling, is_kept=self.is_decoder_kept)
        if self.is_decoder_kept:
            return self.model.decode(x_BCHW)
        # nothing but x_0 is stored for the backward pass
        decoded: Tensor = checkpoint(self.model.decode, x_BCHW, use_reentrant=False, preserve_rng_state=False)
        return decoded


@dataclass(frozen=True)
class Chain:
    """A sampler on one batch: the steps that are left, and where they start."""

    sampler: Sampler
    denoise: Denoiser
    table: ChainTable
    x_BCHW: Tensor
    noise: StepNoise | None
    rows: Sequence[Conditioning]
    """What each image's prompt tells the network."""
    blend: Blend | None = None
    """The part of the latents that is given."""
    keys: tuple[bytes, ...] = ()
    """Of the images, where adapters share the steps."""
    strengths_BM: Tensor | None = None
    """Every image's own of what is trained."""
    attended: Attended | None = None
    """The model as it attends to words."""

    @property
    def drawn_B1HW(self) -> Tensor | None:
        """1 where latents are drawn, 0 where they are given; None where all are drawn."""
        return None if self.blend is None else self.blend.mask_B1HW

    @cached_property
    def text_BD(self) -> Tensor:
        """One vector an image that stands for its prompt, float32."""
        model = self.sampler.model
        return model.pooled_text(model.collate(self.rows, self.x_BCHW.device))

    def starting(self, step: int, x_BCHW: Tensor) -> "Chain":
        """Return the chain of steps ``step`` and later, numbered from 0 again, from the latent ``x_BCHW``."""
        noise = self.noise
        later = None if noise is None else (lambda k: noise(k + step))
        table = self.table.part(step, self.table.num_steps)
        blend = None if self.blend is None else self.blend.starting(step)
        return replace(self, table=table, x_BCHW=x_BCHW, noise=later, blend=blend)

    def run(self, plan: GradientPlan = NO_GRADIENT, *, observe: Observer | None = None) -> Tensor:
        """Run the steps that are left, differentiable as ``plan`` says; see ``run_chain``."""
        sampler, frozen = self.sampler, None
        if sampler.mix is not None:
            with in_bf16(self.x_BCHW.device, enabled=sampler.use_bf16_prefix):
                frozen = mixed_denoiser(self.denoise, sampler.model.network, sampler.mix, self.keys)
                return run_chain(frozen, self.x_BCHW, self.table, noise=self.noise, observe=observe, blend=self.blend)
        if len(plan.active) < self.table.num_steps or not torch.is_grad_enabled():  # merged weights are a second copy
            frozen = frozen_denoiser(
                self.denoise,
                sampler.model.network,
                self.x_BCHW.device,
                use_bf16=sampler.use_bf16_prefix,
                switches=sampler.switches if self.strengths_BM is None else None,
            )
        return run_chain(
            self.denoise,
            self.x_BCHW,
            self.table,
            plan=plan,
            noise=self.noise,
            num_kept=sampler.num_kept,
            denoise_frozen=frozen,
            observe=observe,
            blend=self.blend,
        )

    def clean(self, step: int, x_BCHW: Tensor, f_BCHW: Tensor) -> Tensor:
        """Return the clean prediction x0_hat of a step, with what is given in it."""
        clean_BCHW = float(self.table.d_T[step]) * x_BCHW + float(self.table.e_T[step]) * f_BCHW
        return clean_BCHW if self.blend is None else self.blend.clean(clean_BCHW)

    def predict(self, step: int, x_BCHW: Tensor) -> Tensor:
        """Run the network once at a step -> its guided output (B, C, H, W), differentiable."""
        return self.denoise(x_BCHW, self.table.timesteps_T[step].to(x_BCHW.device))

    def predict_base(self, step: int, x_BCHW: Tensor) -> Tensor:
        """Run the base model once at a step, adapters off and without gradient -> (B, C, H, W)."""
        with torch.no_grad(), self.sampler.switches.off(self.sampler.model.network):
            return self.predict(step, x_BCHW)
