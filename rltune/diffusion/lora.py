"""LoRA adapters by peft: attach, read, write, switch off, fold."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from rltune.diffusion.quantise import is_quantised, precision_of
from rltune.registry import suggest

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""AlignProp's and TRL's choice."""
ALL_LAYERS = (*ATTENTION, "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "ff.net.0.proj", "ff.net.2")
ADAPTER = "default"
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
"""Layers that peft has adapters for, of those that image networks are made of."""


def target_modules(targets: str | Sequence[str]) -> list[str]:
    """Return module name endings for ``attention``, ``all`` or an explicit list."""
    if isinstance(targets, str):
        return list({"attention": ATTENTION, "all": ALL_LAYERS}[targets])
    return list(targets)


def unfit_targets(network: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Return what is wrong with each name of an explicit list that no adapter can go to; needs no weights.

    peft takes a layer whose name is in the list or ends in a dot and one of the list, and passes over the others
    without a word as long as any name matches.
    """
    if isinstance(targets, str):
        return []
    modules = [(name, module) for name, module in network.named_modules() if name]
    endings = {layer_ending(name) for name, module in modules if isinstance(module, ADAPTABLE)}
    faults = []
    for target in targets:
        found = [module for name, module in modules if name == target or name.endswith(f".{target}")]
        odd = next((type(module).__name__ for module in found if not isinstance(module, ADAPTABLE)), None)
        if not found:
            faults.append(f"no layer is called so, got {target!r}; {suggest(target, tuple(sorted(endings)))}")
        elif odd is not None:
            faults.append(f"an adapter cannot go to a {odd}, got {target!r}; name layers inside, or beside, of it")
    return faults


def layer_ending(name: str) -> str:
    """Return the last part of a module's name, the last two where a number says little: ``to_q``, ``to_out.0``."""
    *_, before, last = ("", *name.split("."))
    return f"{before}.{last}" if last.isdecimal() else last


def add_lora(
    network: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: str | Sequence[str],
    seed: int,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> None:
    """Attach fresh float32 adapters to a frozen network: A gaussian with standard deviation 1/rank, B zero.

    DoRA's magnitudes are the norms of the weights' rows, so that nothing is changed at first. The initial values depend
    on ``seed`` alone, not on the process's random state, which is left as it was.

    Args:
        network: A diffusers model; its own weights must not require gradient.
        rank: Inner width r.
        alpha: The update is (alpha / r) B A.
        targets: ``attention``, ``all``, or module name endings.
        seed: Of the initial values.
        use_rslora: Scale by alpha / sqrt(r) instead (rsLoRA, arXiv:2312.03732).
        use_dora: Train the norm of each row of the adapted weights besides (DoRA, arXiv:2402.09353, Eq. 5); as there,
            in section 4.3, the gradient takes the norm that is divided by as a constant.

    Raises:
        ValueError: One of ``targets`` is no layer of the network that can have adapters.
    """
    if faults := unfit_targets(network, targets):
        raise ValueError("; ".join(faults))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        init_lora_weights="gaussian",
        target_modules=target_modules(targets),
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    gpus = sorted({weight.device.index for weight in network.parameters() if weight.device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus), warnings.catch_warnings():  # all of them otherwise, with a warning
        torch.manual_seed(seed)
        # that peft could not merge into quantised weights, which nobody does
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")
        cast(Any, network).add_adapter(config, adapter_name=ADAPTER)
    for parameter in lora_parameters(network):
        parameter.data = parameter.data.float()
    for layer in lora_layers(network) if use_dora else ():
        # peft's have the rounding of the base model's precision, so that they would change it
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight
        magnitude.data = row_norms(layer.get_base_layer().weight.data.float()).reshape(magnitude.shape)


def remove_lora(network: nn.Module) -> None:
    """Take adapters off again; the network is left as it was before, the very same weights. None is fine too."""
    if lora_layers(network):
        cast(Any, network).unload_lora()


def lora_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the adapters' parameters in the network's own order."""
    return [parameter for name, parameter in network.named_parameters() if "lora_" in name]


def weight_decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the adapters' parameters in an optimiser's groups: decay draws a LoRA to the base model.

    It would draw DoRA's magnitudes, which are the base model's own norms at first, to zero: they have none.
    """
    named = [(name, parameter) for name, parameter in network.named_parameters() if "lora_" in name]
    plain = [parameter for name, parameter in named if "lora_magnitude_vector" not in name]
    magnitudes = [parameter for name, parameter in named if "lora_magnitude_vector" in name]
    groups = [{"params": plain, "weight_decay": weight_decay}, {"params": magnitudes, "weight_decay": 0.0}]
    return groups[: 2 if magnitudes else 1]


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the adapters, peft's key names, on the CPU."""
    state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def load_lora_state(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Put saved values into attached adapters.

    Raises:
        ValueError: The keys are not those of the attached adapters.
    """
    expected = set(get_peft_model_state_dict(network, adapter_name=ADAPTER))
    if set(state) != expected:
        odd = sorted(set(state) ^ expected)
        raise ValueError(f"adapter keys differ from the attached LoRA: {odd[:3]} and {max(0, len(odd) - 3)} more")
    set_peft_model_state_dict(network, state, adapter_name=ADAPTER)


@torch.no_grad()
def adapter_updates(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each adapted layer's name and what its active adapters add to its weight, in its shape and precision."""
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            yield name, _update(module)


def layer_update(weight: Tensor, a: Tensor, b: Tensor, *, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """Return what a trained adapter adds to a layer's weight, in its shape.

    Args:
        weight: The base model's, of a linear layer or a convolution.
        a: Of shape (rank, ..).
        b: Of shape (rows, rank, ..), 1 x 1 for a convolution.
        scale: Of B A.
        magnitude: DoRA's norms of the rows, if it has any.
    """
    update = scale * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    return update if magnitude is None else _with_magnitude(weight, update, magnitude)


def row_norms(weight: Tensor) -> Tensor:
    """Return the L2 norm of each row, that is, of what makes one output; ``(rows,)``."""
    return cast(Tensor, torch.linalg.vector_norm(weight.flatten(1), dim=1))


def _with_magnitude(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """Return m (W + U) / |W + U| - W: what DoRA (Eq. 5) makes of an update U; in float64 within, since much cancels."""
    changed = weight.double() + update.double()
    factor = magnitude.double().flatten() / row_norms(changed)
    whole = factor.view(-1, *[1] * (weight.ndim - 1)) * changed
    return (whole - weight.double()).to(torch.promote_types(weight.dtype, update.dtype))


def adapted_weights(network: nn.Module) -> list[Tensor]:
    """Return the frozen weights that adapters belong to."""
    return [layer.get_base_layer().weight for layer in lora_layers(network)]


def fold_scale(state: dict[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """Return adapters whose update B A already contains ``scale``; DoRA's magnitudes stay as they are.

    Readers that ignore alpha (ComfyUI, diffusers without metadata) then agree with those that take it as the rank.
    """
    return {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in state.items()}


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """Run the network as the base model inside the block; adapters of any name, none is fine too."""
    with _bypassed(lora_layers(network)):
        yield


@contextmanager
def adapters_as_loaded(network: nn.Module) -> Iterator[None]:
    """Run adapters inside the block as a file of theirs runs in this network: in its precision, their scale folded in.

    peft casts what it loads to the precision of the layer it belongs to. So what is evaluated is what will be used. In
    a network of the adapters' own precision nothing changes.
    """
    changed = []
    for layer in lora_layers(network):
        dtype = precision_of(layer.get_base_layer())
        for name in list(layer.lora_A):
            a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
            if a.dtype != dtype:
                changed.append((layer, name, a.data, b.data, scale))
                a.data, b.data, layer.scaling[name] = a.data.to(dtype), (b.data * scale).to(dtype), 1.0
    exact = []
    for layer in lora_layers(network):
        for part in layer.lora_magnitude_vector.values():
            exact.append((part.weight, part.weight.data))
            part.weight.data = part.weight.data.to(precision_of(layer.get_base_layer()))
    try:
        yield
    finally:
        for magnitude, value in exact:
            magnitude.data = value
        for layer, name, a_data, b_data, scale in changed:
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a_data, b_data
            layer.scaling[name] = scale


class MergedLora:
    """The adapters folded into the weights they are attached to, for calls without gradient.

    Those with more to them than B A and DoRA's magnitudes, and those on quantised weights, run as peft runs them.

    The merged weights are a second copy of the adapted layers alone, made once and taken anew for every set of adapter
    values. The network's own weights are put aside while it runs and put back untouched, so that nothing is rounded
    away as it would be by adding the update and taking it off again.
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers = [layer for layer in lora_layers(network) if _is_foldable(layer)]
        self._merged = [_merged_weight(layer) for layer in self._layers]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the network run on the merged weights inside the block."""
        bases = [cast(nn.Linear, layer.get_base_layer()) for layer in self._layers]
        own = [base.weight.data for base in bases]
        for base, merged in zip(bases, self._merged, strict=True):
            base.weight.data = merged
        try:
            with _bypassed(self._layers):
                yield
        finally:
            for base, weight in zip(bases, own, strict=True):
                base.weight.data = weight


def lora_layers(network: nn.Module) -> list[Any]:
    """Return peft's layers."""
    return [module for module in network.modules() if isinstance(module, LoraLayer)]


def _is_foldable(layer: Any) -> bool:
    """Whether ``_update`` is all that the layer's adapters do: one of DoRA's alone, or any number of plain ones."""
    names = layer.active_adapters
    if any(layer.lora_bias.get(name) for name in names) or is_quantised(layer.get_base_layer()):
        return False
    return not any(name in layer.lora_variant for name in names) or (
        len(names) == 1 and names[0] in layer.lora_magnitude_vector
    )


@torch.no_grad()
def _merged_weight(layer: Any) -> Tensor:
    weight = cast(Tensor, layer.get_base_layer().weight)
    return weight.data + _update(layer).to(weight.dtype)


def _update(layer: Any) -> Tensor:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    weight = layer.get_base_layer().weight.data
    update = torch.zeros_like(weight)
    for name in names:
        update = update + layer.get_delta_weight(name)
        if name in layer.lora_magnitude_vector:
            update = _with_magnitude(weight, update, layer.lora_magnitude_vector[name].weight.data)
    return update


@contextmanager
def _bypassed(layers: Sequence[Any]) -> Iterator[None]:
    """Skip adapters by peft's own flag; its public switch would also turn off their gradient."""
    was_off = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, was_off, strict=True):
            layer._disable_adapters = flag
