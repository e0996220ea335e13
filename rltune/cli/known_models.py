"""Published base models: what each needs on disk and on the card, its licence, and whether the hub asks for an account.

Parameters were counted on the architectures of the published configurations. Memory is computed and not measured.
Licences and gates are as they are commonly told: none was looked up at its owner's page, which decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownModel:
    """A model of the Hugging Face hub."""

    name: str
    pipeline: str
    """Class of diffusers."""
    denoiser_m: int
    """Parameters, in millions."""
    text_m: int
    """Those of the text encoders."""
    decoder_m: int
    card_gib: int
    """Peak of a training step of one image of 1024 px, weights in bfloat16, blocks and tiles checkpointed."""
    licence: str
    is_gated: bool

    @property
    def size_gb(self) -> float:
        """What its weights take in 16 bits; files in 32 bits are twice as large."""
        return 2 * (self.denoiser_m + self.text_m + self.decoder_m) / 1000


CLIP_L, CLIP_BIG, CLIP_H, T5, GEMMA = 123, 695, 340, 4762, 2614
KL, QWEN_KL, DC = 84, 127, 312
STABILITY = "Stability AI Community"
FLUX_NC = "FLUX Non-Commercial"
APACHE = "Apache-2.0"

KNOWN_MODELS: Sequence[KnownModel] = (
    KnownModel("stabilityai/sd-turbo", "StableDiffusionPipeline", 866, CLIP_H, KL, 9, STABILITY, is_gated=False),
    KnownModel(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "StableDiffusionXLPipeline",
        2567,
        CLIP_L + CLIP_BIG,
        KL,
        12,
        "CreativeML Open RAIL++-M",
        is_gated=False,
    ),
    KnownModel(
        "stabilityai/sdxl-turbo",
        "StableDiffusionXLPipeline",
        2567,
        CLIP_L + CLIP_BIG,
        KL,
        12,
        STABILITY,
        is_gated=False,
    ),
    KnownModel(
        "stabilityai/stable-diffusion-3.5-medium",
        "StableDiffusion3Pipeline",
        2243,
        CLIP_L + CLIP_BIG + T5,
        KL,
        12,
        STABILITY,
        is_gated=True,
    ),
    KnownModel(
        "stabilityai/stable-diffusion-3.5-large",
        "StableDiffusion3Pipeline",
        8057,
        CLIP_L + CLIP_BIG + T5,
        KL,
        23,
        STABILITY,
        is_gated=True,
    ),
    KnownModel("black-forest-labs/FLUX.1-dev", "FluxPipeline", 11901, CLIP_L + T5, KL, 30, FLUX_NC, is_gated=True),
    KnownModel("black-forest-labs/FLUX.1-schnell", "FluxPipeline", 11901, CLIP_L + T5, KL, 30, APACHE, is_gated=True),
    KnownModel("black-forest-labs/FLUX.2-dev", "Flux2Pipeline", 32223, 23340, KL, 71, FLUX_NC, is_gated=True),
    KnownModel("black-forest-labs/FLUX.2-klein-4B", "Flux2KleinPipeline", 3876, 4022, KL, 15, APACHE, is_gated=False),
    KnownModel("black-forest-labs/FLUX.2-klein-9B", "Flux2KleinPipeline", 9079, 8191, KL, 24, FLUX_NC, is_gated=True),
    KnownModel("Qwen/Qwen-Image", "QwenImagePipeline", 20430, 8292, QWEN_KL, 48, APACHE, is_gated=False),
    KnownModel("Tongyi-MAI/Z-Image-Turbo", "ZImagePipeline", 6155, 4022, KL, 19, APACHE, is_gated=False),
    KnownModel("Tongyi-MAI/Z-Image", "ZImagePipeline", 6155, 4022, KL, 22, APACHE, is_gated=False),
    KnownModel(
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        "SanaPipeline",
        1604,
        GEMMA,
        DC,
        12,
        "its own, and Gemma's",
        is_gated=False,
    ),
    KnownModel(
        "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
        "SanaSprintPipeline",
        1604,
        GEMMA,
        DC,
        12,
        "its own, and Gemma's",
        is_gated=False,
    ),
    KnownModel("lodestones/Chroma1-HD", "ChromaPipeline", 8900, T5, KL, 26, APACHE, is_gated=False),
    KnownModel("Alpha-VLLM/Lumina-Image-2.0", "Lumina2Pipeline", 2610, GEMMA, KL, 17, APACHE, is_gated=False),
    KnownModel("fal/AuraFlow-v0.3", "AuraFlowPipeline", 6859, 1224, KL, 22, APACHE, is_gated=False),
)
