"""From an experiment to the objects a run works with, on one worker: model, sampler, rewards, prompts."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rltune.config.experiment import RunConfig
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.loading import load_model
from rltune.diffusion.sampling import PromptEmbeddings
from rltune.errors import UserError
from rltune.estimators.base import ESTIMATORS, Estimator
from rltune.rewards.base import REWARDS, Reward
from rltune.training.evaluation import JUDGES, ImageSet
from rltune.training.prompts import read_prompts
from rltune.training.step import Sampler
from rltune.training.streams import Stream
from rltune.training.workers import Workers

NUM_CALIBRATION_IMAGES = 32
"""Images of the first training prompts, in turn, that the unit of a reward is measured on."""


@dataclass(frozen=True)
class Run:
    """Everything a run needs, built from its experiment on one worker."""

    config: RunConfig
    workers: Workers
    sampler: Sampler
    rewards: Mapping[str, Reward]
    estimator: Estimator
    train_prompts: tuple[str, ...]
    eval_images: ImageSet
    calibration_images: ImageSet
    latent_shape: tuple[int, int, int]

    @property
    def model(self) -> ModelFamily:
        """The base model, with adapters once they are attached."""
        return self.sampler.model

    @property
    def eval_batch(self) -> int:
        """Images sampled at a time without gradient."""
        return max(16, self.micro_batch)

    @property
    def local_batch(self) -> int:
        """Images of a step on this worker."""
        return self.config.optim.batch // self.workers.count

    @property
    def micro_batch(self) -> int:
        """Images that are differentiated at a time on this worker."""
        return min(self.config.optim.micro_batch or self.local_batch, self.local_batch)


def build_run(config: RunConfig) -> Run:
    """Load the model and the rewards of an experiment on this worker's device.

    Raises:
        UserError: Weights, prompts or a setting are not usable on this machine.
    """
    if config.resources.threads_per_worker != "auto":  # Ray has set OMP_NUM_THREADS to the worker's share
        torch.set_num_threads(config.resources.threads_per_worker)
    workers = Workers()
    model = load_base_model(config, workers.device)
    sampler = make_sampler(config, model)
    eval_images = eval_image_set(config, model)
    train_prompts = read_prompts(config.prompts.train, where="prompts.train")
    sampler.embeddings.add([*train_prompts, *eval_images.prompts, sampler.negative_prompt])
    options = {name: reward.options for name, reward in config.rewards.items()}
    options |= {judge: {} for judge in config.evaluate.judges if judge not in JUDGES and judge not in options}
    rewards = {name: REWARDS.build(name, chosen).to(workers.device) for name, chosen in options.items()}
    return Run(
        config=config,
        workers=workers,
        sampler=sampler,
        rewards=rewards,
        estimator=ESTIMATORS.build(config.estimator.name, _estimator_options(config)),
        train_prompts=train_prompts,
        eval_images=eval_images,
        calibration_images=ImageSet(
            tuple(train_prompts[i % len(train_prompts)] for i in range(NUM_CALIBRATION_IMAGES)),
            1,
            eval_images.latent_shape,
            latent_stream=Stream.CALIBRATION_LATENT,
            step_stream=Stream.CALIBRATION_STEP_NOISE,
        ),
        latent_shape=eval_images.latent_shape,
    )


def check_options(config: RunConfig) -> None:
    """Check the options of rewards and estimator against what they take; loads no weights.

    Raises:
        UserError: A name or an option is unknown.
    """
    for name, reward in config.rewards.items():
        REWARDS.check(name, reward.options)
    ESTIMATORS.check(config.estimator.name, _estimator_options(config))


def _estimator_options(config: RunConfig) -> dict[str, Any]:
    estimator = config.estimator
    return {"k": estimator.k, "draw": estimator.draw, "std": estimator.std, **estimator.options}


def load_base_model(config: RunConfig, device: torch.device) -> ModelFamily:
    """Load the base model of an experiment in its precision, without adapters.

    Raises:
        UserError: The weights are not there.
    """
    dtype = _dtype(config.resources.precision, device)
    return load_model(config.model.base, revision=config.model.revision, dtype=dtype, device=device)


def make_sampler(config: RunConfig, model: ModelFamily) -> Sampler:
    """Return a model with an experiment's sampler settings."""
    return Sampler(
        model=model,
        embeddings=PromptEmbeddings(model),
        table=model.read_table(num_steps=config.sampler.steps, eta=config.sampler.eta),
        guidance_scale=config.sampler.guidance,
        use_checkpoint=config.estimator.checkpoint == "always",
    )


def eval_image_set(config: RunConfig, model: ModelFamily) -> ImageSet:
    """Return the held-out images that every trial of an experiment is evaluated on.

    Raises:
        UserError: Prompts are missing, or the image size is not one the model can make.
    """
    held_out = read_prompts(config.prompts.eval, where="prompts.eval")
    if len(held_out) < config.evaluate.prompts:
        raise UserError(
            f"evaluate.prompts: {config.evaluate.prompts} prompts are wanted, but prompts.eval holds "
            f"{len(held_out)}; lower it or give more"
        )
    shape = image_shape(config, model)
    return ImageSet(held_out[: config.evaluate.prompts], config.evaluate.images_per_prompt, shape)


def image_shape(config: RunConfig, model: ModelFamily) -> tuple[int, int, int]:
    """Return (C, H, W) of the latents of an experiment's images.

    Raises:
        UserError: The image size is not one the model can make.
    """
    height_px = config.sampler.height or model.size_px[0]
    width_px = config.sampler.width or model.size_px[1]
    try:
        return model.latent_shape(height_px, width_px)
    except ValueError as error:
        raise UserError(f"sampler.height/width: {error}") from error


def base_key(config: RunConfig) -> str:
    """Return a name for the measurements of the base model that this experiment shares with others like it."""
    parts = config.model_dump(mode="json", include={"prompts": True, "sampler": True, "evaluate": True})
    del parts["evaluate"]["every"]
    parts["model"] = [config.model.base, config.model.revision]
    parts["rewards"] = {name: reward.options for name, reward in config.rewards.items()}
    parts["precision"] = config.resources.precision
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on an accelerator and float32 on a CPU, where a backward pass in bfloat16 is slower."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
