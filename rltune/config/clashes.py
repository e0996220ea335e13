"""The rules that span an experiment's values: every clash between them, with what to do."""

from collections.abc import Iterator
from pathlib import Path

from rltune.config.adapter_clashes import adapter_clashes
from rltune.config.attention_clashes import attention_clashes
from rltune.config.options import option_clashes
from rltune.config.prompts_section import BUILTIN_PROMPTS
from rltune.config.rules import Clash, Known
from rltune.config.sections import DISTANCES, JOINT_SHARES
from rltune.config.settings import Settings
from rltune.registry import suggest


def find_clashes(config: Settings, known: Known, *, must_find_files: bool) -> list[Clash]:
    """Return everything that does not go together in an experiment whose values are each right by themselves."""
    clashes = [*_clashes(config), *_unknown_names(config, known)]
    clashes += [*_estimator_clashes(config, known), *group_clashes(config, known), *_taken_names(config, known)]
    clashes += [*_executor_clashes(config, known), *option_clashes(config, known), *_task_clashes(config, known)]
    clashes += [*adapter_clashes(config, known), *attention_clashes(config)]
    if must_find_files:
        clashes += _missing_files(config)
    return clashes


def _clashes(config: Settings) -> Iterator[Clash]:
    yield from _sampler_clashes(config)
    if config.model.lora.dora and config.model.quantise != "none":
        what = f"DoRA reads the norms of weights, which model.quantise: {config.model.quantise} packs, got true"
        yield Clash("model.lora.dora", what, "delete one of them", ("model.quantise",))
    yield from _worker_clashes(config)
    yield from _batch_clashes(config)
    yield from _reward_clashes(config)
    if config.mixture.method == "non_dominated":
        yield from _splitting_clashes(
            config, ("mixture.method",), "non_dominated compares the images of a whole batch", 0
        )
    if config.search.points and config.search.sampler == "grid":
        what = f"a grid tries every combination in turn, got {len(config.search.points)} to try first"
        yield Clash("search.points", what, "delete them, or take another sampler", ("search.sampler",))
    yield from _name_clashes(config)
    yield from _constraint_clashes(config)
    yield from _stopping_clashes(config)
    if config.evaluate.confirm == 0 and (asked := [name for name, value in config.sweep if value]):
        what = "mixtures are measured on the fresh prompts of evaluate.confirm, which is 0, got true"
        yield Clash(f"sweep.{asked[0]}", what, "write evaluate.confirm: auto, or delete it", ("evaluate.confirm",))


def _sampler_clashes(config: Settings) -> Iterator[Clash]:
    """What does not go together in the section ``sampler``; what is the model's own is not known everywhere."""
    sampler, k = config.sampler, config.estimator.k
    if sampler.steps is not None:
        num_steps = sampler.steps - sampler.base_steps
        if num_steps < 1:
            what = f"must leave at least one of the {sampler.steps} steps (sampler.steps), got {sampler.base_steps}"
            yield Clash("sampler.base_steps", what, "lower it", ("sampler.steps",))
        elif k is not None and k > num_steps:
            minus = f" minus {sampler.base_steps} base steps" if sampler.base_steps else ""
            what = f"K must not exceed the {sampler.steps} sampling steps (sampler.steps){minus}, got {k}"
            others = ("sampler.steps", "sampler.base_steps")
            yield Clash("estimator.k", what, f"lower it to {num_steps} or raise sampler.steps", others)
    if sampler.eta is not None and sampler.eta > 1 and sampler.rule == "posterior":
        what = f"rule: posterior takes an eta from 0 to 1, got {sampler.eta:g}"
        yield Clash("sampler.eta", what, "lower it, or write rule: flow_grpo for a flow model", ("sampler.rule",))
    if sampler.eta == 0 and sampler.rule == "flow_grpo":
        what = "rule: flow_grpo says how noise is added, got eta 0, which adds none"
        yield Clash("sampler.eta", what, "write eta: 0.7, or delete the rule", ("sampler.rule",))
    if sampler.negative and sampler.guidance is not None and sampler.guidance <= 1:
        what = f"no negative prompt is read where sampler.guidance is 1 or less, got {sampler.negative!r}"
        yield Clash("sampler.negative", what, "raise sampler.guidance, or delete it", ("sampler.guidance",))
    if (sampler.height is None) != (sampler.width is None):
        given, other = ("height", "width") if sampler.width is None else ("width", "height")
        what = f"needs sampler.{other} beside it, got {sampler.height or sampler.width} alone"
        yield Clash(f"sampler.{given}", what, "give both or neither", (f"sampler.{other}",))


def _task_clashes(config: Settings, known: Known) -> Iterator[Clash]:
    """Rewards that look at the picture that a prompt comes with, where it comes with none or is changed."""
    named = [(f"rewards.{name}", config.kind_of(name)) for name in config.rewards]
    named += [(f"evaluate.judges.{i}", name) for i, name in enumerate(config.evaluate.judges)]
    for where, kind in named:
        if kind in known.canvas_rewards and config.task != "inpaint":
            what = f"{kind} compares an image with what was given of it, got task: {config.task}"
            yield Clash(where, what, "write task: inpaint, or take another reward", ("task", f"{where}.reward"))
    for name, reward in config.rewards.items():
        if config.kind_of(name) in known.canvas_rewards and reward.relative.positive is not None:
            where = f"rewards.{name}.relative.positive"
            what = f"{config.kind_of(name)} reads no words, got {reward.relative.positive!r}"
            yield Clash(where, what, "leave relative out", (f"rewards.{name}.reward",))


def _executor_clashes(config: Settings, known: Known) -> Iterator[Clash]:
    name, fewest = config.resources.executor, config.resources.min_workers
    if fewest is not None and name in known.fixed_size_executors:
        what = f"workers of the {name} executor neither come nor go, got {fewest}"
        able = " or ".join(other for other in known.executors if other not in known.fixed_size_executors)
        yield Clash("resources.min_workers", what, f"leave it out, or write executor: {able}", ("resources.executor",))


def _worker_clashes(config: Settings) -> Iterator[Clash]:
    resources = config.resources
    gpus, fewest, workers = resources.gpus_per_worker, resources.min_workers, resources.workers
    if gpus != "auto" and gpus > 1 and gpus != int(gpus):
        yield Clash("resources.gpus_per_worker", f"more than one GPU must be a whole number, got {gpus}", "round it up")
    if resources.rewards_on == "second_gpu" and (gpus == "auto" or gpus < 2):
        what = f"a worker has no second GPU where resources.gpus_per_worker is {gpus}"
        yield Clash("resources.rewards_on", what, "write gpus_per_worker: 2", ("resources.gpus_per_worker",))
    if resources.nodes == "autoscale":
        for name, value in (("concurrent", resources.concurrent), ("gpus_per_worker", gpus)):
            if value == "auto":
                what = "cannot be auto where nodes are yet to come, which would say it"
                yield Clash(f"resources.{name}", what, "write a number", ("resources.nodes",))
    if fewest is None:
        return
    if fewest > workers:
        what = f"must not exceed resources.workers, {workers}, got {fewest}"
        yield Clash("resources.min_workers", what, "lower it or raise resources.workers", ("resources.workers",))
    if gpus != "auto" and 0 < gpus < 1:  # Ray 2.60 counts the workers that fit on the GPUs of a node as one number
        what = f"workers that come and go need whole GPUs, got {gpus} of one"
        remedy = "write 1, or leave resources.min_workers out"
        yield Clash("resources.gpus_per_worker", what, remedy, ("resources.min_workers",))


def _batch_clashes(config: Settings) -> Iterator[Clash]:
    batch, workers, micro_batch = config.optim.batch, config.resources.workers, config.optim.micro_batch
    each = config.prompts.images_per_prompt
    if batch % each:
        what = f"must divide optim.batch, {batch} images, got {each}"
        yield Clash("prompts.images_per_prompt", what, "write a divisor, or another batch", ("optim.batch",))
    if batch < workers:
        what = f"must give each of the {workers} workers an image (resources.workers), got {batch}"
        yield Clash("optim.batch", what, f"write {workers} or more", ("resources.workers",))
    if micro_batch and micro_batch > batch:
        what = f"must not exceed optim.batch, {batch} images, got {micro_batch}"
        yield Clash("optim.micro_batch", what, f"write {batch} or fewer", ("optim.batch",))


def _reward_clashes(config: Settings) -> Iterator[Clash]:
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
            what = f"loss: {reward.loss} needs a target in the unit that the reward is reported in, got none"
            yield Clash(f"rewards.{name}.loss", what, "give target, or loss: linear", (where,))
        elif reward.loss == "linear" and reward.target is not None:
            what = f"a linear loss has no target, got {reward.target}"
            yield Clash(f"rewards.{name}.target", what, "write loss: hinge or loss: target", (f"rewards.{name}.loss",))
        given = {key: getattr(reward.relative, key) for key in ("positive", "negative")}
        if sum(words is None for words in given.values()) == 1:
            missing, other = sorted(given, key=lambda key: given[key] is not None)
            where = f"rewards.{name}.relative"
            what = f"needs {missing} words beside it, got {given[other]!r} alone"
            yield Clash(f"{where}.{other}", what, "give both or neither", (f"{where}.{missing}",))
        elif not any(given.values()) and reward.relative.k > 0:
            where = f"rewards.{name}.relative"
            what = f"needs positive and negative words, without which it plays no part, got {reward.relative.k}"
            yield Clash(f"{where}.k", what, "give both, or delete it", (f"{where}.positive", f"{where}.negative"))


def _estimator_clashes(config: Settings, known: Known) -> Iterator[Clash]:
    name = config.estimator.name
    if known.estimators and name not in known.estimators:
        return
    if name in known.policy_estimators:
        yield from _policy_clashes(config)
    elif known.policy_estimators:
        for reward, weight in config.weights.items():
            kind = config.kind_of(reward)
            if weight > 0 and kind in known.rewards_without_gradient:
                what = f"{name} backpropagates rewards, and {kind!r} has no gradient"
                able = ", ".join(known.policy_estimators)
                remedy = f"give it weight 0 to watch it only, or take an estimator that needs none: {able}"
                others = ("estimator.name", f"rewards.{reward}", f"rewards.{reward}.reward")
                yield Clash(f"rewards.{reward}.weight", what, remedy, others)
    if config.estimator.checkpoint == "serial" and known.serial_estimators and name not in known.serial_estimators:
        what = f"serial mode needs detached inputs, which {name} has not, got 'serial'"
        able = ", ".join(known.serial_estimators)
        yield Clash("estimator.checkpoint", what, f"take auto or always, or one of {able}", ("estimator.name",))


def _policy_clashes(config: Settings) -> Iterator[Clash]:
    """What does not go with estimators that sample, score, and compare, and backpropagate no reward."""
    name = config.estimator.name
    if config.sampler.eta == 0:
        what = f"{name} learns from the noise of sampling, got eta 0"
        yield Clash("sampler.eta", what, "write eta: 1.0", ("estimator.name",))
    if config.regularize.flatness_weights or config.regularize.flatness_image:
        key = "flatness_weights" if config.regularize.flatness_weights else "flatness_image"
        what = f"{name} has no gradient of the reward to be flat in, got {getattr(config.regularize, key)}"
        yield Clash(f"regularize.{key}", what, "set it to 0", ("estimator.name",))
    if config.mixture.method in ("non_dominated", "gradient_balance", "min_norm"):
        what = f"weighs gradients of rewards, of which {name} uses none, got {config.mixture.method!r}"
        yield Clash("mixture.method", what, "take sum, chebyshev or win_rate", ("estimator.name",))
    if config.resources.prefix_precision != "same":
        what = f"{name} learns from how likely each sampled step was, and must sample in the arithmetic it scores in"
        remedy = "delete it; resources.precision: bf16 runs sampling and scoring alike"
        what = f"{what}, got {config.resources.prefix_precision!r}"
        yield Clash("resources.prefix_precision", what, remedy, ("estimator.name",))


def _splitting_clashes(config: Settings, deciding: tuple[str, ...], what: str, group: int) -> Iterator[Clash]:
    """Batches that are split where images must stay together: all of a batch, or groups of some."""
    batch, workers, micro_batch = config.optim.batch, config.resources.workers, config.optim.micro_batch
    paths = ("optim.batch", "optim.micro_batch", "resources.workers")
    if not group:
        largest = min(-(-batch // workers), micro_batch or batch)
        if largest < batch:
            remedy = "leave optim.micro_batch out and resources.workers at 1, or take another method"
            yield Clash(deciding[0], f"{what}, got {batch} in parts of {largest}", remedy, paths)
        return
    if batch % group or batch < workers:
        return  # a fault by itself
    others = ("prompts.images_per_prompt", *deciding, *paths)
    if batch // group < workers:  # whole groups are what workers get
        remedy = f"let it be {workers * group} or more, or lower resources.workers"
        yield Clash("optim.batch", f"{what}, got {batch // group} prompts for {workers} workers", remedy, others)
    elif micro_batch and micro_batch % group:
        remedy = f"let it be a multiple of {group} (prompts.images_per_prompt)"
        yield Clash("optim.micro_batch", f"{what}, got {micro_batch} images a worker at a time", remedy, others)


def group_clashes(config: Settings, known: Known) -> Iterator[Clash]:
    """Yield what does not suit rewards that compare the images of a prompt."""
    each = config.prompts.images_per_prompt
    for name, reward in config.rewards.items():
        kind, where = config.kind_of(name), f"rewards.{name}"
        if kind not in known.group_rewards:
            continue
        deciding = (f"{where}.weight", f"{where}.reward", where)
        if reward.weight > 0 and each < 2:
            what = f"{kind} compares the images of a prompt with one another, got {each} of each"
            yield Clash("prompts.images_per_prompt", what, "write 2 or more", deciding)
        if reward.weight > 0 and config.evaluate.images_per_prompt < 2:
            what = f"{kind} compares the images of a prompt with one another, got 1 of each"
            yield Clash("evaluate.images_per_prompt", what, "write 2 or more", deciding)
        if reward.weight > 0:
            what = f"{kind} needs the images of a prompt together"
            yield from _splitting_clashes(config, deciding, what, each)
        if reward.micro_batch is not None:
            what = f"{kind} compares images with one another, which cannot be split, got {reward.micro_batch}"
            yield Clash(f"{where}.micro_batch", what, "leave it out", (f"{where}.reward", where))


def _name_clashes(config: Settings) -> Iterator[Clash]:
    """Objectives and constraints that nothing measures, and names that stand in a list twice."""
    asked = dict.fromkeys((*config.rewards, *config.evaluate.judges))
    has_scores = any(name not in (*DISTANCES, *JOINT_SHARES) for name in config.objective_names)
    measured = tuple(name for name in asked if name not in JOINT_SHARES) + (JOINT_SHARES if has_scores else ())
    named = [(f"objectives.{i}", name) for i, name in enumerate(config.objectives)]
    named += [(f"constraints.{name}", name) for name in config.constraints]
    for where, name in named:
        if name not in measured:
            remedy = f"name a reward or a judge, or add it to evaluate.judges; {suggest(name, measured)}"
            yield Clash(where, f"nothing measures this, got {name!r}", remedy, ("rewards", "evaluate.judges"))
    select = config.evaluate.select
    if select not in ("last", *measured):
        remedy = f"write last, or name a reward or a judge; {suggest(select, ('last', *measured))}"
        what = f"nothing measures this, got {select!r}"
        yield Clash("evaluate.select", what, remedy, ("rewards", "evaluate.judges"))
    for where, names in (("objectives", config.objectives), ("evaluate.judges", config.evaluate.judges)):
        for i, name in enumerate(names):
            if name in names[:i]:
                yield Clash(f"{where}.{i}", f"stands here twice, got {name!r}", "delete one")


def _taken_names(config: Settings, known: Known) -> Iterator[Clash]:
    """Names of rewards under which something else is reported."""
    for name in config.rewards:
        other, _, ending = name.rpartition("_")
        is_derived = ending in ("z", "se") and (other in config.rewards or other in known.judges)
        if name == "reward" or name in known.judges or is_derived:
            remedy = f"call it something else, as in my_{name}: {{reward: {config.kind_of(name)}}}"
            what = f"something else is reported under this name, got {name!r}"
            yield Clash(f"rewards.{name}", what, remedy)


def _constraint_clashes(config: Settings) -> Iterator[Clash]:
    for name, bound in config.constraints.items():
        where = f"constraints.{name}"
        keys = tuple(f"{where}.{key}" for key in ("min_ratio_to_base", "min", "max"))
        if bound.min_ratio_to_base is None and bound.min is None and bound.max is None:
            yield Clash(where, "needs a bound, got none", "give min_ratio_to_base, min or max", keys)
        elif bound.min_ratio_to_base is not None and name in JOINT_SHARES:
            what = f"the base model's {name} is 0, got {bound.min_ratio_to_base:g} times that"
            yield Clash(keys[0], what, "write min or max in its place")
        elif bound.min is not None and bound.max is not None and bound.min > bound.max:
            yield Clash(keys[1], f"must not be above max {bound.max}, got {bound.min}", "swap them", keys[2:])


def _stopping_clashes(config: Settings) -> Iterator[Clash]:
    """Rules that could never stop anything."""
    grace, every = config.search.grace, config.evaluate.every
    if config.search.prune and config.first_rung >= config.num_rounds > 0:
        where = "evaluate.every" if grace is None else "search.grace"
        what = (
            f"a trial has ended at step {config.num_rounds}, before any are compared, got {where} {config.first_rung}"
        )
        remedy = f"lower {where}, or set search.prune: false"
        others = ("optim.steps", "optim.queries", "optim.batch", "search.prune", "model.adapter.kind")
        yield Clash(where, what, remedy, ("search.grace", *others) if grace is None else others)
    elif config.search.prune and grace is not None and grace % every:
        what = f"must be a multiple of evaluate.every, {every} steps, got {grace}"
        yield Clash("search.grace", what, f"write {(grace // every + 1) * every}", ("evaluate.every", "search.prune"))
    if config.stop.broken_constraint is not None and not config.constraints:
        what = f"there is no constraint to break, got {config.stop.broken_constraint}"
        yield Clash("stop.broken_constraint", what, "name one under constraints, or leave it out", ("constraints",))
    if config.stop.gpu_hours is not None and config.resources.gpus_per_worker == 0:
        what = f"trials that use no GPU spend no GPU-hours, got {config.stop.gpu_hours:g}"
        yield Clash("stop.gpu_hours", what, "write stop.hours instead", ("resources.gpus_per_worker",))


def _unknown_names(config: Settings, known: Known) -> Iterator[Clash]:
    checks: list[tuple[str, str, str, tuple[str, ...], tuple[str, ...]]] = []
    for name, reward in config.rewards.items():
        where = f"rewards.{name}.reward" if reward.reward else f"rewards.{name}"
        if ":" not in (reward.reward or ""):
            checks.append(("reward", where, config.kind_of(name), known.rewards, (f"rewards.{name}.reward",)))
    checks.append(("estimator", "estimator.name", config.estimator.name, known.estimators, ()))
    checks.append(("adapter", "model.adapter.kind", config.model.adapter.kind, known.adapters, ()))
    checks.append(("search sampler", "search.sampler", config.search.sampler, known.samplers, ()))
    checks.append(("executor", "resources.executor", config.resources.executor, known.executors, ()))
    judges = (*known.judges, *known.rewards) if known.judges else ()
    checks += [("judge", f"evaluate.judges.{i}", name, judges, ()) for i, name in enumerate(config.evaluate.judges)]
    for kind, where, name, names, others in checks:
        if names and name not in names:
            yield Clash(where, f"unknown {kind}, got {name!r}", suggest(name, names), others)


def _missing_files(config: Settings) -> Iterator[Clash]:
    for key, value in (("train", config.prompts.train), ("eval", config.prompts.eval)):
        is_there = Path.exists if config.task == "inpaint" else Path.is_file  # pictures may be a folder
        if isinstance(value, str) and value not in BUILTIN_PROMPTS and not is_there(Path(value)):
            remedy = (
                f"give a text file with one prompt a line, a list, or a set by name; {suggest(value, BUILTIN_PROMPTS)}"
            )
            yield Clash(f"prompts.{key}", f"no such file, got {value!r}", remedy)
    for name, reward in config.rewards.items():
        reference = reward.trust.reference
        if reference not in (None, "builtin") and not Path(reference).expanduser().exists():
            what = f"no such file or folder, got {reference!r}"
            remedy = "give a folder of images, a safetensors file, or builtin"
            yield Clash(f"rewards.{name}.trust.reference", what, remedy)
