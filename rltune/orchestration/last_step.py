"""What a plan says of an experiment that trains the last sampling step alone, where that step does next to nothing."""

from rltune.config.load import Experiment
from rltune.diffusion.families.base import ModelFamily
from rltune.errors import UserError
from rltune.estimators.base import Truncated
from rltune.training.sampling import make_sampler
from rltune.training.setup import make_estimator

LITTLE = 0.03
"""Of the last step's output, in the image's latents. Schedules that end at a level of 0.3 to 2 % are below it (Stable
Diffusion 3.5 0.009, AuraFlow 0.003, Qwen-Image 0.020, Stable Diffusion 1.5 0.012), those of models for few steps at
0.25 and above."""


def last_step_note(experiment: Experiment, model: ModelFamily) -> str:
    """Say that K can be nothing but 1 and that the last step's weight is little somewhere; else empty."""
    smallest: tuple[float, int] | None = None
    weights: dict[str, tuple[float, int]] = {}
    for config in experiment.corners(("estimator", "sampler")):
        try:
            estimator, key = make_estimator(config), config.sampler.model_dump_json()
            if key not in weights:
                sampler = make_sampler(config, model)
                last = sampler.table.num_steps - 1
                weights[key] = (abs(sampler.table.path_weight(last, None)), sampler.num_steps)
        except UserError:  # told of as a fault
            continue
        weight, num_steps = weights[key]
        if not isinstance(estimator, Truncated) or estimator.deepest(num_steps) > 1:
            return ""  # a search that tries other steps too finds out
        if weight < LITTLE:
            smallest = min(smallest or (weight, num_steps), (weight, num_steps))
    if smallest is None:
        return ""
    weight, num_steps = smallest
    return (
        f"at K = 1 the last of {num_steps} steps alone is trained, by which the image moves {weight:.1%} of the "
        "network's output: rewards see little of what is learned; if gains are small, set estimator.k to 2 or more, or "
        "take an estimator that trains other steps (refl, drtune)"
    )
