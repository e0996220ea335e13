"""What a sweep will do, worked out before anything starts: fit, concurrency, images, a rough time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rltune.config.load import Experiment
from rltune.config.sections import ResourcesConfig
from rltune.errors import UserError
from rltune.orchestration.nodes import Node, WorkerNeed, count_slots, describe
from rltune.training.setup import NUM_CALIBRATION_IMAGES, calibration_size


@dataclass(frozen=True)
class Workload:
    """The size of a sweep on a given cluster."""

    num_trials: int
    """Trained trials; the base model is one more."""
    num_workers: int
    """Per trial; the most where ``min_workers`` allows fewer."""
    min_workers: int
    """The fewest a trial goes on with; ``num_workers`` where their number is fixed."""
    worker: WorkerNeed
    num_nodes: int
    """Those that hold at least one worker."""
    num_concurrent: int
    """Trials at a time."""
    num_slots: int
    """Workers that the cluster has room for."""
    num_steps: int
    """Optimiser steps a trial, at the first value of every distribution."""
    images_per_step: int
    num_evaluations: int
    """Per trial."""
    images_per_evaluation: int
    num_calibration_images: int = NUM_CALIBRATION_IMAGES
    is_growing: bool = False
    """Whether an autoscaler brings nodes that are not there yet, which ``num_slots`` then includes."""

    @property
    def num_gpus_per_worker(self) -> float:
        """GPUs a worker takes, ``auto`` resolved."""
        return self.worker.num_gpus

    @property
    def precision(self) -> str:
        """What ``resources.precision: auto`` is: ``bf16`` where workers have a GPU, else ``fp32``."""
        return "bf16" if self.num_gpus_per_worker > 0 else "fp32"

    @property
    def num_images(self) -> int:
        """Images that the whole sweep draws, the base model's evaluation and calibration included."""
        per_trial = self.num_steps * self.images_per_step + self.num_evaluations * self.images_per_evaluation
        return self.num_trials * per_trial + self.images_per_evaluation + self.num_calibration_images


def work_out(experiment: Experiment, nodes: Sequence[Node]) -> Workload:
    """Work out what will run where.

    A worker lies on one node; the workers of a trial may lie on several. Ray Train takes all that a trial needs at
    once or nothing, so that trials which wait for room cannot hold on to what another waits for.

    Args:
        experiment: What to do.
        nodes: The cluster's.

    Raises:
        UserError: The cluster can never hold one trial, or not as many at a time as were asked for.
    """
    config = experiment.shared
    wanted = config.resources
    fewest = wanted.min_workers or wanted.workers
    need = _need(wanted, nodes)
    slots = count_slots(nodes, need)
    is_growing = wanted.nodes == "autoscale"
    if is_growing and wanted.concurrent != "auto":
        slots = max(slots, wanted.concurrent * wanted.workers)
    if slots < fewest:
        raise UserError(
            f"resources: a trial needs {fewest} worker{'s' if fewest > 1 else ''} with {need} each, and the cluster "
            f"has room for {slots}: {describe(nodes)}; {_remedy(wanted, need)}"
        )
    fit = max(1, slots // wanted.workers)  # an elastic trial starts with what there is
    num_trials, num_rounds = experiment.num_trials, max(kind.num_rounds for kind in experiment.kinds)
    concurrent = fit if wanted.concurrent == "auto" else wanted.concurrent
    if concurrent > fit:
        raise UserError(
            f"resources.concurrent: {concurrent} trials at a time need more than the cluster has, {fit} fit "
            f"({describe(nodes)}); lower it"
        )
    return Workload(
        num_trials=num_trials,
        num_workers=wanted.workers,
        min_workers=fewest,
        worker=need,
        num_nodes=sum(node.num_fitting(need) > 0 for node in nodes),
        num_concurrent=min(concurrent, num_trials + 1),  # the base model's trial is one more
        num_slots=slots,
        num_steps=num_rounds,
        images_per_step=config.optim.batch,
        num_evaluations=max(1, -(-num_rounds // config.evaluate.every)),
        images_per_evaluation=config.evaluate.prompts * config.evaluate.images_per_prompt,
        num_calibration_images=math.prod(calibration_size(config)),
        is_growing=is_growing,
    )


def _need(wanted: ResourcesConfig, nodes: Sequence[Node]) -> WorkerNeed:
    """Return what a worker takes; ``auto`` is a GPU if a node that it may run on has one.

    Raises:
        UserError: No node has the type of accelerator that is asked for.
    """
    kind = wanted.accelerator
    able = [node for node in nodes if kind is None or node.accelerators is None or kind in node.accelerators]
    if kind is not None and not able and wanted.nodes == "present":
        there = sorted({name for node in nodes for name in node.accelerators or ()})
        advice = f"it has {', '.join(there)}; write one of them" if there else "it names none on any node"
        raise UserError(f"resources.accelerator: no node of the cluster has {kind!r}, {advice}, or leave it out")
    if wanted.gpus_per_worker == "auto":
        num_gpus = 1.0 if any(node.num_gpus >= 1 for node in able) else 0.0
    else:
        num_gpus = float(wanted.gpus_per_worker)
    return WorkerNeed(wanted.cpus_per_worker, num_gpus, kind)


def _remedy(wanted: ResourcesConfig, need: WorkerNeed) -> str:
    knobs = ["min_workers" if wanted.min_workers else "workers"]
    knobs += ["cpus_per_worker"] if need.num_cpus > 1 else []
    knobs += ["gpus_per_worker"] if need.num_gpus else []
    if knobs == ["workers"] and wanted.workers == 1:
        return "attach to a larger cluster"
    return f"lower resources.{' or '.join(knobs)}, or attach to a larger cluster"
