"""A whole experiment, every value concrete, and the rules that span its sections."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from rltune.config.base import EmptyIfNone, Int, StrictModel
from rltune.config.sections import (
    BUILTIN_PROMPTS,
    ConstraintConfig,
    EstimatorConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    PromptsConfig,
    RegularizeConfig,
    ResourcesConfig,
    RewardConfig,
    SamplerConfig,
    SearchConfig,
    Text,
)
from rltune.registry import suggest

WHOLE_SWEEP = (
    "name",
    "model.base",
    "model.revision",
    "prompts.eval",
    "evaluate",
    "objectives",
    "constraints",
    "search",
    "resources",
)
"""What all trials share, or they could not be compared: no distribution may stand here or below."""


@dataclass(frozen=True)
class Known:
    """The names that the caller's registries know; an empty kind is not checked."""

    rewards: tuple[str, ...] = ()
    estimators: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    samplers: tuple[str, ...] = ()
    rewards_without_gradient: tuple[str, ...] = ()
    policy_estimators: tuple[str, ...] = ()
    """Those that need no gradient of the reward, and noise in the sampler instead."""
    serial_estimators: tuple[str, ...] = ()
    """Those that can backpropagate one step at a time."""


@dataclass(frozen=True)
class Context:
    """What a validation may look at besides the experiment: pydantic's ``context``."""

    known: Known = Known()
    must_find_files: bool = False
    """Check that prompt files exist; only where the user is, a worker may run elsewhere."""


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


class RunConfig(StrictModel):
    """An experiment in which every value is concrete: one training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        "experiment",
        json_schema_extra={"x-expects": "1 to 100 letters, digits, '.', '_' or '-', a letter or digit first"},
    )
    """Name of the run and of its folder; the file's name if left out."""
    model: ModelConfig = ModelConfig()
    """What is fine-tuned."""
    prompts: PromptsConfig = PromptsConfig()
    """Where prompts come from."""
    sampler: SamplerConfig = SamplerConfig()
    """How an image is drawn."""
    estimator: EstimatorConfig = EstimatorConfig()
    """How the reward's gradient is estimated."""
    rewards: Annotated[dict[str, RewardConfig], EmptyIfNone] = Field({})
    """What is trained on, by name; at least one."""
    optim: OptimConfig = OptimConfig()
    """The optimiser."""
    regularize: RegularizeConfig = RegularizeConfig()
    """What keeps the model honest while it follows the reward."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured on held-out prompts."""
    objectives: tuple[Text, ...] = ()
    """What the Pareto front is over: rewards or judges; left out, every reward."""
    constraints: Annotated[dict[str, ConstraintConfig], EmptyIfNone] = Field({})
    """What a trial must keep to be feasible, by reward or judge."""
    search: SearchConfig = SearchConfig()
    """How the distributions are searched."""
    resources: ResourcesConfig = ResourcesConfig()
    """What a trial runs on."""
    seed: Int = Field(0, ge=0, lt=2**32)
    """Seed of training: prompts, noise, K."""

    @property
    def objective_names(self) -> tuple[str, ...]:
        """The objectives; every reward if none are named."""
        return self.objectives or tuple(self.rewards)

    @property
    def num_rounds(self) -> int:
        """Greatest number of rounds a run can take: every image costs at least one reward query."""
        queries = self.optim.queries
        return self.optim.steps if queries is None else min(self.optim.steps, -(-queries // self.optim.batch))

    @property
    def weights(self) -> Mapping[str, float]:
        """Reward name -> weight."""
        return {name: reward.weight for name, reward in self.rewards.items()}

    @model_validator(mode="after")
    def _sections_fit(self, info: ValidationInfo) -> Self:
        context = info.context if isinstance(info.context, Context) else Context()
        clashes = [*_clashes(self), *_unknown_names(self, context.known), *_not_built(self)]
        clashes += _estimator_clashes(self, context.known)
        if context.must_find_files:
            clashes += _missing_files(self)
        if clashes:
            text = "\n".join(f"{clash.where}: {clash.what}; {clash.remedy}" for clash in clashes)
            raise PydanticCustomError("clash", "{text}", {"text": text, "clashes": clashes})
        return self


def _clashes(config: RunConfig) -> Iterator[Clash]:
    k, base_steps = config.estimator.k, config.sampler.base_steps
    num_steps = config.sampler.steps - base_steps
    if num_steps < 1:
        what = f"must leave at least one of the {config.sampler.steps} steps (sampler.steps), got {base_steps}"
        yield Clash("sampler.base_steps", what, "lower it", ("sampler.steps",))
    elif k is not None and k > num_steps:
        minus = f" minus {base_steps} base steps" if base_steps else ""
        what = f"K must not exceed the {config.sampler.steps} sampling steps (sampler.steps){minus}, got {k}"
        others = ("sampler.steps", "sampler.base_steps")
        yield Clash("estimator.k", what, f"lower it to {num_steps} or raise sampler.steps", others)
    height, width = config.sampler.height, config.sampler.width
    if (height is None) != (width is None):
        given, other = ("height", "width") if width is None else ("width", "height")
        what = f"needs sampler.{other} beside it, got {height or width} alone"
        yield Clash(f"sampler.{given}", what, "give both or neither", (f"sampler.{other}",))
    gpus = config.resources.gpus_per_worker
    if gpus != "auto" and gpus > 1 and gpus != int(gpus):
        yield Clash("resources.gpus_per_worker", f"more than one GPU must be a whole number, got {gpus}", "round it up")
    yield from _batch_clashes(config)
    yield from _reward_clashes(config)
    yield from _name_clashes(config)
    yield from _constraint_clashes(config)


def _batch_clashes(config: RunConfig) -> Iterator[Clash]:
    batch, workers, micro_batch = config.optim.batch, config.resources.workers, config.optim.micro_batch
    each = config.prompts.images_per_prompt
    if batch % each:
        what = f"must divide optim.batch, {batch} images, got {each}"
        yield Clash("prompts.images_per_prompt", what, "write a divisor, or another batch", ("optim.batch",))
    share, rest = divmod(batch, workers)
    if rest:
        what = f"must be a multiple of the {workers} workers (resources.workers), got {batch}"
        yield Clash("optim.batch", what, f"write {(share + 1) * workers}", ("resources.workers",))
    elif micro_batch and share % micro_batch:
        what = f"must divide a worker's share of the batch, {batch} / {workers} = {share} images, got {micro_batch}"
        fitting = ", ".join(str(size) for size in range(1, share + 1) if share % size == 0)
        yield Clash("optim.micro_batch", what, f"write one of {fitting}", ("optim.batch", "resources.workers"))


def _reward_clashes(config: RunConfig) -> Iterator[Clash]:
    if not config.rewards:
        remedy = "name at least one: rewards: {aesthetic: {weight: 1.0}}"
        yield Clash("rewards", "there is nothing to train on, got no reward", remedy, ("rewards",))
    elif not any(config.weights.values()):
        first, *others = (f"rewards.{name}.weight" for name in config.rewards)
        what = "no reward has a positive weight, got 0 for every one"
        yield Clash(first, what, "raise at least one", (*others, "rewards"))
    for name, reward in config.rewards.items():
        if reward.loss != "linear" and reward.target is None:
            where = f"rewards.{name}.target"
            what = f"loss: {reward.loss} needs a target in the reward's own unit, got none"
            yield Clash(f"rewards.{name}.loss", what, "give target, or loss: linear", (where,))
        elif reward.loss == "linear" and reward.target is not None:
            what = f"a linear loss has no target, got {reward.target}"
            yield Clash(f"rewards.{name}.target", what, "write loss: hinge or loss: target", (f"rewards.{name}.loss",))


def _estimator_clashes(config: RunConfig, known: Known) -> Iterator[Clash]:
    name = config.estimator.name
    if known.estimators and name not in known.estimators:
        return
    if name in known.policy_estimators:
        if config.sampler.eta == 0:
            what = f"{name} learns from the noise of sampling, got eta 0"
            yield Clash("sampler.eta", what, "write eta: 1.0", ("estimator.name",))
        if config.regularize.flatness_weights or config.regularize.flatness_image:
            key = "flatness_weights" if config.regularize.flatness_weights else "flatness_image"
            what = f"{name} has no gradient of the reward to be flat in, got {getattr(config.regularize, key)}"
            yield Clash(f"regularize.{key}", what, "set it to 0", ("estimator.name",))
    elif known.policy_estimators:
        for reward in known.rewards_without_gradient:
            if config.weights.get(reward, 0) > 0:
                what = f"{name} backpropagates rewards, and {reward!r} has no gradient"
                able = ", ".join(known.policy_estimators)
                remedy = f"give it weight 0 to watch it only, or take an estimator that needs none: {able}"
                yield Clash(f"rewards.{reward}.weight", what, remedy, ("estimator.name", f"rewards.{reward}"))
    if config.estimator.checkpoint == "serial" and known.serial_estimators and name not in known.serial_estimators:
        what = f"serial mode needs detached inputs, which {name} has not, got 'serial'"
        able = ", ".join(known.serial_estimators)
        yield Clash("estimator.checkpoint", what, f"take auto or always, or one of {able}", ("estimator.name",))


def _name_clashes(config: RunConfig) -> Iterator[Clash]:
    """Objectives and constraints that nothing measures, and names that stand in a list twice."""
    measured = tuple(dict.fromkeys((*config.rewards, *config.evaluate.judges)))
    named = [(f"objectives.{i}", name) for i, name in enumerate(config.objectives)]
    named += [(f"constraints.{name}", name) for name in config.constraints]
    for where, name in named:
        if name not in measured:
            remedy = f"name a reward or a judge, or add it to evaluate.judges; {suggest(name, measured)}"
            yield Clash(where, f"nothing measures this, got {name!r}", remedy, ("rewards", "evaluate.judges"))
    for where, names in (("objectives", config.objectives), ("evaluate.judges", config.evaluate.judges)):
        for i, name in enumerate(names):
            if name in names[:i]:
                yield Clash(f"{where}.{i}", f"stands here twice, got {name!r}", "delete one")


def _constraint_clashes(config: RunConfig) -> Iterator[Clash]:
    for name, bound in config.constraints.items():
        where = f"constraints.{name}"
        keys = tuple(f"{where}.{key}" for key in ("min_ratio_to_base", "min", "max"))
        if bound.min_ratio_to_base is None and bound.min is None and bound.max is None:
            yield Clash(where, "needs a bound, got none", "give min_ratio_to_base, min or max", keys)
        elif bound.min is not None and bound.max is not None and bound.min > bound.max:
            yield Clash(keys[1], f"must not be above max {bound.max}, got {bound.min}", "swap them", keys[2:])


def _unknown_names(config: RunConfig, known: Known) -> Iterator[Clash]:
    checks = [("reward", f"rewards.{name}", name, known.rewards) for name in config.rewards]
    checks.append(("estimator", "estimator.name", config.estimator.name, known.estimators))
    checks.append(("search sampler", "search.sampler", config.search.sampler, known.samplers))
    judges = (*known.judges, *known.rewards) if known.judges else ()
    checks += [("judge", f"evaluate.judges.{i}", name, judges) for i, name in enumerate(config.evaluate.judges)]
    for kind, where, name, names in checks:
        if names and name not in names:
            yield Clash(where, f"unknown {kind}, got {name!r}", suggest(name, names))


def _not_built(config: RunConfig) -> Iterator[Clash]:
    if config.search.prune:
        yield Clash("search.prune", "pruning is not available yet, got true", "set prune: false")
    if config.resources.executor != "train":
        what = f"this executor is not available yet, got {config.resources.executor!r}"
        yield Clash("resources.executor", what, "set executor: train")


def _missing_files(config: RunConfig) -> Iterator[Clash]:
    for key, value in (("train", config.prompts.train), ("eval", config.prompts.eval)):
        if isinstance(value, str) and value not in BUILTIN_PROMPTS and not Path(value).is_file():
            remedy = (
                f"give a text file with one prompt a line, a list, or a set by name; {suggest(value, BUILTIN_PROMPTS)}"
            )
            yield Clash(f"prompts.{key}", f"no such file, got {value!r}", remedy)
