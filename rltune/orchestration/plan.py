"""What a sweep will do, worked out before anything starts: fit, concurrency, images, a rough time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rltune.config.load import Experiment
from rltune.errors import UserError
from rltune.training.setup import NUM_CALIBRATION_IMAGES, calibration_size


@dataclass(frozen=True)
class Plan:
    """The size of a sweep on a given cluster."""

    num_trials: int
    """Trained trials; the base model is one more."""
    num_workers: int
    """Per trial."""
    num_gpus_per_worker: float
    num_concurrent: int
    """Trials at a time."""
    num_steps: int
    """Optimiser steps a trial, at the first value of every distribution."""
    images_per_step: int
    num_evaluations: int
    """Per trial."""
    images_per_evaluation: int
    num_calibration_images: int = NUM_CALIBRATION_IMAGES

    @property
    def num_images(self) -> int:
        """Images that the whole sweep draws, the base model's evaluation and calibration included."""
        per_trial = self.num_steps * self.images_per_step + self.num_evaluations * self.images_per_evaluation
        return self.num_trials * per_trial + self.images_per_evaluation + self.num_calibration_images


def make_plan(experiment: Experiment, resources: Mapping[str, float]) -> Plan:
    """Work out what will run where.

    Args:
        experiment: What to do.
        resources: What Ray may hand out, ``CPU`` and ``GPU`` among it.

    Raises:
        UserError: The cluster can never hold one trial.
    """
    config = experiment.shared
    wanted = config.resources
    num_gpus, num_cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    if wanted.gpus_per_worker == "auto":
        per_worker = 1.0 if num_gpus else 0.0
    else:
        per_worker = float(wanted.gpus_per_worker)
    fit = int(num_cpus // wanted.workers)
    if per_worker:
        fit = min(fit, _gpu_slots(num_gpus, per_worker) // wanted.workers)
    if fit < 1:
        raise UserError(
            f"resources: a trial needs {wanted.workers} CPUs and {per_worker * wanted.workers:g} GPUs, the cluster has "
            f"{num_cpus:g} and {num_gpus:g}; lower resources.workers or gpus_per_worker, or attach to a larger cluster"
        )
    num_trials = experiment.num_trials
    concurrent = fit if wanted.concurrent == "auto" else wanted.concurrent
    if concurrent > fit:
        raise UserError(
            f"resources.concurrent: {concurrent} trials at a time need more than the cluster has, {fit} fit; lower it"
        )
    return Plan(
        num_trials=num_trials,
        num_workers=wanted.workers,
        num_gpus_per_worker=per_worker,
        num_concurrent=min(concurrent, num_trials),
        num_steps=config.num_rounds,
        images_per_step=config.optim.batch,
        num_evaluations=-(-config.num_rounds // config.evaluate.every),
        images_per_evaluation=config.evaluate.prompts * config.evaluate.images_per_prompt,
        num_calibration_images=math.prod(calibration_size(config)),
    )


def _gpu_slots(num_gpus: float, per_worker: float) -> int:
    """Return how many workers the GPUs hold; one that takes a fraction must find it on a single GPU."""
    if per_worker > 1:
        return int(num_gpus // per_worker)
    return int(num_gpus) * int(1 / per_worker + 1e-9)  # not 1 // per_worker: 1 // 0.1 is 9
