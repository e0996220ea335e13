"""What is counted on networks without values, against what autograd stores where there are some."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from rltune.diffusion.families.base import FAMILIES, ModelFamily
from rltune.diffusion.forecast import count
from rltune.diffusion.lora import add_lora, lora_parameters
from rltune.diffusion.memory import measure_call, stored_bytes
from rltune.diffusion.sampler import guided_denoiser
from rltune.diffusion.tiles import Tiling
from tests.tiny_families import PIPELINES, autoencoder, shared_out

CPU = torch.device("cpu")
B = 2


def family_of(pipeline: Any) -> ModelFamily:
    return FAMILIES.get(type(pipeline).__name__)(pipeline)


def outline_of(make: Callable[[], Any]) -> ModelFamily:
    """As ``load_outline`` gives it."""
    model = family_of(make())
    model.to(torch.device("meta"))
    return model


def mid_size() -> StableDiffusionXLPipeline:
    """With what makes SDXL's network deep."""
    unet = UNet2DConditionModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=2,
        transformer_layers_per_block=(1, 3),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 32,
        cross_attention_dim=128,
    )
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    vae, scheduler = autoencoder(4, scale=0.13025), EulerDiscreteScheduler()
    return StableDiffusionXLPipeline(vae=vae, unet=unet, scheduler=scheduler, **parts, add_watermarker=False)


@pytest.mark.long
@pytest.mark.parametrize("name", [*shared_out(PIPELINES), "mid-size"])
def test_a_count_is_within_5_percent_of_what_autograd_stores(name: str) -> None:
    make = PIPELINES.get(name, mid_size)
    torch.manual_seed(0)
    model, outline = family_of(make()), outline_of(make)
    shape = model.latent_shape(32, 32)
    tiling = Tiling(tile=shape[1] // 2, overlap=1)
    found = count(
        outline,
        shape=shape,
        batch=B,
        dtype=torch.float32,
        rank=4,
        targets="attention",
        guidance_scale=2.0,
        tiling=tiling,
    )
    add_lora(model.network, rank=4, alpha=4, targets=model.lora_layers("attention"), seed=0)
    blanks = model.blank_text()
    row = {part: torch.randn(blank.shape) for part, blank in blanks.items() if part != "mask"}
    row |= {part: torch.ones_like(blank, device=CPU) for part, blank in blanks.items() if part == "mask"}
    denoise = guided_denoiser(model, [row] * B, row, CPU, guidance_scale=2.0)
    x_BCHW = torch.randn(B, *shape).requires_grad_()

    def call() -> Tensor:
        return denoise(x_BCHW, torch.tensor(500.0))

    measured = measure_call(call, model.network)
    assert found.step.outside == pytest.approx(measured.outside, rel=0.05)
    if name != "chroma":  # attention with a mask of numbers stores tokens by tokens on a CPU
        assert found.step.plain == pytest.approx(stored_bytes(call, model.network), rel=0.05)
        assert found.step.largest == pytest.approx(measured.largest, rel=0.05)
        assert found.step.tensor == measured.tensor
    whole = stored_bytes(lambda: model.decode(x_BCHW[:1]), model.decoder)
    assert found.whole_image.plain == pytest.approx(whole, rel=0.05)
    length = tiling.spans(shape[1])[0][1]
    tile = stored_bytes(lambda: model.decode(x_BCHW[:, :, :length, :length]), model.decoder)
    assert found.decoding.plain == pytest.approx(tile, rel=0.05)
    parameters = [p for p in model.network.parameters() if not p.requires_grad]
    assert found.network == sum(tensor.nbytes for tensor in (*parameters, *model.network.buffers()))
    assert found.num_parameters == sum(p.numel() for p in parameters)
    assert found.num_adapted == sum(p.numel() for p in lora_parameters(model.network))
    assert not lora_parameters(outline.network)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_text_without_values_is_of_the_kind_that_the_encoder_gives(name: str) -> None:
    model = family_of(PIPELINES[name]())
    (row,), blank = model.encode_prompts(["two red birds"]), model.blank_text()
    assert row.keys() == blank.keys()
    for part, tensor in row.items():
        assert (tensor.dim(), tensor.shape[-1]) == (blank[part].dim(), blank[part].shape[-1])
        assert tensor.is_floating_point() == blank[part].is_floating_point()
        assert blank[part].device.type == "meta"


@pytest.mark.slow
def test_weights_of_half_the_size_and_half_the_branches() -> None:
    outline = outline_of(PIPELINES["flux"])
    shape = outline.latent_shape(32, 32)
    settings: dict[str, Any] = {"shape": shape, "batch": 2, "rank": 4, "targets": "attention"}
    whole = count(outline, dtype=torch.float32, guidance_scale=2.0, **settings)
    half = count(outline, dtype=torch.bfloat16, guidance_scale=1.0, **settings)
    assert half.network == pytest.approx(whole.network / 2, rel=0.01)
    assert (whole.merged > 0, half.merged) == (True, 0)  # adapters are not merged below float32
    assert half.step.plain < 0.5 * whole.step.plain
    assert half.num_adapted == whole.num_adapted
    text = count(outline, dtype=torch.float32, guidance_scale=2.0, guidance_gradient="text", **settings)
    assert text.step.plain == pytest.approx(whole.step.plain / 2, rel=0.1)


def test_of_blocks_that_are_alike_one_runs_where_there_are_no_values() -> None:
    outline, calls = outline_of(PIPELINES["flux2_klein"]), []
    blocks = outline.network.single_transformer_blocks
    for block in blocks:  # type: ignore[union-attr]
        block.norm.register_forward_hook(lambda *_: calls.append(1))
    shape = outline.latent_shape(32, 32)
    count(outline, shape=shape, batch=1, dtype=torch.float32, rank=4, targets="attention", guidance_scale=1.0)
    assert (len(blocks), len(calls)) == (2, 1)  # type: ignore[arg-type]
