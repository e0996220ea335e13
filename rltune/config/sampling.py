"""The section ``sampler``: how an image is drawn. What it leaves open is the model's own: ``Experiment.settled``."""

from typing import Annotated, Literal

from pydantic import Field

from rltune.config.strict import Float, Int, StrictModel, Text

OWN = ("steps", "guidance", "embedded_guidance", "eta")
"""Settings that are the model's own where they are left out: ``Defaults`` of its family."""


class AttentionConfig(StrictModel):
    """An edit of cross-attention that lets the image look at all words of the prompt (Attention Regulation)."""

    strength: Float = Field(0.0, ge=0, le=10)
    """Factor of the edit; 0 is off, 1 the paper's."""
    steps: Float = Field(0.5, ge=0, le=1)
    """Share of the steps that are edited, the first ones."""
    iterations: Int = Field(20, ge=0, le=1000)
    """Steps of the search for the edit, in every layer at every edited step; 0 is off."""
    layers: Literal["auto"] | Annotated[tuple[Text, ...], Field(min_length=1)] = "auto"
    """Layers of cross-attention, by the beginnings of their names: ``[down_blocks.2, up_blocks.1]``. ``auto`` is the
    innermost block of the way down and of the way up, which are these two in Stable Diffusion 1.x and 2.x."""

    @property
    def is_on(self) -> bool:
        """Whether anything is edited."""
        return self.strength > 0 and self.iterations > 0 and self.steps > 0


class SamplerConfig(StrictModel):
    """How an image is drawn, in training as in evaluation. What is left out is the model's own, and is recorded."""

    steps: Int | None = Field(None, ge=1, le=1000)
    """Denoising steps T per image; the model's own if left out: 20 for Stable Diffusion 1.x, 2.x and the built-in
    model, few for distilled models."""
    guidance: Float | None = Field(None, ge=0, le=100)
    """Classifier-free guidance scale; 1 or less switches it off, as in diffusers, and halves the cost. The model's own
    if left out: 5.0 for Stable Diffusion 1.x, 2.x and the built-in model, 1.0 for distilled models."""
    embedded_guidance: Float | None = Field(None, ge=0, le=100)
    """Guidance as a number that the network is told, beside ``guidance``: FLUX.1 dev, FLUX.2 dev. The model's own if
    left out; a LoRA is to be used at what it was trained at."""
    negative: str = ""
    """Negative prompt, which guidance leads away from, in training, evaluation and ``rltune sample``."""
    eta: Float | None = Field(None, ge=0, le=10)
    """Noise put back at each step: 0 is deterministic (DDIM, Euler), 1 is ancestral sampling, which is the most under
    ``rule: posterior``. The model's own if left out: 0, but where its scheduler adds noise. Policy gradients need
    some."""
    rule: Literal["posterior", "flow_grpo"] = "posterior"
    """What eta means for a flow model. ``posterior``: as in DDIM. ``flow_grpo``: the noise level of Flow-GRPO's
    stochastic equation, 0.7 in the paper; its last step adds none. Other models have the first alone."""
    base_steps: Int = Field(0, ge=0, le=999)
    """How many of the first steps the base model takes alone, without adapters, in training, evaluation and
    ``rltune sample``."""
    attention: AttentionConfig = AttentionConfig()
    """An edit of cross-attention that lets the image look at all words of the prompt, in training, evaluation and
    ``rltune sample``; off by default."""
    height: Int | None = Field(None, ge=8, le=8192, multiple_of=8)
    """Image height in pixels; the model's own if left out."""
    width: Int | None = Field(None, ge=8, le=8192, multiple_of=8)
    """Image width in pixels; the model's own if left out."""
