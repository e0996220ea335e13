"""The smallest pipelines of the true classes, random and without a download, whose weights are redrawn so that text
and guidance matter. All of them save and load again as a published one does."""

import copy
import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UMT5Config,
    UMT5EncoderModel,
)

from rltune.diffusion.families.base import FAMILIES, ModelFamily
from tests.tiny import tiny_unet
from tests.tiny_llm_families import (
    FLUX_SCHEDULE,
    flux2_dev,
    flux2_klein,
    lumina2,
    qwen_image,
    sana,
    sana_sprint,
    z_image,
)
from tests.tiny_parts import (
    autoencoder,
    clip_config,
    clip_tokenizer,
    lively,
    t5_encoder,
    t5_tokenizer,
)

SDXL_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def stable_diffusion(scheduler: Any = None) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=autoencoder(4, scale=0.18215),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        unet=tiny_unet(),
        scheduler=scheduler or DDIMScheduler(**SDXL_SCHEDULE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(scheduler: Any = None, *, force_zeros: bool = True) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 64),  # whole blocks of the 64 numbers that share a scale in nf4
        layers_per_block=1,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 32,  # six numbers of size, and the pooled text
        cross_attention_dim=64,  # both encoders side by side
        norm_num_groups=4,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(4, scale=0.13025),
        text_encoder=CLIPTextModel(clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=scheduler or EulerDiscreteScheduler(**SDXL_SCHEDULE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


def sd3(*, has_t5: bool = True) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,  # T5's width, to which CLIP's 32 + 32 are padded
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),  # as Stable Diffusion 3.5 medium has
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, scale=1.5305, shift=0.0609, has_quant=False),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(64) if has_t5 else None,
        tokenizer_3=t5_tokenizer() if has_t5 else None,
    )


def flux(scheduler: Any = None, *, is_dev: bool = True) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=is_dev,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(**(FLUX_SCHEDULE if is_dev else {"shift": 1.0})),
        vae=autoencoder(16, scale=0.3611, shift=0.1159, has_quant=False),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(32),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def chroma() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULE),
        vae=autoencoder(16, scale=0.3611, shift=0.1159, has_quant=False),
        text_encoder=t5_encoder(32),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )


def aura_flow() -> AuraFlowPipeline:
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=24**2,
    )
    encoder = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    return AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(t5_tokenizer()), **encoder)),
        vae=autoencoder(4, scale=0.13025),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "stable_diffusion": stable_diffusion,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "flux2_klein": flux2_klein,
    "flux2_dev": flux2_dev,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "chroma": chroma,
    "sana": sana,
    "sana_sprint": sana_sprint,
    "lumina2": lumina2,
    "aura_flow": aura_flow,
}

AGAIN = frozenset(("flux2_dev", "sana", "sdxl"))
"""Those whose code but for their texts is another's too: FLUX.2 klein's, SANA-Sprint's, Stable Diffusion's."""

FEW = ("stable_diffusion", "sd3", "flux")
"""A UNet, a transformer and one that packs its latents: for tests whose code is the same for each family."""

LARGE = ("flux2", "chroma", "lumina2", "sana")
"""How those begin that take a second or two for what others do in half of one."""


def shared_out(names: Iterable[str], again: Collection[str] = AGAIN) -> list[Any]:
    """Names to parametrise a test with; those that are large, or run the same code once more, are long."""
    return [
        pytest.param(name, marks=pytest.mark.long if name in again or name.startswith(LARGE) else ()) for name in names
    ]


@functools.cache
def made(make: Callable[[], Any]) -> Any:
    """A pipeline with its weights redrawn, made once in a process: not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lively(make())


def fresh(make: Callable[[], Any]) -> Any:
    """A copy of one that may be changed."""
    return copy.deepcopy(made(make))


def family_of(pipeline: Any) -> ModelFamily:
    return FAMILIES.get(type(pipeline).__name__)(pipeline)


def own_eta(model: ModelFamily) -> float:
    """What the scheduler of one of them takes: SANA-Sprint's draws every step anew."""
    return 1.0 if type(model).__name__ == "SanaSprint" else 0.0
