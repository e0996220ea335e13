"""What a model will need of memory, counted on its networks without values: nothing is loaded and nothing computed.

B: images. C, H, W: latent channels, rows, columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import adapted_weights, add_lora, lora_parameters, remove_lora
from rltune.diffusion.memory import Stored, measure_call
from rltune.diffusion.quantise import Kind, weight_bytes
from rltune.diffusion.sampler import GuidanceGradient, guided_denoiser
from rltune.diffusion.tiles import Tiling

META = torch.device("meta")


@dataclass(frozen=True)
class Counts:
    """What a model and one micro-batch come to, in bytes where nothing else is said."""

    network: int
    """Its weights."""
    num_parameters: int
    """Of the network."""
    decoder: int
    """The image decoder's weights, its encoder's among them."""
    num_adapted: int
    """Parameters of the adapters, in float32."""
    merged: int
    """A second copy of the adapted layers, for steps without gradient; none below float32."""
    unpacked: int
    """The largest of quantised weights, unpacked for a call."""
    step: Stored
    """One call of the network with guidance, as an estimator differentiates it."""
    decoding: Stored
    """Decoding a micro-batch, or one tile of it."""
    whole_image: Stored
    """Decoding one image whole, as evaluation does."""


def count(
    model: ModelFamily,
    *,
    shape: tuple[int, int, int],
    batch: int,
    dtype: torch.dtype,
    decoder_dtype: torch.dtype | None = None,
    rank: int,
    targets: Any,
    guidance_scale: float,
    guidance_gradient: GuidanceGradient = "both",
    tiling: Tiling | None = None,
    quantised: Kind | None = None,
) -> Counts:
    """Return what a model comes to; its networks have no values, and no adapters before and after.

    Attention is counted as kernels do it that never hold a matrix of tokens by tokens.

    Args:
        model: As ``load_outline`` returns it. Its networks are in these number formats afterwards.
        shape: Of latents (C, H, W).
        batch: Images that are differentiated at a time.
        dtype: Of the frozen weights.
        decoder_dtype: Of the image decoder's; left out, the same.
        rank: Of the adapters.
        targets: Where adapters go: ``attention``, ``all``, or layers' names.
        guidance_scale: Above 1 the network runs on two rows an image.
        guidance_gradient: Which of them carry gradient.
        tiling: Tiles that are decoded one by one.
        quantised: How the network's weights are rounded.
    """
    # a diffusers model's own method warns of layers that are kept in float32, of which there are none here
    network = nn.Module.to(model.network, dtype=dtype)
    decoder = nn.Module.to(model.decoder, dtype=decoder_dtype or dtype)
    size, unpacked = weight_bytes(network, quantised)
    is_merged = dtype == torch.float32 and quantised is None
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    add_lora(network, rank=rank, alpha=rank, targets=model.lora_layers(targets), seed=0)
    try:
        step, decoding, whole_image = _calls(
            model, torch.empty(batch, *shape, device=META), guidance_scale, guidance_gradient, tiling
        )
        return Counts(
            network=size,
            num_parameters=num_parameters,
            decoder=weight_bytes(decoder)[0],
            num_adapted=sum(parameter.numel() for parameter in lora_parameters(network)),
            merged=sum(weight.nbytes for weight in adapted_weights(network)) if is_merged else 0,
            unpacked=unpacked,
            step=step,
            decoding=decoding,
            whole_image=whole_image,
        )
    finally:
        remove_lora(network)


def _calls(
    model: ModelFamily, x_BCHW: Tensor, scale: float, gradient: GuidanceGradient, tiling: Tiling | None
) -> tuple[Stored, Stored, Stored]:
    """Return what is stored of one step, of decoding, in tiles or not, and of decoding one image whole."""
    row, t = model.blank_text(), torch.empty((), device=META)
    denoise = guided_denoiser(model, [row] * len(x_BCHW), row, META, guidance_scale=scale, gradient=gradient)
    x_BCHW = x_BCHW.requires_grad_()
    tile_BCHW = x_BCHW if tiling is None else _tile(x_BCHW, tiling)
    with fused_attention():
        step = measure_call(lambda: denoise(x_BCHW, t), model.network)
        decoding = measure_call(lambda: model.decode(tile_BCHW), model.decoder)
        whole_image = measure_call(lambda: model.decode(x_BCHW[:1]), model.decoder)
    return step, decoding, whole_image


def _tile(x_BCHW: Tensor, tiling: Tiling) -> Tensor:
    (top, bottom), (left, right) = (tiling.spans(side)[0] for side in x_BCHW.shape[2:])
    return torch.empty(*x_BCHW.shape[:2], bottom - top, right - left, device=META, requires_grad=True)


class _Fused(torch.autograd.Function):
    """Attention as fused kernels store it: query, key, value, result, and one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # laid out as the query is, so that heads are put together again without a copy
        is_alike = query.shape[-1] == value.shape[-1]
        result = torch.empty_like(query) if is_alike else query.new_empty(*query.shape[:-1], value.shape[-1])
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, rows)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _FusedAttention(TorchFunctionMode):
    def __init__(self, products: list[int] | None) -> None:
        super().__init__()
        self._products = products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, value = (named[name] for name in ("query", "key", "value"))
        if query.device != META:
            return func(*args, **kwargs)
        if kwargs.get("enable_gqa") and key.shape[-3] != query.shape[-3]:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        if self._products is not None:
            self._products.append(2 * query.numel() * (key.shape[-2] + value.shape[-2]))
        return _Fused.apply(query, key, value)


@contextmanager
def fused_attention(products: list[int] | None = None) -> Iterator[None]:
    """Let attention on the device ``meta`` be that of a fused kernel inside the block; there it would be spelt out.

    Args:
        products: Takes the floating-point operations of each.
    """
    with _FusedAttention(products):
        yield
