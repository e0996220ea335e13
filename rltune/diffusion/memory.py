"""How many activations fit: what the backward pass would store, and what memory is free."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

GIB = 2**30
SHARE_OF_FREE = 0.6
"""The rest is for the optimiser, the rewards and the allocator's gaps."""


def stored_bytes(run: Callable[[], Tensor], frozen: nn.Module) -> int:
    """Return the bytes that autograd stores for the backward pass of ``run``, the weights of ``frozen`` not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in frozen.parameters()}
    stored: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(stored.values())  # before the graph goes, and its addresses are given out again
    del result
    return total


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


def _free_host_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip().isdigit():  # a container's own limit; "max" is none
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(0, free)
