"""Several LoRAs as one, by their weights: sums of updates, their best approximation of a rank, and blends of factors.

R: rank.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from rltune.diffusion.lora_start import Factors
from rltune.errors import UserError

Layers = Mapping[str, Factors]
"""Layer -> what a LoRA adds to it. A LoRA leaves the layers that are not there as they are; the base model has none."""


def interpolated(loras: Sequence[Layers], weights: Sequence[float]) -> dict[str, Factors]:
    """Return one LoRA whose update is sum_i w_i B_i A_i, exactly: the factors side by side, the weights in B.

    Ranks and layers may differ, and weights may be negative. The rank of the result is the sum of theirs in the layer
    that has most; other layers are filled up with zeros, so that it has a single rank.

    Raises:
        UserError: One is a DoRA, whose effect is no sum.
    """
    _check_plain(loras)
    used = [(layers, weight) for layers, weight in zip(loras, weights, strict=True) if weight != 0]
    summed = {}
    for name in dict.fromkeys(name for layers, _ in used for name in layers):
        parts = [(layers[name], weight) for layers, weight in used if name in layers]
        a, b = torch.cat([part.a for part, _ in parts]), torch.cat([part.b * weight for part, weight in parts], dim=1)
        summed[name] = Factors(a, b, None)
    return _of_one_rank(summed)


def factors_blended(loras: Sequence[Layers], weights: Sequence[float]) -> dict[str, Factors]:
    """Return the LoRA of the factors' weighted sums, (sum_i w_i B_i)(sum_i w_i A_i), as AlignProp mixes its LoRAs.

    AlignProp (arXiv:2310.03739) interpolates the trained parameters. Of their product every pair B_i A_j is a part, so
    halfway between two it holds a quarter of each update, and half of what the two have no business with each other.

    Raises:
        UserError: Ranks or layers differ, or one is a DoRA.
    """
    _check_plain(loras)
    kinds = {frozenset((name, each.a.shape) for name, each in layers.items()) for layers in loras}
    if len(kinds) > 1:
        raise UserError("a blend of factors needs LoRAs of the same rank and layers; take the method exact")
    blended = {}
    for name in loras[0]:
        a, b = (
            torch.stack([weight * getattr(layers[name], factor) for layers, weight in zip(loras, weights, strict=True)])
            for factor in "ab"
        )
        blended[name] = Factors(a.sum(dim=0), b.sum(dim=0), None)
    return blended


def reduced(layers: Layers, rank: int) -> tuple[dict[str, Factors], float]:
    """Return the nearest LoRA of a rank, layer by layer, and how far it is: ||U - U_R|| / ||U|| over all layers.

    Truncated singular value decomposition of B A (Eckart-Young), by the QR factors of B and A^T, so that no matrix of
    the layer's own size is made.
    """
    found, lost, whole = {}, 0.0, 0.0
    for name, each in layers.items():
        q_b, r_b = torch.linalg.qr(each.b.flatten(1).double())
        q_a, r_a = torch.linalg.qr(each.a.flatten(1).double().T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        lost, whole = lost + float(s[rank:].square().sum()), whole + float(s.square().sum())
        a = (q_a @ v[:rank].T).T.float().reshape(-1, *each.a.shape[1:])
        b = (q_b @ (u[:, :rank] * s[:rank])).float()
        found[name] = Factors(a, b.reshape(*b.shape, *each.b.shape[2:]), None)
    return _of_one_rank(found), (lost / whole) ** 0.5 if whole else 0.0


def attach(network: nn.Module, layers: Layers, name: str) -> None:
    """Attach a LoRA of a single rank at strength 1, in float32, beside adapters of other names.

    Layers whose names end as one of these get an adapter that changes nothing: peft takes them by their endings.

    Raises:
        UserError: It is a DoRA.
    """
    _check_plain([layers])
    rank = next(iter(layers.values())).rank
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
    whole: Any = network
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of another adapter beside it
        whole.add_adapter(config, adapter_name=name)
    for layer_name, module in network.named_modules():
        if name not in getattr(module, "lora_A", {}):
            continue
        layer: Any = module
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        each = layers.get(layer_name)
        a.data = torch.zeros_like(a, dtype=torch.float32) if each is None else each.a.to(a.device).clone()
        b.data = torch.zeros_like(b, dtype=torch.float32) if each is None else each.b.to(b.device).clone()


def _of_one_rank(layers: Layers) -> dict[str, Factors]:
    """Fill factors up with zeros to the greatest rank of a layer."""
    rank = max((each.rank for each in layers.values()), default=0)
    return {name: Factors(_filled(each.a, rank, 0), _filled(each.b, rank, 1), None) for name, each in layers.items()}


def _filled(factor: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim).contiguous()


def _check_plain(loras: Sequence[Layers]) -> None:
    if any(each.magnitude is not None for layers in loras for each in layers.values()):
        raise UserError("a DoRA is among them, whose effect is no sum of updates; soups are of plain LoRAs")
