"""The networks of the built-in model, at the sizes that are shipped.

Everything is a stock class of diffusers, transformers or open_clip, so that the result loads without our code.
"""

from itertools import pairwise

import open_clip
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from rltune.builtin.scenes import SIZE_PX
from rltune.builtin.tokenizer import CONTEXT_LENGTH

LATENT_CHANNELS = 16
LATENT_SIZE = SIZE_PX // 8
TEXT_WIDTH = 128
EMBED_DIM = 128


def make_autoencoder(channels: tuple[int, ...], *, latent_channels: int) -> AutoencoderKL:
    """A KL autoencoder that shrinks by ``2 ** (len(channels) - 1)``; one residual block a level, no attention."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=SIZE_PX,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def make_f4_autoencoder() -> AutoencoderKL:
    """64x64x3 -> 16x16x4; .65 M parameters. Trains from scratch in minutes and warm-starts the 8x one."""
    return make_autoencoder((16, 32, 64), latent_channels=4)


def make_f8_autoencoder() -> AutoencoderKL:
    """64x64x3 -> 8x8x16; 1.68 M parameters. The one that is shipped."""
    return make_autoencoder((16, 32, 64, 96), latent_channels=LATENT_CHANNELS)


def make_text_encoder(vocab_size: int) -> CLIPTextModel:
    """The denoiser's text encoder: three layers, 128 wide; start and end token are the last two ids."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            hidden_act="quick_gelu",
            projection_dim=TEXT_WIDTH,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )


def make_unet(channels: tuple[int, ...] = (96,)) -> UNet2DConditionModel:
    """The denoiser: one level of 96 channels with cross-attention on the 8x8x16 latents, 2.28 M parameters.

    A second, smaller level bought nothing: at equal time this net had the lower loss and the better counts.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the NUMBER of heads in this class, in spite of its name
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Velocity prediction on a schedule that ends in noise.

    With Stable Diffusion's own schedule a tenth of the signal survives at the last step, and the net reads the ground
    colour from the noise and not from the prompt. With epsilon prediction this schedule gives no gradient there.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def image_text_config(vocab_size: int) -> dict[str, object]:
    """The ``model_cfg`` of an open_clip folder. The tokenizer's name is never looked up, but must not be empty."""
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {"image_size": SIZE_PX, "layers": [1, 1, 1, 1], "width": 20},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": 96,
            "heads": 4,
            "layers": 3,
            "hf_tokenizer_name": "local",
        },
    }


def make_image_text(vocab_size: int) -> open_clip.CLIP:
    """The image-text model: a four-block ResNet and a three-layer text tower, 2.5 M parameters."""
    return open_clip.CLIP(**image_text_config(vocab_size))


class AestheticHead(nn.Module):
    """Image embedding -> aesthetic score: ``offset + scale * mlp(embedding)``, Linear and SiLU in turn."""

    def __init__(self, in_dim: int, hidden: tuple[int, ...], *, offset: float, scale: float) -> None:
        super().__init__()
        self.in_dim, self.hidden, self.offset, self.scale = in_dim, hidden, offset, scale
        widths = (in_dim, *hidden, 1)
        layers: list[nn.Module] = []
        for number, (wide, narrow) in enumerate(pairwise(widths)):
            layers += [nn.SiLU()] * (number > 0) + [nn.Linear(wide, narrow)]
        self.layers = nn.Sequential(*layers)

    def forward(self, embedding_BD: Tensor) -> Tensor:
        """Score ``(B,)`` on the scale of the label, from L2-normalised embeddings."""
        score_B: Tensor = self.layers(embedding_BD)[:, 0]
        return self.offset + self.scale * score_B
