"""What memory a worker of an experiment will take at the most, before anything is loaded."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rltune.config.experiment import RunConfig
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.forecast import Counts, count
from rltune.diffusion.memory import GIB
from rltune.diffusion.tiles import TILE_PX
from rltune.rewards.base import REWARDS
from rltune.runs.metrics import JUDGES
from rltune.training.rewards import is_own
from rltune.training.sampling import image_px, image_shape, make_sampler
from rltune.training.setup import EVAL_BATCH, EVAL_BATCH_LARGE

BYTES_PER_ADAPTED = 16
"""Of an adapter's parameter in float32: itself, its gradient, and Adam's two moments."""
PROCESS_BYTES = int(1.5 * GIB)
"""Python and its libraries in memory, on a GPU CUDA's own instead, and the allocator's gaps."""
GAPS = 0.03
"""Of the network's weights, more gaps: what the allocator keeps of temporaries, which grow with them. Of SDXL's step on
a CPU ``malloc_trim`` gave back 1.40 GiB in all, of SD-Turbo's 0.68 (docs/memory.md)."""
REWARD_ACTIVATIONS = 0.3
"""What a reward stores for an image, as a share of its weights: a CLIP of size H, 1.9 GiB, stores 0.6 GiB."""
TEMPORARIES = 3
"""Tensors as large as the largest that is stored, which a backward pass holds besides: gradients, a copy."""
FORWARD_TENSORS = 4
"""Those that decoding without gradient holds at a time."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_counts: dict[str, Counts] = {}


@dataclass(frozen=True)
class Forecast:
    """Memory that one worker takes where nothing is kept that could be computed again, in bytes."""

    fixed: Mapping[str, int]
    """What is there all the time."""
    phases: Mapping[str, int]
    """What comes on top, one at a time."""
    precision: str
    has_blocks: bool
    """Whether the network's blocks are in checkpoints."""
    is_tiled: bool

    @property
    def peak_bytes(self) -> int:
        """The most at any time."""
        return sum(self.fixed.values()) + max(self.phases.values())

    @property
    def peak_gib(self) -> float:
        """The same in GiB."""
        return self.peak_bytes / GIB

    @property
    def parts(self) -> dict[str, float]:
        """What the peak is made of, in GiB, the phase that is largest last."""
        name = max(self.phases, key=lambda phase: self.phases[phase])
        return {part: size / GIB for part, size in self.fixed.items()} | {name: self.phases[name] / GIB}


def forecast(config: RunConfig, model: ModelFamily, *, precision: str, room_gib: float | None = None) -> Forecast:
    """Return what a worker of an experiment takes.

    Rewards are counted by the size of the files that they are published in, unless they have a GPU of their own; what
    the user's own take is not known.

    Args:
        config: One concrete experiment.
        model: Its base model without values, as ``load_outline`` gives it.
        precision: ``fp32`` or ``bf16``, ``auto`` resolved.
        room_gib: Memory of a worker's device, which ``checkpoint_blocks: auto`` looks at; None where it is not known.

    Raises:
        UserError: The image size is not one the model can make.
    """
    wanted = config.resources.checkpoint_blocks
    if wanted == "auto":
        plain = _forecast(config, model, precision, has_blocks=False)
        wanted = config.estimator.checkpoint != "never" and room_gib is not None and plain.peak_gib > 0.7 * room_gib
        if not wanted:
            return plain
    return _forecast(config, model, precision, has_blocks=wanted)


def _forecast(config: RunConfig, model: ModelFamily, precision: str, *, has_blocks: bool) -> Forecast:
    batch, sampler = micro_batch(config), make_sampler(config, model)
    counts = counts_of(config, model, DTYPES[precision])
    rewards = reward_bytes(config)
    fixed = {
        "network": counts.network,
        "decoder": counts.decoder,
        "adapters": BYTES_PER_ADAPTED * counts.num_adapted,
        "rewards": rewards if config.resources.rewards_on == "same" else 0,
        "process": PROCESS_BYTES + int(GAPS * counts.network),
    }
    step = counts.step.outside + counts.step.largest if has_blocks else counts.step.plain
    height_px, width_px = image_px(config, model)
    images = 3 * 4 * height_px * width_px * batch
    num_scored = min(batch, *(section.micro_batch or batch for section in config.rewards.values()))
    drawn = max(EVAL_BATCH_LARGE if sampler.is_decoded_singly else EVAL_BATCH, batch)
    decoded = 1 if sampler.is_decoded_singly else drawn
    phases = {
        "a training step": step + TEMPORARIES * counts.step.tensor + counts.unpacked,
        "decoding": counts.decoding.plain + TEMPORARIES * (counts.decoding.tensor + images),
        "scoring": int(REWARD_ACTIVATIONS * fixed["rewards"] * num_scored) + 2 * images,
        "sampling": counts.merged + counts.step.largest + counts.unpacked,
        "evaluation": counts.merged
        + max(FORWARD_TENSORS * counts.whole_image.tensor * decoded, counts.step.largest * drawn // batch),
    }
    return Forecast(fixed, phases, precision, has_blocks, sampler.tiling is not None)


def micro_batch(config: RunConfig) -> int:
    """Return how many images a worker differentiates at a time, at most."""
    share = -(-config.optim.batch // config.resources.workers)
    return min(config.optim.micro_batch or share, share)


def reward_bytes(config: RunConfig) -> int:
    """Return the size of the published files that rewards and judges need, each file once."""
    kinds = [config.kind_of(name) for name, section in config.rewards.items() if not is_own(name, section)]
    kinds += [judge for judge in config.evaluate.judges if judge not in JUDGES and judge in REWARDS.names()]
    files = {file for kind in kinds for file in REWARDS.card(kind).weights}
    return int(1e6 * sum(file.size_mb for file in files))


def counts_of(config: RunConfig, model: ModelFamily, dtype: torch.dtype) -> Counts:
    """Count a micro-batch of an experiment, or return what was counted of the same networks with the same settings."""
    sampler = make_sampler(config, model)
    settings: dict[str, Any] = {
        "shape": image_shape(config, model),
        "batch": micro_batch(config),
        "rank": config.lora_rank,
        "targets": config.model.lora.targets,
        "guidance_scale": sampler.guidance_scale,
        "guidance_gradient": sampler.guidance_gradient,
        "tiling": sampler.tiling,
        "quantised": None if config.model.quantise == "none" else config.model.quantise,
        "decoder_dtype": DTYPES.get(config.resources.decoder_precision),
    }
    networks = [dict(getattr(part, "config", {})) for part in (model.network, model.decoder)]
    key = json.dumps([networks, settings, str(dtype)], default=str, sort_keys=True)
    if key not in _counts:
        _counts[key] = count(model, dtype=dtype, **settings)
    return _counts[key]


Change = Callable[[RunConfig], RunConfig]


def smaller(config: RunConfig, model: ModelFamily, found: Forecast) -> dict[str, Change]:
    """Return settings that take less memory than ``found``, as they are written -> what they make of an experiment.

    Those that change no result come first.
    """

    def changed(section: str, **values: Any) -> Change:
        return lambda config: config.model_copy(update={section: getattr(config, section).model_copy(update=values)})

    sampler, (height_px, width_px) = make_sampler(config, model), image_px(config, model)
    half = {"height": height_px // 2, "width": width_px // 2}
    changes = {
        "resources.checkpoint_blocks: true": (not found.has_blocks, changed("resources", checkpoint_blocks=True)),
        "optim.micro_batch: 1": (micro_batch(config) > 1, changed("optim", micro_batch=1)),
        "resources.precision: bf16": (found.precision == "fp32", changed("resources", precision="bf16")),
        "resources.decoder_tiles: true": (
            sampler.tiling is None and max(height_px, width_px) > TILE_PX,
            changed("resources", decoder_tiles=True),
        ),
        "estimator.guidance_gradient: text": (
            sampler.guidance_scale > 1 and sampler.guidance_gradient == "both",
            changed("estimator", guidance_gradient="text"),
        ),
        f"sampler.height: {half['height']} and sampler.width: {half['width']}": (
            min(height_px, width_px) >= TILE_PX,
            changed("sampler", **half),
        ),
    }
    return {name: change for name, (is_possible, change) in changes.items() if is_possible}
