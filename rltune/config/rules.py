"""What a rule that spans settings is: which settings it reads, and what it says of values that do not fit."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rltune.config.strict import StrictModel

Section = type[StrictModel]


@dataclass(frozen=True)
class Known:
    """The names that the caller's registries know; an empty kind is not checked."""

    rewards: tuple[str, ...] = ()
    estimators: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    samplers: tuple[str, ...] = ()
    executors: tuple[str, ...] = ()
    fixed_size_executors: tuple[str, ...] = ()
    """Those whose trials cannot go on with fewer workers."""
    rewards_without_gradient: tuple[str, ...] = ()
    policy_estimators: tuple[str, ...] = ()
    """Those that need no gradient of the reward, and noise in the sampler instead."""
    serial_estimators: tuple[str, ...] = ()
    """Those that can backpropagate one step at a time."""
    group_rewards: tuple[str, ...] = ()
    """Those that compare the images of a prompt with one another."""
    canvas_rewards: tuple[str, ...] = ()
    """Those that look at the picture that a prompt comes with."""
    estimator_options: Mapping[str, Section] = field(default_factory=dict)
    """Name -> what its section ``options`` takes."""
    reward_options: Mapping[str, Section] = field(default_factory=dict)


@dataclass(frozen=True)
class Clash:
    """A fault that pydantic cannot see in one value."""

    where: str
    """Dotted path of the value it is reported at."""
    what: str
    remedy: str
    others: tuple[str, ...] = ()
    """Dotted paths of what else decides it, sections included."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Everything that decides it."""
        return (self.where, *self.others)


@dataclass(frozen=True)
class Together:
    """Settings that one rule reads. A space is tried over the product of those of each rule that are searched in it."""

    paths: tuple[str, ...]
    """Dotted; ``*`` is a reward's or another free name and ``?`` an option's, the same throughout, and ``**`` that of
    every reward."""
    divisors: tuple[str, ...] = ()
    """Of these every whole number of a range is tried; of others the ends and the second value, as bounds and multiples
    of a number hold in between if they hold there."""
    only: tuple[float | str, ...] = ()
    """Where only these values can break the rule."""


RULES = (
    Together(("sampler.steps", "sampler.base_steps", "estimator.k")),
    Together(("sampler.height", "sampler.width")),
    Together(("sampler.rule", "sampler.eta")),
    Together(
        ("sampler.steps", "sampler.attention.steps", "sampler.attention.strength", "sampler.attention.iterations")
    ),
    Together(("sampler.guidance", "sampler.negative")),
    Together(("model.quantise", "model.lora.dora")),
    Together(("model.adapter.kind", "model.lora.*")),
    Together(("model.adapter.kind", "model.basis.corners", "model.basis.centre")),
    Together(("model.adapter.kind", "estimator.name")),
    Together(("model.adapter.kind", "mixture.method")),
    Together(("model.adapter.kind", "rewards.**.weight"), only=(0.0, "basis")),
    Together(("model.adapter.kind", "model.conditioning.styled", "sampler.attention.strength")),
    Together(("model.adapter.kind", "model.conditioning.styled", "regularize.attention")),
    Together(("model.adapter.kind", "model.prompt.template", "sampler.attention.strength")),
    Together(("model.adapter.kind", "model.prompt.template", "regularize.attention")),
    Together(("model.adapter.kind", "model.prompt.words.*")),
    Together(("model.adapter.kind", "model.prompt.template", "model.prompt.words.*")),
    Together(("model.adapter.kind", "sampler.base_steps")),
    Together(("optim.batch", "prompts.images_per_prompt"), divisors=("prompts.images_per_prompt",)),
    Together(("optim.batch", "optim.micro_batch", "mixture.method")),
    Together(("model.adapter.kind", "optim.steps", "optim.queries", "optim.batch")),
    Together(("rewards.**.weight",), only=(0.0,)),
    Together(("rewards.*.loss", "rewards.*.target")),
    Together(("rewards.*.relative.positive", "rewards.*.relative.negative", "rewards.*.relative.k")),
    Together(("rewards.*.reward", "rewards.*.relative.positive")),
    Together(("estimator.name", "sampler.eta")),
    Together(("estimator.name", "regularize.flatness_weights", "regularize.flatness_image")),
    Together(("estimator.name", "mixture.method")),
    Together(("estimator.name", "estimator.checkpoint")),
    Together(("estimator.name", "estimator.k")),
    Together(("estimator.name", "estimator.draw")),
    Together(("estimator.name", "estimator.std")),
    Together(("estimator.name", "estimator.options.?")),
    Together(("rewards.*.reward", "rewards.*.options.?")),
    Together(("estimator.name", "rewards.*.reward", "rewards.*.weight")),
    Together(
        (
            "prompts.images_per_prompt",
            "optim.batch",
            "optim.micro_batch",
            "rewards.*.reward",
            "rewards.*.weight",
            "rewards.*.micro_batch",
        ),
        divisors=("prompts.images_per_prompt",),
    ),
)
"""What may be searched of what each rule of ``clashes.py`` reads. A rule whose clash names other settings together
stands here too, or a space could be accepted that has a point which breaks it."""
