"""Tiny pipelines whose prompts go through a language model; ``tiny_families.py`` has the others, and says more."""

from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests.tiny_parts import (
    autoencoder,
    gemma2,
    gemma_tokenizer,
    mistral_tokenizer,
    qwen3_config,
    qwen_tokenizer,
)

FLUX_SCHEDULE: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True}
SANA_SCHEDULE: dict[str, Any] = {"flow_shift": 3.0, "prediction_type": "flow_prediction", "use_flow_sigmas": True}


def flux2_parts(*, has_guidance: bool) -> dict[str, Any]:
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,  # three layers of the language model
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=has_guidance,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    return {"transformer": transformer, "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULE)}


def flux2_klein(*, is_distilled: bool = False) -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        text_encoder=Qwen3ForCausalLM(qwen3_config(28)),  # layers 9, 18 and 27 are read
        tokenizer=qwen_tokenizer(),
        is_distilled=is_distilled,
        **flux2_parts(has_guidance=False),
    )


def flux2_dev() -> Flux2Pipeline:
    text = {
        "model_type": "mistral",
        "vocab_size": len(mistral_tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 31,  # layers 10, 20 and 30 are read
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "head_dim": 8,
    }
    return Flux2Pipeline(
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)),
        tokenizer=mistral_tokenizer(),
        **flux2_parts(has_guidance=True),
    )


def qwen_image() -> QwenImagePipeline:
    text = {
        "vocab_size": len(qwen_tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    shift = {"shift": 1.0, "use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192}
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shift, shift_terminal=0.02, time_shift_type="exponential"),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=16, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, scale=0.3611, shift=0.1159, has_quant=False),
        text_encoder=Qwen3Model(qwen3_config()),
        tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )


def lumina2() -> Lumina2Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(16, scale=0.3611, shift=0.1159, has_quant=False, blocks=4),  # the pipeline reckons with 8
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )


def sana_parts(**more: Any) -> dict[str, Any]:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=16,
        patch_size=1,
        **more,
    )
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8),
            "qkv_multiscales": ((), (5,)),
            "layers_per_block": (1, 1),
        }.items()
    }
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
        **sides,
    )
    return {"transformer": transformer, "vae": vae, "text_encoder": gemma2(), "tokenizer": gemma_tokenizer()}


def sana(*, order: int = 1) -> SanaPipeline:
    """With the first order of the solver, which rltune takes; published ones ship the second."""
    return SanaPipeline(scheduler=DPMSolverMultistepScheduler(**SANA_SCHEDULE, solver_order=order), **sana_parts())


def sana_sprint() -> SanaSprintPipeline:
    return SanaSprintPipeline(
        scheduler=SCMScheduler(), **sana_parts(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    )
