"""How long a sweep may take on this machine's CPU: operations that are counted, over the rate of a matrix product.

A range, for two things are known only once trials run: what else the machine does, and how near to that rate the
networks come. Rewards are not counted.
"""

import math
from dataclasses import dataclass

from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.operations import matrix_rate, operations_an_image
from rltune.diffusion.sampler import Sampler
from rltune.orchestration.workload import Workload
from rltune.training.forecast import DTYPES
from rltune.training.sampling import image_shape, make_sampler
from rltune.training.setup import make_estimator

SHARES = (0.8, 0.25)
"""Of the rate, what is reckoned with: in CPU seconds the built-in model's steps had 0.48 to 0.60, rewards included;
full-size SDXL, in seconds beside other jobs, 0.28 (docs/performance.md)."""
START_S = (20.0, 120.0)
"""Until Ray's processes run and have loaded what they need."""
PASSES = (1, 3)
"""Besides the forward one, through what carries gradient: a backward one; with two more, of a step's and its blocks'
checkpoints."""
CORNERS = (
    "model.adapter",
    "estimator.k",
    "estimator.name",
    "sampler.steps",
    "optim.steps",
    "optim.batch",
    "optim.queries",
)
"""Settings that are tried at both ends."""


@dataclass(frozen=True)
class Duration:
    """From and to, in seconds."""

    step_s: tuple[float, float]
    """An optimiser step."""
    total_s: tuple[float, float]
    """All trials, the base model's among them; the front's second measurement left out."""


def foresee(experiment: Experiment, model: ModelFamily, work: Workload) -> Duration | None:
    """Return how long a sweep may take on this machine; None where its workers have a GPU.

    Args:
        experiment: With the model's own values where it leaves them open.
        model: Its base model without values.
        work: What runs where.
    """
    if work.num_gpus_per_worker > 0:
        return None
    config = experiment.shared
    wanted = config.resources.precision
    rate = matrix_rate(DTYPES[work.precision if wanted == "auto" else wanted])
    sampler = make_sampler(config, model)
    an_image = operations_an_image(model, image_shape(config, model), guidance_scale=sampler.guidance_scale)
    corners = list(experiment.corners(CORNERS))
    least, most = ([_cost(corner, sampler, an_image, work, passes) for corner in corners] for passes in PASSES)
    rates = SHARES[0] * rate * work.worker.num_cpus, SHARES[1] * rate
    steps = min(step for step, _ in least) / rates[0], max(step for step, _ in most) / rates[1]
    trials = min(trial for _, trial in least) / rates[0], max(trial for _, trial in most) / rates[1]
    base = (work.images_per_evaluation + work.num_calibration_images) * _drawing(an_image, sampler.num_steps)
    low, high = (
        start + base / speed + work.num_trials * trial / work.num_concurrent
        for start, speed, trial in zip(START_S, rates, trials, strict=True)
    )
    return Duration(steps, (low, high))


def _drawing(an_image: tuple[int, int], num_steps: int) -> int:
    call, decoding = an_image
    return num_steps * call + decoding


def _cost(
    config: RunConfig, sampler: Sampler, an_image: tuple[int, int], work: Workload, passes: int
) -> tuple[float, float]:
    """Return the operations of a step and of a trial, on one worker.

    Args:
        config: A concrete experiment.
        sampler: Of the experiment, where steps are the model's own.
        an_image: Operations of a guided network call, and of decoding, for one image.
        work: What runs where.
        passes: Besides the forward one, through what carries gradient: backward, and those that are computed again.
    """
    num_steps, estimator = config.sampler.steps or sampler.num_steps, make_estimator(config)
    num_active = float(min(num_steps, getattr(estimator, "k", None) or num_steps))
    if getattr(estimator, "draw", None) == "uniform":
        num_active = (1 + num_active) / 2
    image = _drawing(an_image, num_steps) + passes * (num_active * an_image[0] + estimator.needs_gradient * an_image[1])
    step = image * math.ceil(config.optim.batch / work.num_workers)
    evaluation = _drawing(an_image, num_steps) * math.ceil(work.images_per_evaluation / work.num_workers)
    return step, config.num_rounds * step + work.num_evaluations * evaluation
