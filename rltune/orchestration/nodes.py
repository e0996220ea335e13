"""What the nodes of a cluster hold, and how many workers of one kind fit on them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rltune.orchestration.ray_private import HEAD_NODE

ACCELERATOR_PREFIX = "accelerator_type:"
"""Ray's name for what a node's accelerators are: a resource of 1 under this and the type."""
ROUNDING = 1e-9
GPU_GIB: Mapping[str, float] = {
    "P4": 8,
    "K80": 12,
    "P100": 16,
    "T4": 16,
    "A10G": 24,
    "L4": 24,
    "V100": 32,
    "A100-40G": 40,
    "L40S": 48,
    "A100": 80,
    "A100-80G": 80,
    "H100": 80,
    "H20": 141,
    "H200": 141,
}
"""Type of accelerator, as Ray names it -> memory of one; the larger where there are several under a name."""


@dataclass(frozen=True)
class WorkerNeed:
    """What one worker takes from one node; it never spans two."""

    num_cpus: int
    num_gpus: float
    """Below 1 a share of a single GPU."""
    accelerator: str | None = None
    """Type of accelerator that its node must have."""

    def __str__(self) -> str:
        gpus = f" and {_count(self.num_gpus, 'GPU')}" if self.num_gpus else ""
        kind = f" on a node with {self.accelerator}" if self.accelerator else ""
        return f"{_count(self.num_cpus, 'CPU')}{gpus}{kind}"


@dataclass(frozen=True)
class Node:
    """What Ray may hand out on one node."""

    num_cpus: float
    num_gpus: float = 0.0
    accelerators: frozenset[str] | None = frozenset()
    """Types of its accelerators; None where they are not known, which no trial is refused for."""
    gpu_gib: float | None = None
    """Memory of its smallest GPU; None where that is not known."""
    id: str = field(default="", compare=False)
    """Ray's; empty of a node that is not there yet."""
    name: str = field(default="", compare=False)
    """Its address in the cluster's network."""
    is_head: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        kinds = f" ({', '.join(sorted(self.accelerators))})" if self.accelerators else ""
        return f"{_count(self.num_cpus, 'CPU')} and {_count(self.num_gpus, 'GPU')}{kinds}"

    def num_fitting(self, need: WorkerNeed) -> int:
        """Return how many workers of a kind fit beside each other.

        All workers of a sweep are alike, so that the order in which they come and go leaves no gap that one would fit.
        """
        if need.accelerator is not None and self.accelerators is not None and need.accelerator not in self.accelerators:
            return 0
        by_cpu = int(self.num_cpus // need.num_cpus)
        return min(by_cpu, _gpu_slots(self.num_gpus, need.num_gpus)) if need.num_gpus else by_cpu


def read_nodes(rows: Iterable[Mapping[str, Any]]) -> tuple[Node, ...]:
    """Return the nodes that are alive, from what ``ray.nodes()`` gives."""
    return tuple(
        Node(
            num_cpus=float(row["Resources"].get("CPU", 0.0)),
            num_gpus=float(row["Resources"].get("GPU", 0.0)),
            accelerators=kinds,
            gpu_gib=min((GPU_GIB[kind] for kind in kinds if kind in GPU_GIB), default=None),
            id=str(row.get("NodeID", "")),
            name=str(row.get("NodeManagerAddress", "")),
            is_head=HEAD_NODE in row["Resources"],
        )
        for row in rows
        if row["Alive"]
        for kinds in [_accelerators(row["Resources"])]
    )


def _accelerators(resources: Iterable[str]) -> frozenset[str]:
    return frozenset(name.removeprefix(ACCELERATOR_PREFIX) for name in resources if name.startswith(ACCELERATOR_PREFIX))


def smallest_gpu_gib(nodes: Iterable[Node], need: WorkerNeed) -> float | None:
    """Return the memory that a worker has on the smallest GPU it may come to; None where no GPU's is known."""
    sizes = [node.gpu_gib for node in nodes if node.gpu_gib is not None and node.num_fitting(need)]
    return min(sizes) * min(1.0, need.num_gpus) if sizes and need.num_gpus else None


def count_slots(nodes: Iterable[Node], need: WorkerNeed) -> int:
    """Return how many workers of a kind the nodes hold at a time."""
    return sum(node.num_fitting(need) for node in nodes)


def describe(nodes: Sequence[Node]) -> str:
    """Return what the nodes have, equal ones counted, those that hold nothing left out."""
    kinds = Counter(str(node) for node in nodes if node.num_cpus or node.num_gpus)
    if not kinds:
        return "no node with a CPU or GPU"
    return ", ".join(f"{_count(number, 'node')} of {kind}" for kind, number in kinds.items())


def _gpu_slots(num_gpus: float, per_worker: float) -> int:
    """Return how many workers the GPUs of a node hold; one that takes a fraction must find it on a single GPU."""
    if per_worker >= 1:
        return int(num_gpus // per_worker)
    return int(num_gpus) * int(1 / per_worker + ROUNDING)  # not 1 // per_worker: 1 // 0.1 is 9


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"
