"""How many activations fit: what the backward pass would store, and what memory is free."""

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rltune.diffusion.blocks import Forward, run_blocks_by
from rltune.diffusion.nested import leaves, mapped, tensors

GIB = 2**30
SHARE_OF_FREE = 0.6
"""The rest is for the optimiser, the rewards and the allocator's gaps."""


class _Storages:
    """Memory behind tensors, each piece once; kept alive here, so that its address is not given out again."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._held: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except RuntimeError:  # a quantised weight of a tensor class of its own
            return
        self._held[id(storage)] = storage

    def __contains__(self, tensor: Tensor) -> bool:
        try:
            return id(tensor.untyped_storage()) in self._held
        except RuntimeError:
            return True

    def bytes_besides(self, *others: "_Storages") -> int:
        keys = self._held.keys() - {key for other in others for key in other._held}
        return sum(self._held[key].nbytes() for key in keys)


def _weights(network: nn.Module) -> _Storages:
    return _Storages([*network.parameters(), *network.buffers()])


def stored_bytes(run: Callable[[], Tensor], frozen: nn.Module) -> int:
    """Return the bytes that autograd stores for the backward pass of ``run``, the weights of ``frozen`` not counted."""
    weights, stored = _weights(frozen), _Storages()

    def pack(tensor: Tensor) -> Tensor:
        stored.add(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return stored.bytes_besides(weights)


@dataclass(frozen=True)
class Stored:
    """What autograd stores for the backward pass of one network call, in bytes."""

    plain: int
    """All of it."""
    outside: int
    """With a checkpoint around every block: the blocks' inputs, and what lies outside of blocks."""
    largest: int
    """What the largest block adds to that while it is computed again."""
    tensor: int = 0
    """The largest tensor among it all."""


@dataclass(frozen=True)
class _BlockCount:
    """What one block stores, for others like it."""

    stored: tuple[int, ...]
    """Numbers of the tensors, inputs first, that are stored and live on behind the block."""
    others: int
    """Bytes of what else is stored."""
    largest: int
    results: Any
    """As the block returns them; tensors of them are drawn anew."""


class _CallMeter:
    """Notes what one call stores, block by block, and holds no more than a block's at a time."""

    def __init__(self, network: nn.Module) -> None:
        self._weights = _weights(network)
        self._outside, self._counted = _Storages(), _Storages()
        self._block: _Storages | None = None
        self._plain = self._largest = self._tensor = 0
        self._alike: dict[Hashable, _BlockCount] = {}

    @property
    def stored(self) -> Stored:
        return Stored(self._plain, self._outside.bytes_besides(self._weights), self._largest, self._tensor)

    def pack(self, tensor: Tensor) -> None:
        """Take note, and hold nothing: nobody goes back through this call."""
        if tensor not in self._weights:
            self._tensor = max(self._tensor, tensor.nbytes)
        if self._block is not None:
            self._block.add(tensor)
            return
        self._outside.add(tensor)
        self._count(tensor)

    def run_block(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = tensors((args, kwargs))
        for tensor in inputs:
            self._outside.add(tensor)
        # without values, blocks that are alike need not run again: on the device meta every operation takes a while
        key = kind_of(forward, args, kwargs) if inputs and inputs[0].device.type == "meta" else None
        known = self._alike.get(key)
        if known is None:
            known = self._run_block(forward, args, kwargs, inputs)
            result = known.results
            if key is not None:
                self._alike[key] = known
        else:
            result = drawn_anew(known.results)
        lasting = (*inputs, *tensors(result))
        for number in known.stored:  # another block may store them again
            self._count(lasting[number])
        self._plain += known.others
        self._largest = max(self._largest, known.largest)
        return result

    def _run_block(
        self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Sequence[Tensor]
    ) -> _BlockCount:
        block = self._block = _Storages()
        try:
            result = forward(*args, **kwargs)
        finally:
            self._block = None
        lasting = [*inputs, *tensors(result)]
        stored = tuple(number for number, tensor in enumerate(lasting) if tensor in block)
        kept = _Storages(lasting[number] for number in stored)
        return _BlockCount(
            stored,
            others=block.bytes_besides(kept, self._weights),
            largest=block.bytes_besides(self._outside, self._weights),
            results=result,
        )

    def _count(self, tensor: Tensor) -> None:
        if tensor not in self._counted and tensor not in self._weights:
            self._counted.add(tensor)
            self._plain += tensor.untyped_storage().nbytes()


def kind_of(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """Return what two blocks and their arguments have in common where they store the same."""
    block: nn.Module = forward.__self__  # type: ignore[attr-defined]  # a bound method
    weights = tuple((weight.shape, weight.dtype, weight.requires_grad) for weight in block.parameters())
    given = tuple(
        (leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in leaves((args, kwargs))
    )
    return type(block), weights, given


def drawn_anew(results: Any) -> Any:
    """Return results as another block alike would give them: of the same shapes, in memory of their own."""
    return mapped(results, lambda tensor: torch.empty_like(tensor).requires_grad_(tensor.requires_grad))


def measure_call(run: Callable[[], Tensor], network: nn.Module) -> Stored:
    """Return what one call of a network stores for its backward pass; the call holds no more than a block of it.

    Works on the device ``meta`` too, where nothing is computed.

    Args:
        run: Calls the network, whose weights are not counted.
        network: Its blocks are without checkpoints afterwards.
    """
    meter = _CallMeter(network)
    run_blocks_by(network, meter.run_block)
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda tensor: tensor):
            run()
    finally:
        run_blocks_by(network, None)
    return meter.stored


def free_bytes(device: torch.device) -> int:
    """Return the memory a worker may fill with activations: its share of what is free on the device.

    On a GPU that others share, no more than is left of the fraction that this process was given.

    On a CPU every core is taken to have a worker of its own, so that trials side by side do not fill it twice.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        own = int(total * torch.cuda.get_per_process_memory_fraction(device)) - torch.cuda.memory_reserved(device)
        return int(SHARE_OF_FREE * max(0, min(free, own)))
    return int(SHARE_OF_FREE * _free_host_bytes() / len(os.sched_getaffinity(0)))


def host_bytes() -> int:
    """Return the memory of this machine, whatever is in use of it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_host_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip().isdigit():  # a container's own limit; "max" is none
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(0, free)
