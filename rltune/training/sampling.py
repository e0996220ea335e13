"""From an experiment's sampler settings, and the model's own where it leaves them open, to a model that draws."""

from dataclasses import asdict, replace
from typing import Any

from rltune.config.experiment import Context, RunConfig
from rltune.config.sampling import OWN
from rltune.config.validation import faults_of_run
from rltune.diffusion.attention import AttentionPlan, attention_layers
from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import Defaults, ModelFamily
from rltune.diffusion.inpaint import Fills, check_encodes
from rltune.diffusion.sampler import Sampler
from rltune.diffusion.tiles import Tiling
from rltune.errors import ExperimentError, Fault, UserError

LARGE_PX = 768
"""Longest side of an image, and of those that its model was made for, above which it counts as large."""


def make_sampler(config: RunConfig, model: ModelFamily) -> Sampler:
    """Return a model with an experiment's sampler settings; activations are not kept until there is room.

    Raises:
        UserError: The model is not one for the task, its noise schedule has no such steps, its network is told no
            guidance, or no step is left to adapters.
    """
    _check_task(config, model)
    numbers, section = _numbers(model, config), config.sampler
    if section.base_steps >= numbers.steps:
        what = f"must leave at least one of the {numbers.steps} steps, got {section.base_steps}"
        raise UserError(f"sampler.base_steps: {what}; lower it")
    try:
        shape = image_shape(config, model)
        table = model.read_table(num_steps=numbers.steps, eta=numbers.eta, shape=shape, rule=section.rule)
    except ValueError as error:
        raise UserError(f"sampler: {config.model.base!r}: {error}") from error
    return Sampler(
        model=model,
        embeddings=PromptEmbeddings(model),
        table=table,
        guidance_scale=numbers.guidance,
        negative_prompt=section.negative,
        embedded_guidance=numbers.embedded_guidance,
        num_base_steps=section.base_steps,
        guidance_gradient=config.estimator.guidance_gradient,
        tiling=tiling(config, model),
        is_decoded_singly=is_large(config, model),
        use_bf16_prefix=config.resources.prefix_precision == "bf16",
        size_px=image_px(config, model),
        attention=attention_plan(config, model, num_steps=numbers.steps),
    )


def attention_plan(config: RunConfig, model: ModelFamily, *, num_steps: int) -> AttentionPlan | None:
    """Return what becomes of the cross-attention; None where it is left alone.

    Raises:
        UserError: The network has no layers of cross-attention, or none of the names asked for.
    """
    section, is_noted = config.sampler.attention, config.regularize.attention > 0
    if not section.is_on and not is_noted:
        return None
    where = "sampler.attention" if section.is_on else "regularize.attention"
    return AttentionPlan(
        layers=attention_layers(model.network, section.layers, where=where, base=config.model.base),
        num_steps=round(section.steps * num_steps) if section.is_on else 0,
        iterations=section.iterations,
        strength=section.strength,
        is_noted=is_noted,
    )


def _check_task(config: RunConfig, model: ModelFamily) -> None:
    if config.task == "inpaint":
        check_encodes(model)
    elif isinstance(model, Fills) and model.reads_given:
        raise UserError(
            f"task: {config.model.base!r} fills images and draws none without, got {config.task}; write task: inpaint"
        )


def _numbers(model: ModelFamily, config: RunConfig) -> Defaults:
    """Return what an experiment says of sampling, and the model's own where it does not.

    Raises:
        UserError: The network is told no guidance.
    """
    own, section = model.defaults(config.model.base), config.sampler
    if section.embedded_guidance is not None and own.embedded_guidance is None:
        raise UserError(
            f"sampler.embedded_guidance: the network of {config.model.base!r} is told no guidance, got "
            f"{section.embedded_guidance:g}; delete it, sampler.guidance is what this model has"
        )
    given = {name: value for name in OWN if (value := getattr(section, name)) is not None}
    return replace(own, **given)


def settled_by(model: ModelFamily, config: RunConfig) -> RunConfig:
    """Return a concrete experiment with the model's own where it leaves the sampler open.

    A plan has done so before a run starts: this is for who comes without one.

    Raises:
        UserError: The network is told no guidance.
        ExperimentError: What it leaves open does not go together with what it says.
    """
    own = dotted(_numbers(model, config))
    if all(getattr(config.sampler, path.removeprefix("sampler.")) is not None for path in own):
        return config
    data, context = config.model_dump(), Context(defaults=own)
    if clashes := faults_of_run(data, context):
        raise ExperimentError(config.name, [Fault(c.where, c.what, c.remedy) for c in clashes])
    return RunConfig.model_validate(data, context=context)


def dotted(own: Defaults) -> dict[str, Any]:
    """Return what a model is sampled with by the settings' paths."""
    return {f"sampler.{name}": value for name, value in asdict(own).items() if value is not None}


def is_large(config: RunConfig, model: ModelFamily) -> bool:
    """Return whether images are so large, and the model made for such, that few of them fit into memory at a time."""
    return max(image_px(config, model)) > LARGE_PX and max(model.size_px) > LARGE_PX


def image_px(config: RunConfig, model: ModelFamily) -> tuple[int, int]:
    """Return height and width of an experiment's images."""
    return config.sampler.height or model.size_px[0], config.sampler.width or model.size_px[1]


def tiling(config: RunConfig, model: ModelFamily) -> Tiling | None:
    """Return the tiles that images are decoded in where gradient flows; None for whole images.

    It follows from the model and the image size alone, never from what is free: tiles change numbers.

    Raises:
        UserError: The image size is not one the model can make.
    """
    wanted = config.resources.decoder_tiles
    if not (is_large(config, model) if wanted == "auto" else wanted):
        return None
    return Tiling.of(image_px(config, model)[0] // image_shape(config, model)[1])


def image_shape(config: RunConfig, model: ModelFamily) -> tuple[int, int, int]:
    """Return (C, H, W) of the latents of an experiment's images.

    Raises:
        UserError: The image size is not one the model can make.
    """
    try:
        return model.latent_shape(*image_px(config, model))
    except ValueError as error:
        raise UserError(f"sampler.height/width: {error}") from error
