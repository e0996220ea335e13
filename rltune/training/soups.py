"""Points between LoRAs: what each is measured as, and on which weights."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Literal, get_args

from rltune.config.experiment import RunConfig
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import ADAPTER, remove_lora
from rltune.diffusion.lora_start import attached_factors, read_lora
from rltune.diffusion.mix import BASE, Mix
from rltune.diffusion.sampler import Sampler
from rltune.diffusion.soup import Layers, attach, factors_blended, interpolated, reduced
from rltune.errors import UserError
from rltune.training.adapters.base import adapter_of
from rltune.training.adapters.basis import Basis
from rltune.training.assessment import Prepare
from rltune.training.checkpoint import load_adapter

Method = Literal["exact", "factors", "predictions", "draw"]
METHODS: tuple[Method, ...] = get_args(Method)
FUSED: tuple[Method, ...] = ("exact", "factors")
"""Methods whose points are LoRAs themselves; the others run every LoRA, or draw one, at each step."""
Weights = tuple[float, ...]
BASE_MODEL: Layers = {}
"""The base model as one of the LoRAs."""


def read_member(model: ModelFamily, path: Path) -> Layers:
    """Return a LoRA file as a member of a soup; the model is without adapters afterwards.

    Raises:
        UserError: It is not a LoRA of this model.
    """
    return read_lora(model, path)


def trained_member(model: ModelFamily, config: RunConfig, checkpoint: Path, mix: Sequence[float] = ()) -> Layers:
    """Return the adapters of a trial as a member of a soup; the model is without adapters afterwards.

    A basis is the sum of its LoRAs by the weights of ``mix``, or those of its rewards.

    Raises:
        UserError: The trial's is no LoRA.
    """
    remove_lora(model.network)
    adapter = Basis(config, tuple(mix)) if mix else adapter_of(config)
    if adapter.own_format:
        raise UserError(
            f"soup: its members are LoRAs, and {checkpoint} holds none but {adapter.own_format}; name LoRAs"
        )
    adapter.restore(model, load_adapter(checkpoint))
    try:
        return attached_factors(model.network)
    finally:
        remove_lora(model.network)


def even_weights(num_loras: int, points: int) -> list[Weights]:
    """Return weights that sum to 1, ``points`` of them evenly along each edge: a line, or a lattice on the simplex.

    Raises:
        UserError: Fewer than two points.
    """
    if points < 2:
        raise UserError(f"--points: must be 2 at least, the ends, got {points}")
    steps = points - 1
    rows = []
    for chosen in combinations_with_replacement(range(num_loras), steps):
        counts = [chosen.count(i) for i in range(num_loras)]
        rows.append(tuple(count / steps for count in counts))
    return rows


def merged(loras: Sequence[Layers], weights: Weights, method: Method, rank: int | None = None) -> tuple[Layers, float]:
    """Return a point as one LoRA, and by how much of its update it was changed to have the rank.

    Args:
        loras: The members.
        weights: One each.
        method: One of ``FUSED``.
        rank: The greatest that it may have; it has what it needs if left out.

    Raises:
        UserError: The members do not go together by this method.
    """
    layers: Layers = interpolated(loras, weights) if method == "exact" else factors_blended(loras, weights)
    if rank is None or not layers or next(iter(layers.values())).rank <= rank:
        return layers, 0.0
    return reduced(layers, rank)


def of_point(loras: Sequence[Layers], weights: Weights, method: Method, rank: int | None = None) -> Prepare:
    """Return what puts a point on a model that has no adapters.

    Raises:
        UserError: When it is called: the members do not go together by this method.
    """

    def prepare(sampler: Sampler) -> Sampler:
        network = sampler.model.network
        if method in FUSED:
            layers, _ = merged(loras, weights, method, rank)
            if layers:
                attach(network, layers, ADAPTER)
            return sampler
        names = [f"lora_{i}" if layers else BASE for i, layers in enumerate(loras)]
        for name, layers in zip(names, loras, strict=True):
            if layers:
                attach(network, layers, name)
        return replace(sampler, mix=Mix(tuple(names), weights, is_drawn=method == "draw"))

    return prepare


def check_method(method: str, weights: Sequence[Weights]) -> None:
    """Check that a method is one, and takes the weights.

    Raises:
        UserError: It is none, or draws by weights that are no probabilities.
    """
    if method not in METHODS:
        raise UserError(f"--method: must be {', '.join(METHODS)}, got {method!r}")
    odd = [row for row in weights if min(row) < 0 or abs(sum(row) - 1) > 1e-6]
    if method == "draw" and odd:
        told = ",".join(f"{weight:g}" for weight in odd[0])
        raise UserError(f"--weights: for draw they are probabilities, at least 0 and 1 together, got {told}")
