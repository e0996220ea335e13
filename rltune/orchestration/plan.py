"""The one door before a run: everything that can be known of an experiment before it starts, all faults at once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rltune.config.load import Experiment
from rltune.errors import UserError
from rltune.orchestration.claiming import check_claim
from rltune.orchestration.duration import Duration, foresee
from rltune.orchestration.inspection import Faults, Inputs, inspect_experiment
from rltune.orchestration.memory_check import TAKE_MORE, check_memory
from rltune.orchestration.nodes import Node
from rltune.orchestration.settling import settle, still_open
from rltune.orchestration.workload import Workload, work_out
from rltune.runs.layout import RunFolder
from rltune.training.forecast import Forecast


@dataclass(frozen=True)
class Plan:
    """An experiment that nothing is known to be wrong with, and what it comes to on given nodes."""

    experiment: Experiment
    """With the model's own values where it leaves the sampler open, as far as they are known."""
    folder: RunFolder
    """Of its run."""
    workload: Workload
    inputs: Inputs
    memory: Forecast | None = None
    """What a worker takes, at the largest of what is searched; None where the base model is not on this machine.
    """

    duration: Duration | None = None
    """How long it may take; None where workers have a GPU or are elsewhere, or the base model is not on this machine.
    """

    @property
    def undecided(self) -> tuple[str, ...]:
        """Sampler settings that are the model's own and not known here: its files are not on this machine."""
        return still_open(self.experiment)


def plan(
    experiment: Experiment,
    nodes: Sequence[Node],
    folder: RunFolder,
    *,
    is_attached: bool = False,
    may_fetch: bool = False,
) -> Plan:
    """Return what an experiment comes to, once nothing is known to be wrong with it at any value that may be tried.

    Looks at its options, prompts, base model, weights, at the run folder where there is one, and at the nodes. Loads
    no weights and starts nothing.

    Args:
        experiment: With relative paths from the current folder.
        nodes: Those that it is to run on.
        folder: Of its run, which need not be there; the prompts of a run that was started are its own copies.
        is_attached: Whether it runs on a cluster that this process does not start: what lies in this machine's caches
            then says nothing.
        may_fetch: Whether to ask the hub what a model is sampled with that is not on this machine.

    Raises:
        ExperimentError: Lists every fault that was found.
    """
    experiment = settle(experiment, folder, may_fetch=may_fetch)
    faults = Faults()
    inputs = inspect_experiment(experiment, folder, faults, is_attached=is_attached)
    is_whole = not faults  # a workload needs no more than sizes, but rewards must be known to be counted
    workload = None
    with faults.noted():
        _check_nodes_can_come(experiment, is_attached=is_attached)
        workload = work_out(experiment, nodes)
    if is_whole and workload is not None:
        with faults.noted():
            check_claim(folder, experiment, precision=workload.precision)
    memory = duration = None
    if not faults and workload is not None and inputs.outline is not None:
        with faults.noted():
            outline, largest = inputs.outline, experiment.largest(TAKE_MORE)
            needed = [check_memory(config, outline, workload, nodes, is_here=not is_attached) for config in largest]
            memory = max(needed, key=lambda found: found.peak_gib)
            if not is_attached:
                duration = foresee(experiment, inputs.outline, workload)
    faults.raise_any(experiment.source)
    assert workload is not None  # or there was a fault
    return Plan(experiment, folder, workload, inputs, memory, duration)


def _check_nodes_can_come(experiment: Experiment, *, is_attached: bool) -> None:
    if experiment.shared.resources.nodes == "autoscale" and not is_attached:
        raise UserError(
            "resources.nodes: to a cluster of this machine alone no nodes come, got 'autoscale'; attach to one with "
            "an autoscaler (--address), or write present"
        )


def this_machine() -> Node:
    """Return what a cluster that is started on this machine will have."""
    import torch

    from rltune.diffusion.memory import GIB

    count, sizes = torch.cuda.device_count(), list[float]()
    if torch.cuda.is_available():
        sizes = [torch.cuda.get_device_properties(number).total_memory / GIB for number in range(count)]
    return Node(float(os.cpu_count() or 1), float(count), accelerators=None, gpu_gib=min(sizes, default=None))
