"""The sections of an experiment, each value concrete. Bounds here; what spans sections is in ``experiment.py``."""

from typing import Annotated, Literal

from pydantic import Field

from rltune.config.base import Bool, Float, Int, Options, StrictModel

Text = Annotated[str, Field(min_length=1)]
Beta = Annotated[Float, Field(ge=0, lt=1)]
Prompts = Text | Annotated[tuple[Text, ...], Field(min_length=1)]
BUILTIN_PROMPTS = ("builtin", "builtin-heldout")
"""The prompt sets that ship with the built-in model; any other text is the path of a text file."""


class LoraConfig(StrictModel):
    """The low-rank adapter that is trained; the base model stays as it is."""

    rank: Int = Field(4, ge=1, le=1024)
    """Rank of every adapter matrix: more can express more, and drifts further."""
    alpha: Literal["rank"] | Annotated[Float, Field(gt=0)] = "rank"
    """LoRA alpha; the update is scaled by alpha / rank. ``rank`` means alpha = rank, a scale of 1."""
    targets: Literal["attention", "all"] | Annotated[tuple[Text, ...], Field(min_length=1)] = "attention"
    """Layers that get an adapter: ``attention``, ``all``, or a list of module names."""

    @property
    def alpha_value(self) -> float:
        """Alpha as a number."""
        return float(self.rank if self.alpha == "rank" else self.alpha)


class ModelConfig(StrictModel):
    """What is fine-tuned."""

    base: Text = "builtin"
    """``builtin``, a Hugging Face id, or a local folder in diffusers format."""
    revision: Text | None = None
    """Branch, tag or commit of a Hugging Face id; the default branch if left out."""
    lora: LoraConfig = LoraConfig()
    """The adapter."""


class PromptsConfig(StrictModel):
    """Where prompts come from."""

    train: Prompts = "builtin"
    """Prompts to train on: ``builtin``, ``builtin-heldout``, a text file with one prompt a line, or a list."""
    eval: Prompts = "builtin-heldout"
    """Prompts to evaluate on, same choice as ``train``; keep them apart."""


class SamplerConfig(StrictModel):
    """How an image is drawn, in training as in evaluation."""

    steps: Int = Field(20, ge=1, le=1000)
    """Denoising steps T per image."""
    guidance: Float = Field(5.0, ge=0, le=100)
    """Classifier-free guidance scale; 1 switches it off and halves the cost."""
    eta: Float = Field(0.0, ge=0, le=1)
    """Noise put back at each step: 0 is deterministic DDIM, 1 is ancestral sampling."""
    height: Int | None = Field(None, ge=8, le=8192, multiple_of=8)
    """Image height in pixels; the model's own if left out."""
    width: Int | None = Field(None, ge=8, le=8192, multiple_of=8)
    """Image width in pixels; the model's own if left out."""


class EstimatorConfig(StrictModel):
    """How the reward's gradient is estimated."""

    name: Text = "alignprop"
    """Name of the estimator."""
    k: Int = Field(1, ge=1, le=1000)
    """Truncation depth K: the last K of T steps carry gradient. Compute grows linearly in K."""
    draw: Literal["fixed", "uniform", "gaussian"] = "fixed"
    """K per batch: ``fixed`` is k, ``uniform`` is one of 1..k, ``gaussian`` is normal(k, std) redrawn into 1..T."""
    std: Float = Field(5.0, gt=0)
    """Standard deviation of K in steps; read only when ``draw`` is ``gaussian``."""
    checkpoint: Literal["always", "never"] = "always"
    """Recompute each step's activations in the backward pass (less memory, slower), or keep them."""
    options: Options = Field({})
    """Further options of this estimator."""


class RewardConfig(StrictModel):
    """One reward that is trained on."""

    weight: Float = Field(1.0, ge=0)
    """Weight in the sum, after each reward is standardised on the base model; 0 only watches it."""
    options: Options = Field({})
    """Options of this reward."""


class OptimConfig(StrictModel):
    """AdamW on the adapter."""

    lr: Float = Field(1e-3, ge=0, le=1)
    """Learning rate; 0 is a control that must change nothing."""
    steps: Int = Field(100, ge=1)
    """Optimiser steps."""
    batch: Int = Field(8, ge=1)
    """Images per optimiser step, over all workers."""
    micro_batch: Int | None = Field(None, ge=1)
    """Images that a worker holds at a time; gradients add up over the rest. Left out: a worker's whole share."""
    max_grad_norm: Float = Field(1.0, gt=0)
    """The gradient is scaled down to this norm when it is longer."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    weight_decay: Float = Field(1e-4, ge=0)
    """Decoupled weight decay."""
    eps: Float = Field(1e-8, gt=0)
    """Added to the denominator of Adam's update."""


class EvaluateConfig(StrictModel):
    """What is measured on held-out prompts."""

    every: Int = Field(20, ge=1)
    """Optimiser steps between evaluations."""
    prompts: Int = Field(16, ge=1)
    """How many of the evaluation prompts are used."""
    images_per_prompt: Int = Field(2, ge=1)
    """Images per prompt, always from the same seeds."""
    judges: tuple[Text, ...] = ("diversity", "drift")
    """Measured but never trained on; a reward that is not in ``rewards`` may be one."""


class ConstraintConfig(StrictModel):
    """What a trial must keep to be feasible; at least one bound."""

    min_ratio_to_base: Float | None = Field(None, gt=0)
    """Smallest allowed value, as a fraction of the base model's."""
    min: Float | None = None
    """Smallest allowed value."""
    max: Float | None = None
    """Largest allowed value."""


class SearchConfig(StrictModel):
    """How the values that are distributions are searched."""

    sampler: Text = "tpe"
    """``tpe``, ``random``, ``nsga2`` or ``gp``."""
    trials: Int = Field(16, ge=1)
    """Trials, the base model not counted."""
    prune: Bool = False
    """Stop trials early that fall behind. Not available yet."""
    seed: Int = Field(0, ge=0, lt=2**32)
    """Seed of the search."""


class ResourcesConfig(StrictModel):
    """What a trial runs on."""

    workers: Int = Field(1, ge=1)
    """Data-parallel workers per trial."""
    gpus_per_worker: Literal["auto"] | Annotated[Float, Field(ge=0)] = "auto"
    """GPUs per worker; a fraction shares one; ``auto`` is one if the cluster has any."""
    concurrent: Literal["auto"] | Annotated[Int, Field(ge=1)] = "auto"
    """Trials at a time; ``auto`` is as many as fit."""
    executor: Literal["train", "warm"] = "train"
    """``train`` starts a Ray Train job per trial; ``warm`` is not available yet."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the frozen networks; ``auto`` is bf16 on a GPU and fp32 on a CPU. Adapters stay in fp32."""
    threads_per_worker: Literal["auto"] | Annotated[Int, Field(ge=1)] = "auto"
    """CPU threads per worker; ``auto`` shares the machine out."""
