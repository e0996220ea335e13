"""Whether a worker will fit into the memory it gets, and which settings would make it fit."""

from collections.abc import Callable, Mapping, Sequence

from rltune.config.experiment import RunConfig
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.memory import GIB, host_bytes
from rltune.errors import UserError
from rltune.orchestration.nodes import Node, smallest_gpu_gib
from rltune.orchestration.workload import Workload
from rltune.training.forecast import Change, Forecast, forecast, smaller

TAKE_MORE = (
    "model.lora.rank",
    "estimator.k",
    "optim.batch",
    "optim.micro_batch",
    "sampler.steps",
    "sampler.height",
    "sampler.width",
)
"""Settings of which a larger number takes more memory, or no less."""
NUM_REMEDIES = 3
FAR_BEYOND = 2.0
"""Times the memory of the machine: workers without a GPU are refused no earlier, for a machine can swap."""


def check_memory(
    config: RunConfig, model: ModelFamily, workload: Workload, nodes: Sequence[Node], *, is_here: bool
) -> Forecast:
    """Return what a worker takes of memory.

    Args:
        config: The experiment where it takes most.
        model: Its base model without values.
        workload: What runs where.
        nodes: The cluster's.
        is_here: Whether workers run on this machine.

    Raises:
        UserError: That is more than the smallest GPU has, or far more than this machine has.
    """
    is_on_gpu = workload.num_gpus_per_worker > 0
    room_gib = smallest_gpu_gib(nodes, workload.worker) if is_on_gpu else None
    if room_gib is None and not is_on_gpu and is_here:
        room_gib = FAR_BEYOND * host_bytes() / GIB

    def look(config: RunConfig) -> Forecast:
        wanted = config.resources.precision
        precision = workload.precision if wanted == "auto" else wanted
        return forecast(config, model, precision=precision, room_gib=room_gib)

    found = look(config)
    if room_gib is None or found.peak_gib <= room_gib:
        return found
    whose = f"the smallest GPU has {room_gib:.1f}" if is_on_gpu else f"this machine has {room_gib / FAR_BEYOND:.1f}"
    remedies = _remedies(config, look, smaller(config, model, found), room_gib)
    raise UserError(f"memory: a worker needs {memory_in_words(found)}, and {whose}; {remedies}")


def memory_in_words(found: Forecast) -> str:
    """Return the peak and what it is made of: ``9.6 GiB (network 4.8, ...)``."""
    parts = ", ".join(f"{part} {gib:.1f}" for part, gib in found.parts.items() if gib >= 0.05)
    return f"{found.peak_gib:.1f} GiB ({parts})"


def _remedies(
    config: RunConfig, look: Callable[[RunConfig], Forecast], changes: Mapping[str, Change], room_gib: float
) -> str:
    """Say which settings would make it fit: those that do alone, up to three, else the fewest that do together."""
    alone = {name: look(change(config)).peak_gib for name, change in changes.items()}
    fitting = [name for name in alone if alone[name] <= room_gib][:NUM_REMEDIES]
    if fitting:
        return "write " + ", or ".join(f"{name} ({alone[name]:.1f} GiB)" for name in fitting)
    together: list[str] = []
    gib = 0.0
    for name in sorted(alone, key=lambda name: alone[name])[:NUM_REMEDIES]:
        config = changes[name](config)
        gib = look(config).peak_gib
        together.append(f"{name} ({gib:.1f} GiB{' with it' if together else ''})")
        if gib <= room_gib:
            return f"write {' and '.join(together)}"
    return f"{' and '.join(together)} are not enough; take a smaller model, or a GPU of {gib:.0f} GiB and more"
