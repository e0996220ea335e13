"""A frozen network in fewer bits, for memory: gradients pass through its rounded weights to the adapters.

The kinds are those that have a gradient. Rounding activations too (torchao's int8 dynamic) gives the adapters none.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rltune.diffusion.blocks import blocks_of
from rltune.errors import UserError

Kind = Literal["nf4", "int8"]
LIBRARIES: dict[str, str] = {"nf4": "bitsandbytes", "int8": "torchao"}
"""Kind -> the library that has it; both are of the extra ``quantise``."""
NF4_BLOCK = 64
NF4_BYTES = 0.5 + 1 / NF4_BLOCK + 4 / (NF4_BLOCK * 256)
"""A weight's: 4 bits, 8 for the scale of 64 of them, 32 for that of 256 scales (QLoRA, arXiv:2305.14314, section 3)."""


def check_quantiser(kind: str) -> None:
    """Check that the library of a kind is installed; imports nothing.

    Raises:
        UserError: It is not.
    """
    if find_spec(LIBRARIES[kind]) is None:
        raise UserError(
            f"model.quantise: {kind} needs {LIBRARIES[kind]}, which is not installed; run "
            "'pip install \"rltune[quantise]\"', or write none"
        )


def check_layers(network: nn.Module, kind: Kind) -> None:
    """Check that a network, perhaps without values, has layers that a kind rounds.

    Raises:
        UserError: It has none.
    """
    if not quantised_layers(network, kind):
        rows = f", with rows of whole blocks of {NF4_BLOCK} numbers" if kind == "nf4" else ""
        raise UserError(f"model.quantise: {kind} rounds linear layers{rows}, and the network has none; write none")


def quantise(network: nn.Module, kind: Kind) -> None:
    """Round the weights of the linear layers in a frozen network's blocks; in place, before adapters.

    Convolutions, norms and what lies outside of blocks stay as they are; so do layers whose rows ``nf4`` cannot take.

    Args:
        network: A diffusers model.
        kind: ``nf4``, 4-bit normal floats by bitsandbytes, or ``int8``, weight-only by torchao with a scale a row.

    Raises:
        UserError: The library is not installed, or there is nothing to round.
    """
    check_quantiser(kind)
    check_layers(network, kind)
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        chosen = {id(layer) for _, _, layer in quantised_layers(network, kind)}
        quantize_(network, Int8WeightOnlyConfig(), filter_fn=lambda module, _: id(module) in chosen)
        network.requires_grad_(False)
        return
    four_bit = _four_bit()
    for parent, name, layer in quantised_layers(network, kind):
        setattr(parent, name, four_bit(layer))


def _four_bit() -> Callable[[nn.Linear], nn.Module]:
    from bitsandbytes.nn import Linear4bit, Params4bit

    def convert(layer: nn.Linear) -> nn.Module:
        new = Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, layer.weight.dtype, device="meta"
        )
        new.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=new)
        new.bias = layer.bias
        # else a call without gradient on some CPUs repacks the weights, and a later one with gradient reads them so
        new.support_avx512bf16_for_cpu = False
        packed: nn.Module = new.to(layer.weight.device).requires_grad_(False)
        return packed

    return convert


def quantised_layers(network: nn.Module, kind: Kind) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Return what ``quantise`` takes: each layer with the module it is in, and its name there.

    ``nf4`` leaves layers whose rows end within a block of numbers that share a scale: on a CPU with AVX-512
    bitsandbytes 0.50.2 unpacks them with the scales of other blocks. Published models have next to none.
    """
    found = {}
    for block in blocks_of(network) or [network]:
        for parent in block.modules():
            for name, layer in parent.named_children():
                if type(layer) is nn.Linear and not (kind == "nf4" and layer.in_features % NF4_BLOCK):
                    found[id(layer)] = (parent, name, layer)
    return list(found.values())


def weight_bytes(network: nn.Module, kind: Kind | None = None) -> tuple[int, int]:
    """Return what weights come to, quantised or not, and the largest that a call has to unpack, 0 if none; in bytes.

    Args:
        network: With its weights as they are, on any device, ``meta`` too.
        kind: As ``quantise`` takes it; None where they stay as they are.
    """
    size = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    weights = [] if kind is None else [layer.weight for _, _, layer in quantised_layers(network, kind)]
    for weight in weights:
        packed = NF4_BYTES * weight.numel() if kind == "nf4" else weight.numel() + weight.itemsize * weight.shape[0]
        size += int(packed) - weight.nbytes
    return size, max((weight.nbytes for weight in weights), default=0)


def is_quantised(layer: Any) -> bool:
    """Return whether a layer's weights are not plain numbers."""
    return type(layer.weight.data) is not Tensor or not layer.weight.is_floating_point()


def precision_of(layer: Any) -> torch.dtype:
    """Return the number format that a layer computes in, which is not that of packed weights."""
    dtype: torch.dtype = getattr(layer, "compute_dtype", None) or layer.weight.dtype
    return dtype
