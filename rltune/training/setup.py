"""From an experiment to the objects a run works with, on one worker: model, sampler, rewards, prompts."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from rltune.config.adapter_clashes import adapter_clashes
from rltune.config.clashes import group_clashes
from rltune.config.experiment import RunConfig
from rltune.config.rules import Known
from rltune.config.sampling import SamplerConfig
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.lora import unfit_targets
from rltune.diffusion.sampler import Sampler
from rltune.errors import UserError
from rltune.estimators.base import ESTIMATORS, Estimator
from rltune.rewards.base import Reward
from rltune.runs.metrics import JUDGES
from rltune.runs.record import prompts_digest
from rltune.training.adapters.base import AdapterKind, adapter_of
from rltune.training.canvases import kept_form, prompt_set
from rltune.training.evaluation import ImageSet
from rltune.training.heldout import search_prompts
from rltune.training.model_cache import ModelCache
from rltune.training.rewards import check_reward, compares_images, is_own
from rltune.training.sampling import image_shape, make_sampler, settled_by
from rltune.training.streams import Stream, drawn_prompts
from rltune.training.workers import Workers

logger = logging.getLogger(__name__)

NUM_CALIBRATION_IMAGES = 32
"""Images of the first training prompts, in turn, that the unit of a reward is measured on."""

ADDED = ("attention", "embedded_guidance", "negative", "rule")
"""Settings of the sampler that count for ``base_settings`` only where they are not the default."""

EVAL_BATCH, EVAL_BATCH_LARGE = 16, 4
"""Images sampled at a time without gradient at least, where memory is not known to be short; the latter of large ones.
"""


@dataclass(frozen=True)
class Run:
    """Everything a run needs, built from its experiment on one worker."""

    config: RunConfig
    workers: Workers
    sampler: Sampler
    rewards: Mapping[str, Reward]
    estimator: Estimator
    adapter: AdapterKind
    """What is optimised; see ``rltune/training/adapters``."""
    train_prompts: tuple[str, ...]
    eval_images: ImageSet
    calibration_images: ImageSet
    latent_shape: tuple[int, int, int]
    images_together: int
    """Consecutive training images that stay on one worker."""
    max_eval_batch: int | None = None
    """Images sampled at a time without gradient at most, where more did not fit into memory before."""

    @property
    def model(self) -> ModelFamily:
        """The base model, with adapters once they are attached."""
        return self.sampler.model

    @property
    def eval_batch(self) -> int:
        """Images sampled at a time without gradient."""
        batch = max(EVAL_BATCH_LARGE if self.sampler.is_decoded_singly else EVAL_BATCH, self.micro_batch)
        return batch if self.max_eval_batch is None else min(batch, self.max_eval_batch)

    @property
    def drawn_prompts(self) -> tuple[str, ...]:
        """The training prompts that have a turn before the last step."""
        num_images = self.config.num_rounds * self.config.optim.batch
        each, num_prompts = self.config.prompts.images_per_prompt, len(self.train_prompts)
        numbers = drawn_prompts(self.config.seed, num_images, num_prompts, each)
        return tuple(self.train_prompts[number] for number in numbers)

    @property
    def local_images(self) -> range:
        """Which images of a step are this worker's; those of a prompt stay together where a reward compares them."""
        return self.workers.share(self.config.optim.batch, together=self.images_together)

    @property
    def micro_batch(self) -> int:
        """Images that are differentiated at a time on this worker, at most."""
        num_images = len(self.local_images)
        return min(self.config.optim.micro_batch or num_images, num_images)


def build_run(config: RunConfig, cache: ModelCache | None = None) -> Run:
    """Load the model and the rewards of an experiment on this worker's device.

    Args:
        config: The experiment.
        cache: What earlier runs of this process have loaded; nothing by default.

    Raises:
        UserError: Weights, prompts or a setting are not usable on this machine.
    """
    if config.resources.threads_per_worker != "auto":  # Ray has set OMP_NUM_THREADS to the worker's share
        torch.set_num_threads(config.resources.threads_per_worker)
    workers = Workers()
    if config.resources.gpus_per_worker != "auto" and 0 < config.resources.gpus_per_worker < 1:
        workers.limit_memory(config.resources.gpus_per_worker)
    check_options(config)  # before anything is loaded; what needs the model's own steps follows once they are known
    cache = cache or ModelCache()
    model = cache.model(config, workers.device)
    if faults := unfit_targets(model.network, config.model.lora.targets):
        raise UserError(f"model.lora.targets: {'; '.join(faults)}")
    config = settled_by(model, config)
    check_options(config)
    sampler = make_sampler(config, model)
    eval_images = eval_image_set(config, model)
    train_prompts = prompt_set(config, "train").prompts
    prompts = [*train_prompts, *eval_images.prompts, sampler.negative_prompt]
    adapter = adapter_of(config)
    embeddings = cache.embeddings(config, model, prompts, adapter.beside([*train_prompts, *eval_images.prompts]))
    sampler = replace(sampler, switches=adapter.switches, embeddings=embeddings)
    judges = tuple(judge for judge in config.evaluate.judges if judge not in JUDGES)
    is_apart = config.resources.rewards_on == "second_gpu"
    rewards = cache.rewards(config, judges, workers.second_gpu() if is_apart else workers.device, is_apart=is_apart)
    num_prompts, each = calibration_size(config)
    is_compared = any(compares_images(name, section) for name, section in config.rewards.items() if section.weight > 0)
    return Run(
        config=config,
        workers=workers,
        sampler=sampler,
        rewards=rewards,
        estimator=make_estimator(config),
        adapter=adapter,
        train_prompts=train_prompts,
        eval_images=eval_images,
        calibration_images=ImageSet(
            tuple(train_prompts[i % len(train_prompts)] for i in range(num_prompts)),
            each,
            eval_images.latent_shape,
            latent_stream=Stream.CALIBRATION_LATENT,
            step_stream=Stream.CALIBRATION_STEP_NOISE,
        ),
        latent_shape=eval_images.latent_shape,
        images_together=config.prompts.images_per_prompt if is_compared else 1,
    )


def calibration_size(config: RunConfig) -> tuple[int, int]:
    """Return how many prompts the unit of rewards is measured on, and with how many images of each.

    A reward that compares the images of a prompt is calibrated on as many of each as it is trained on.

    Raises:
        UserError: A reward's name is unknown, or it is the user's own and does not import.
    """
    is_compared = any(compares_images(name, section) for name, section in config.rewards.items())
    each = config.prompts.images_per_prompt if is_compared else 1
    return -(-NUM_CALIBRATION_IMAGES // each), each


def check_options(config: RunConfig) -> None:
    """Check the options of rewards and estimator against what they take; loads no weights.

    Raises:
        UserError: A name or an option is unknown, an estimator's setting is out of its range, or a reward of the
            user's own compares images that are not together.
    """
    estimator = make_estimator(config)
    for name, section in config.rewards.items():
        check_reward(name, section, needs_gradient=estimator.needs_gradient)
    # what a name says of a registered reward, only its code says of the user's own
    own = {config.kind_of(name) for name, section in config.rewards.items() if is_own(name, section)}
    compared = {config.kind_of(name) for name, section in config.rewards.items() if compares_images(name, section)}
    policies = () if estimator.needs_gradient else (config.estimator.name,)
    known = Known(group_rewards=tuple(own & compared), policy_estimators=policies)
    for clash in (*group_clashes(config, known), *adapter_clashes(config, known)):
        raise UserError(f"{clash.where}: {clash.what}; {clash.remedy}")


def make_estimator(config: RunConfig) -> Estimator:
    """Return an experiment's estimator, its settings checked against the sampling steps where their number is known.

    Raises:
        UserError: A name or an option is unknown, or a setting is out of its range.
    """
    section = config.estimator
    given = {"k": section.k, "draw": section.draw, "std": section.std}
    options = {name: value for name, value in given.items() if value is not None}
    options |= section.options
    try:
        estimator = ESTIMATORS.build(section.name, options)
        if config.sampler.steps is not None:
            estimator.check(config.sampler.steps - config.sampler.base_steps)
    except (ValueError, TypeError) as error:  # an option of another type fails where it is compared
        raise UserError(f"estimator: {section.name}: {error}") from error
    return estimator


def eval_image_set(config: RunConfig, model: ModelFamily) -> ImageSet:
    """Return the held-out images that every trial of an experiment is evaluated on.

    Raises:
        UserError: Prompts are missing, or the image size is not one the model can make.
    """
    return ImageSet(search_prompts(config), config.evaluate.images_per_prompt, image_shape(config, model))


def base_key(config: RunConfig, named: Mapping[str, str] | None = None) -> str:
    """Return a name for the measurements of the base model that this experiment shares with others like it.

    Args:
        config: The experiment.
        named: Setting -> digest of what it names; a name counts as itself where there is none.

    Raises:
        UserError: Prompts cannot be read.
    """
    return hashlib.sha256(json.dumps(base_settings(config, named), sort_keys=True).encode()).hexdigest()[:12]


def base_settings(config: RunConfig, named: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the settings that decide what is measured of the base model, in JSON's types.

    Prompts count as what they are, not as what they are called. Arguments and errors are those of ``base_key``.
    """
    named = named or {}
    parts = config.model_dump(mode="json", include={"sampler": True, "evaluate": True})
    for key in ("every", "confirm", "select"):
        del parts["evaluate"][key]
    parts["model"] = named.get("model.base") or [config.model.base, config.model.revision]
    if config.model.config is not None:
        parts["model_config"] = named.get("model.config") or config.model.config
    if config.model.drop:
        parts["model_drop"] = list(config.model.drop)
    if config.model.quantise != "none":
        parts["model_quantise"] = config.model.quantise
    train, held_out = prompt_set(config, "train").prompts, prompt_set(config, "eval").prompts
    parts["prompts"] = {
        "train": prompts_digest(kept_form(train)),
        "eval": prompts_digest(kept_form(held_out)),
    }
    if config.task != "text_to_image":
        parts["task"] = config.task
    # the user's own may compare images too; a run is read where their code is not, so nobody asks them
    if any(is_own(name, section) or compares_images(name, section) for name, section in config.rewards.items()):
        parts["prompts"]["images_per_prompt"] = config.prompts.images_per_prompt  # so is the calibration drawn
    defining = {"reward", "options", "negate", "relative"}
    parts["rewards"] = {
        name: section.model_dump(mode="json", include=defining) for name, section in config.rewards.items()
    }
    for name, section in parts["rewards"].items():
        for option in section["options"]:
            section["options"][option] = named.get(f"rewards.{name}.options.{option}", section["options"][option])
    parts["code"] = {
        setting: digest for setting, digest in named.items() if setting.endswith(".reward") or "judges" in setting
    }
    parts["sampler"]["base_steps"] = 0  # all steps are the base model's
    for name in ADDED:  # so that measurements keep the name they had before there were these
        if getattr(config.sampler, name) == SamplerConfig.model_fields[name].default:
            del parts["sampler"][name]
    parts["precision"] = [config.resources.precision, config.resources.prefix_precision]
    if config.resources.decoder_precision != "same":
        parts["precision"].append(config.resources.decoder_precision)
    return parts
