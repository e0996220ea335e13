"""What can be known to be wrong with an experiment before anything starts, without weights: all of it at once.

Paths must be readable where the command runs. What lies in this machine's caches says nothing of the nodes of a cluster
that is attached to, so that there only paths are looked at.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rltune.config.distributions import Choice, IntRange
from rltune.config.experiment import RunConfig
from rltune.config.load import Experiment
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import unfit_targets
from rltune.diffusion.outline import INDEX, find_pipeline, load_outline
from rltune.diffusion.quantise import check_layers, check_quantiser
from rltune.errors import ExperimentError, Fault, RltuneError, RunError, UnknownNameError, UserError
from rltune.orchestration.last_step import last_step_note
from rltune.rewards.base import REWARDS
from rltune.rewards.weights import WeightsFile, check_hub, explain, format_size, is_offline
from rltune.runs.layout import RunFolder
from rltune.runs.metrics import JUDGES
from rltune.runs.record import read_record, with_own_prompts
from rltune.training.adapters.base import adapter_of
from rltune.training.canvases import SETS, check_pictures, prompt_set
from rltune.training.prompts import PromptSet, cut_in_words
from rltune.training.rewards import check_reward, try_reward
from rltune.training.sampling import image_shape, make_sampler
from rltune.training.setup import check_options, make_estimator
from rltune.training.tracking import check_trackers

OWN_WEIGHTS = frozenset({"weights", "head", "model", "clip", "vocab"})
"""Options that name weights other than the published ones."""


@dataclass(frozen=True)
class Inputs:
    """What an experiment names, as far as it can be read before anything starts."""

    prompts: Mapping[str, PromptSet]
    """``prompts.train`` and ``prompts.eval``, searched ones at their first value -> what was read."""
    cut: Mapping[str, str] = field(default_factory=dict)
    """Prompt -> the end of it that the text encoder does not read."""
    missing: Mapping[str, tuple[WeightsFile, ...]] = field(default_factory=dict)
    """Reward -> published files that are not on this machine."""
    outline: ModelFamily | None = field(default=None, compare=False)
    """The base model without values; None where it is not on this machine."""
    notes: tuple[str, ...] = ()
    """What is not wrong, but seldom wanted."""


class Faults:
    """Messages, each once, in the order in which they came."""

    def __init__(self) -> None:
        self.found: dict[str, None] = {}

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Take an error of the user's as a fault, and go on behind the block."""
        try:
            yield
        except RltuneError as error:
            self.found[str(error)] = None

    def __len__(self) -> int:
        return len(self.found)

    def raise_any(self, source: str) -> None:
        """Raise what was found.

        Raises:
            ExperimentError: Lists every fault; there is one at least.
        """
        if self.found:
            parts = (text.partition(": ") for text in self.found)
            raise ExperimentError(source, [Fault(where, what) for where, _, what in parts])


def inspect_experiment(
    experiment: Experiment, folder: RunFolder, faults: Faults, *, is_attached: bool = False
) -> Inputs:
    """Return what an experiment names, as far as it can be read, and note what is wrong at any value that may be tried.

    Args:
        experiment: With relative paths from the current folder.
        folder: Of its run, which need not be there; the prompts of a run that was started are its own copies.
        faults: Takes what is wrong.
        is_attached: Whether it runs on a cluster that this process does not start.
    """
    with faults.noted():
        _check_grid(experiment)
    with faults.noted():
        check_trackers(experiment.shared.track)
    if experiment.shared.search.warm_start is not None:
        from rltune.search.warm_start import find_prior_run

        with faults.noted():
            find_prior_run(experiment, folder)
    _check_options(experiment, faults)
    missing = _check_weights(experiment, faults, is_attached=is_attached)
    prompts = _check_prompts(experiment, faults, folder)
    model = _check_base(experiment, faults, is_attached=is_attached)
    named = [prompt for found in prompts.values() for prompt in found.prompts]
    if model is None:
        return Inputs(prompts, missing=missing)
    negatives = [config.sampler.negative for config in experiment.corners(("sampler.negative",))]
    cut = cut_in_words(model.cut_off(negatives), negatives)
    notes = [f"sampler.negative: {cut}"] if cut else []
    beside: dict[str, list[str]] = {}
    for config in experiment.corners(("model",)):
        beside.setdefault(config.model.adapter.kind, []).extend(adapter_of(config).beside(named))
    cuts = {kind: cut_in_words(model.cut_off(others), others) for kind, others in beside.items()}
    notes += [f"model.{kind}: {cut}" for kind, cut in cuts.items() if cut]
    notes += [note for note in [last_step_note(experiment, model)] if note]
    return Inputs(prompts, model.cut_off(named), missing, model, tuple(notes))


def _check_grid(experiment: Experiment) -> None:
    if experiment.is_searched and experiment.shared.search.sampler == "grid" and experiment.grid_values is None:
        ranges = [path for path, kind in experiment.space.items() if not isinstance(kind, Choice | IntRange)]
        raise UserError(
            f"search.sampler: a grid needs a list of values, {', '.join(ranges)} are ranges; "
            "write {choice: [..]}, or take another sampler"
        )


def _check_options(experiment: Experiment, faults: Faults) -> None:
    """Check the estimator and the rewards with every value of their settings that may be tried."""
    tried: set[str] = set()
    for config in _reward_corners(experiment, "estimator", "sampler"):
        before = len(faults)
        needs_gradient = False
        with faults.noted():
            needs_gradient = make_estimator(config).needs_gradient
        for name, section in config.rewards.items():
            with faults.noted():
                check_reward(name, section, needs_gradient=needs_gradient)
                key = f"{config.kind_of(name)} {json.dumps(section.options, sort_keys=True, default=str)}"
                if key not in tried:
                    tried.add(key)
                    try_reward(name, section)
            with faults.noted():
                reference = section.trust.reference
                if reference not in (None, "builtin") and not Path(reference).exists():
                    raise UserError(
                        f"rewards.{name}.trust.reference: no such file or folder, got {reference!r}; give a folder of "
                        "images, a safetensors file, or builtin"
                    )
        if len(faults) == before:
            with faults.noted():
                check_options(config)


def _reward_corners(experiment: Experiment, *others: str) -> Iterator[RunConfig]:
    """Yield what may be tried of rewards and other sections.

    Rewards do not look at each other's values, and all their combinations would be too many.
    """
    for path in [path for path in experiment.space if path.startswith("rewards.")] or ["rewards"]:
        yield from experiment.corners((*others, path))


def _check_weights(
    experiment: Experiment, faults: Faults, *, is_attached: bool
) -> Mapping[str, tuple[WeightsFile, ...]]:
    """Return the published files that rewards need and this machine has not; a fault where they cannot come."""
    missing: dict[str, tuple[WeightsFile, ...]] = {}
    for config in _reward_corners(experiment):
        missing |= {kind: files for kind in _published(config) if (files := REWARDS.card(kind).missing)}
    if not missing or is_attached:
        return missing
    on_hub = [file for files in missing.values() for file in files if file.repo]
    try:
        if is_offline():
            raise RunError("HF_HUB_OFFLINE is set")
        if on_hub:
            check_hub(on_hub[0].repo, on_hub[0].file)
    except RunError as error:
        with faults.noted():
            raise UserError(f"rewards: {weights_in_words(missing)}, where there is a network ({error})") from error
    return missing


def _published(config: RunConfig) -> Iterable[str]:
    """Return the registered rewards whose published weights are used, of judges too.

    One that is given a path or a model of the user's own is left out, and so is a function of theirs.
    """
    kinds = [
        config.kind_of(name)
        for name, section in config.rewards.items()
        if all(section.options.get(option) is None for option in OWN_WEIGHTS)
    ]
    kinds += [judge for judge in config.evaluate.judges if judge not in JUDGES and judge not in config.rewards]
    return [kind for kind in dict.fromkeys(kinds) if kind in REWARDS.names()]


def weights_in_words(missing: Mapping[str, tuple[WeightsFile, ...]]) -> str:
    """Say which published files are not on this machine, and how they get here; empty if there are none."""
    origins: dict[str, dict[str, float]] = {}
    for files in missing.values():
        for file in files:
            origins.setdefault(file.origin, {})[file.file] = file.size_mb
    if not origins:
        return ""
    shown = [
        f"{', '.join(sizes)} of {origin} ({format_size(sum(sizes.values()))})" for origin, sizes in origins.items()
    ]
    return f"not on this machine: {'; '.join(shown)}; fetch them with: rltune models fetch {' '.join(missing)}"


def _check_prompts(experiment: Experiment, faults: Faults, folder: RunFolder) -> Mapping[str, PromptSet]:
    """Return the prompts at the first value of every distribution; check those of the others too."""
    record = read_record(folder)
    first: dict[str, PromptSet] = {}
    seen: set[str] = set()
    for config in experiment.corners(("prompts",)):
        own = with_own_prompts(config, folder, record)
        for name in SETS:
            where = f"prompts.{name}"
            if (key := f"{where} {getattr(own.prompts, name)!r}") in seen:
                continue
            seen.add(key)
            with faults.noted():
                found = prompt_set(own, name)
                first.setdefault(where, found)
                check_pictures(found.prompts)
                wanted = config.evaluate.prompts
                if where == "prompts.eval" and len(found.prompts) < wanted:
                    raise UserError(
                        f"evaluate.prompts: {wanted} prompts are wanted, but prompts.eval holds {len(found.prompts)}; "
                        "lower it or give more"
                    )
    return first


def _check_base(experiment: Experiment, faults: Faults, *, is_attached: bool) -> ModelFamily | None:
    """Return the base model without weights; None where it is not on this machine, or a fault."""
    kinds = {kind for config in experiment.corners(("model.quantise",)) if (kind := config.model.quantise) != "none"}
    for kind in kinds:
        with faults.noted():
            if not is_attached:
                check_quantiser(kind)
    model = None
    with faults.noted():
        model = _outline(experiment.shared, is_attached=is_attached)
    if model is None:
        return None
    for kind in kinds:
        with faults.noted():
            check_layers(model.network, kind)
    for config in experiment.corners(("sampler", "regularize.attention")):
        with faults.noted():
            image_shape(config, model)
        with faults.noted():
            make_sampler(config, model)
    for fault in unfit_targets(model.network, experiment.lora.targets):  # a list is not searched
        with faults.noted():
            raise UserError(f"model.lora.targets: {fault}")
    for config in experiment.corners(("model",)):
        with faults.noted():
            adapter_of(config).check(model)
    return model


def _outline(config: RunConfig, *, is_attached: bool) -> ModelFamily | None:
    base, revision = config.model.base, config.model.revision
    folder = find_pipeline(base, revision, config.model.config)
    if folder is None and not is_attached:
        check_reach(base)
    if folder is None:
        return None
    try:
        return load_outline(folder, base=base, drop=config.model.drop)
    except UserError as error:
        if isinstance(error, UnknownNameError) or base == "builtin" or Path(base).exists():
            raise
        if not is_attached:
            check_reach(base, str(error))  # what is not in the cache comes with the weights
        return None


def check_reach(base: str, why: str = "") -> None:
    """Check that there is a way to the hub, which a base model that is not here would come from, and that it gives it.

    Raises:
        UserError: There is none, or the model is gated, private or unknown there.
    """
    try:
        refusal = check_hub(base, INDEX)
    except RunError as error:
        what = why or f"model.base: no such folder, and not in the Hugging Face cache, got {base!r}"
        remedy = "" if why else f"; run 'rltune models fetch {base}' where there is a network, or name a folder"
        raise UserError(f"{what}{remedy} ({error})") from error
    if refusal is not None:
        raise UserError(f"model.base: {base!r} cannot be had: {explain(refusal, base)}") from refusal
