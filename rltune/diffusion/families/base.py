"""What a family of diffusion models must offer; one file a family registers itself here by its pipeline's class name.

B: images. P: prompts. L, D: text tokens and width. C, H, W: latent channels, rows, columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rltune.diffusion.schedulers.base import Rule
from rltune.diffusion.table import ChainTable
from rltune.registry import Registry

ENCODE_BATCH = 64
"""Prompts that a text encoder embeds at a time."""

Conditioning = Mapping[str, Tensor]
"""What one prompt tells the network: no batch axis, of any length, on the CPU, in the text encoder's own dtype."""
TextBatch = Mapping[str, Any]
"""What the prompts of B images tell it, as ``predict`` takes it: tensors with a leading B, or lists of B tensors."""


EMBEDDED_GUIDANCE = "guidance"
"""Name, in a ``TextBatch``, of the guidance that a network is told, ``(B,)`` float32; only where it is told one."""
OWN_ETA = {
    "EulerAncestralDiscreteScheduler": 1.0,
    "FlowMatchLCMScheduler": 1.0,
    "LCMScheduler": 1.0,
    "SCMScheduler": 1.0,
    "TCDScheduler": 0.3,
}
"""Class of a scheduler that adds noise of itself -> the eta that its own step has; others have 0."""
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
"""Schedulers that only models distilled to a few steps ship with."""


@dataclass(frozen=True)
class Defaults:
    """What a model is sampled with where an experiment does not say."""

    steps: int
    guidance: float
    """As ``sampler.guidance``; 1 is none."""
    eta: float = 0.0
    embedded_guidance: float | None = None
    """The number that the network is told; None where it is told none."""


@dataclass(frozen=True)
class Described:
    """What a pipeline's files say, weights aside."""

    base: str
    """What the user calls it."""
    pipeline: Mapping[str, Any]
    """``model_index.json``"""
    scheduler: Mapping[str, Any]
    """Its configuration, with ``_class_name``."""
    network: Mapping[str, Any]
    """The denoising network's configuration."""

    @property
    def own_eta(self) -> float:
        """The eta of the scheduler's own step."""
        is_sde = self.scheduler.get("stochastic_sampling") or "sde" in self.scheduler.get("algorithm_type", "")
        return 1.0 if is_sde else OWN_ETA.get(self.scheduler.get("_class_name", ""), 0.0)

    @property
    def is_stable_diffusion_turbo(self) -> bool:
        """Whether a Stable Diffusion or SDXL pipeline is one for a few steps, by its scheduler.

        The Turbo models ship Euler's with trailing timesteps; those that are trained to zero terminal SNR have them
        too, but predict v.
        """
        name, kind = self.scheduler.get("_class_name", ""), self.scheduler.get("prediction_type", "epsilon")
        is_trailing = self.scheduler.get("timestep_spacing") == "trailing" and kind == "epsilon"
        return name in FEW_STEP_SCHEDULERS or (is_trailing and name.startswith("Euler"))


def described(pipeline: Any, network: Any, *, base: str) -> Described:
    """Return what the files of a loaded pipeline say."""
    scheduler = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    return Described(base, dict(pipeline.config), scheduler, dict(network.config))


class ModelFamily(Protocol):
    """A loaded text-to-image pipeline, seen as the four things the chain needs."""

    pipeline: Any
    """The diffusers pipeline itself, for saving adapters."""
    lora_prefix: str
    """Component the adapters belong to in a LoRA file: ``unet`` or ``transformer``."""
    size_px: tuple[int, int]
    """Height and width the model was trained for."""
    droppable: tuple[str, ...]
    """Text encoders that the pipeline can do without."""
    is_guidance_linear: bool
    """Whether ``guide`` is f_neg + g (f_text - f_neg)."""
    has_fixed_text: bool
    """Whether all prompts tell the network tensors of the same shapes, without a mask, so that two can be mixed."""

    @classmethod
    def defaults_of(cls, files: Described) -> Defaults:
        """Return what a model of this family is sampled with where an experiment does not say."""
        ...

    def defaults(self, base: str) -> Defaults:
        """Return the same for this model, which the user calls ``base``."""
        ...

    @property
    def network(self) -> nn.Module:
        """The denoising network that adapters are attached to."""
        ...

    def lora_layers(self, targets: str | Sequence[str]) -> list[str]:
        """Return the layers that ``attention`` or ``all`` stands for in this network; a list is itself."""
        ...

    @property
    def decoder(self) -> nn.Module:
        """The network that makes images of latents."""
        ...

    def read_table(
        self, *, num_steps: int, eta: float, shape: tuple[int, int, int], rule: Rule = "posterior"
    ) -> ChainTable:
        """Return the coefficient table of this pipeline's sampler for latents of ``shape`` (C, H, W).

        Raises:
            ValueError: Its schedule has no such steps, or no such rule.
        """
        ...

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents of an image; raises ``ValueError`` for a size the model cannot make."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Embed prompts, one conditioning each, no gradient.

        Moves the text encoders as needed, and runs them on ``ENCODE_BATCH`` prompts at a time, in order.
        """
        ...

    def blank_text(self) -> Conditioning:
        """Return a conditioning without values, on the device ``meta``, such as a prompt of usual length has."""
        ...

    def encode_negative(self, prompt: str) -> Conditioning | None:
        """Return what a negative prompt tells the network; None where it is embedded as any other prompt is."""
        ...

    def collate(self, rows: Sequence[Conditioning], device: torch.device) -> TextBatch:
        """Bring conditionings together for ``predict``, on ``device``, numbers in float32 at least."""
        ...

    def pooled_text(self, text: TextBatch) -> Tensor:
        """Return one vector an image that stands for its prompt, ``(B, D)`` float32."""
        ...

    def cut_off(self, prompts: Sequence[str]) -> dict[str, str]:
        """Return prompt -> the end of it that the text encoder does not read, for those that are too long."""
        ...

    def predict(self, x_BCHW: Tensor, t: Tensor, text: TextBatch) -> Tensor:
        """Run the network once -> its output f (B, C, H, W) in the table's sign and scale, float32. Differentiable."""
        ...

    def guide(self, text_BCHW: Tensor, negative_BCHW: Tensor, scale: float) -> Tensor:
        """Combine the outputs with a prompt and with the negative prompt -> (B, C, H, W). Differentiable in both."""
        ...

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """Decode clean latents -> RGB in [0, 1], (B, 3, height, width), float32. Differentiable where not clamped."""
        ...

    def to(self, device: torch.device) -> None:
        """Move the network and the image decoder to ``device``."""
        ...


FAMILIES: Registry[ModelFamily] = Registry("pipeline class", "rltune.diffusion.families")
"""Built from a pipeline of the class they are registered under."""


def stack(rows: Sequence[Conditioning], device: torch.device) -> dict[str, Tensor]:
    """Stack conditionings of one shape -> tensors with a leading B on ``device``, numbers in float32 at least."""
    return {name: widened(torch.stack([row[name] for row in rows]).to(device)) for name in rows[0]}


def widened(tensor: Tensor) -> Tensor:
    """Return numbers in float32 at least; masks and indices as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def linear_guidance(text_BCHW: Tensor, negative_BCHW: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598): f_neg + g (f_text - f_neg)."""
    return negative_BCHW + scale * (text_BCHW - negative_BCHW)
