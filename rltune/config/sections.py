"""The sections of an experiment, each value concrete. Bounds here; what spans sections is in ``clashes.py``."""

from collections.abc import Mapping
from os.path import expanduser
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from rltune.config.strict import Bool, Float, Int, Options, StrictModel


def _at_home(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with ``~`` spelt out where one is a path that starts with it."""
    return {
        name: expanduser(value) if isinstance(value, str) and value.startswith("~/") else value
        for name, value in options.items()
    }


Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(expanduser)]
"""What may be a path; a ``~`` before it is spelt out here, for all who read it."""
Beta = Annotated[Float, Field(ge=0, lt=1)]
Prompts = PathText | Annotated[tuple[Text, ...], Field(min_length=1)]
BUILTIN_PROMPTS = ("builtin", "builtin-heldout")
"""The prompt sets that ship with the built-in model; any other text is the path of a file."""


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

    base: PathText = "builtin"
    """``builtin``, a Hugging Face id, or a local folder in diffusers format."""
    revision: Text | None = None
    """Branch, tag or commit of a Hugging Face id; the default branch if left out."""
    lora: LoraConfig = LoraConfig()
    """The adapter."""


class PromptsConfig(StrictModel):
    """Where prompts come from."""

    train: Prompts = "builtin"
    """Prompts to train on: ``builtin``, ``builtin-heldout``, a list, or a file: text with one prompt a line (lines that
    start with ``#`` are left out), or a .csv, .tsv, .json, .jsonl or .parquet with a column prompt, caption or text."""
    eval: Prompts = "builtin-heldout"
    """Prompts to evaluate on, same choice as ``train``; keep them apart."""
    images_per_prompt: Int = Field(1, ge=1)
    """Images of a prompt that follow each other in training; policy gradients compare them with one another."""


class SamplerConfig(StrictModel):
    """How an image is drawn, in training as in evaluation."""

    steps: Int = Field(20, ge=1, le=1000)
    """Denoising steps T per image."""
    guidance: Float = Field(5.0, ge=0, le=100)
    """Classifier-free guidance scale; 1 or less switches it off, as in diffusers, and halves the cost."""
    eta: Float = Field(0.0, ge=0, le=1)
    """Noise put back at each step: 0 is deterministic DDIM, 1 is ancestral sampling. Policy gradients need some."""
    base_steps: Int = Field(0, ge=0, le=999)
    """First steps that are left to the base model, adapters off, in training, evaluation and ``rltune sample``."""
    height: Int | None = Field(None, ge=8, le=8192, multiple_of=8)
    """Image height in pixels; the model's own if left out."""
    width: Int | None = Field(None, ge=8, le=8192, multiple_of=8)
    """Image width in pixels; the model's own if left out."""


class EstimatorConfig(StrictModel):
    """How the reward's gradient is estimated."""

    name: Text = "alignprop"
    """Name of the estimator."""
    k: Int | None = Field(None, ge=1, le=1000)
    """Truncation depth K: how many of the T steps carry gradient. Compute grows linearly in K. Left out: the
    estimator's own default."""
    draw: Literal["fixed", "uniform", "gaussian", "per_step"] | None = None
    """AlignProp's K, drawn once a round for all its images: ``fixed`` is k, ``uniform`` (the default) is one of 1..k,
    ``gaussian`` is normal(k, std) redrawn into 1..T, ``per_step`` draws every step by itself."""
    std: Float | None = Field(None, gt=0)
    """Standard deviation of K in steps; read only when ``draw`` is ``gaussian``."""
    checkpoint: Literal["auto", "always", "never", "serial"] = "auto"
    """Activations of the steps that carry gradient: computed again in the backward pass (``always``: less memory,
    slower), kept (``never``), kept as far as ``activation_gib`` goes (``auto``), or one step's at a time
    (``serial``, for estimators whose inputs are detached). The gradient is the same."""
    activation_gib: Literal["auto"] | Annotated[Float, Field(ge=0)] = "auto"
    """Memory that ``checkpoint: auto`` may fill, a worker; ``auto`` is 60 % of what is free, shared by the workers of
    a machine."""
    guidance_gradient: Literal["both", "text", "text_rescaled"] = "both"
    """Branches of classifier-free guidance that carry gradient: both, as the formula says; or the prompt's alone, as it
    is or divided by the guidance scale. The latter two are other estimators, and cheaper."""
    options: Options = Field({})
    """Further options of this estimator; ``rltune estimators`` lists them."""


class RegularizeConfig(StrictModel):
    """What keeps the model honest while it follows the reward; 0 is off."""

    drift: Float = Field(0.0, ge=0)
    """Weight of the squared distance of the network's output from the base model's, over the steps that are trained."""
    flatness_weights: Float = Field(0.0, ge=0, le=1)
    """RSA-FT: take the gradient this far uphill in the loss, in adapter weights. Doubles the cost."""
    flatness_image: Float = Field(0.0, ge=0, le=10)
    """RSA-FT: score images after a step of this L2 length against the reward. One more reward query an image."""


class TrustConfig(StrictModel):
    """A reward's part of an image's loss counts more where it knows what it sees: trust by the distance of its features
    from these. Policy gradients, which compare images by all rewards at once, weigh by the mean of the trusts."""

    reference: PathText | None = None
    """What the reward was trained on, or like it: a folder of images, a safetensors file with a tensor ``features``
    (N, D), or ``builtin``, scenes of the built-in world. Left out, trust plays no part."""
    slope: Float = Field(0.7, ge=0)
    """How fast trust falls off with the distance, of which 1 is an image like the references."""
    offset: Float = 1.4
    """Logarithm of the weight at distance 0."""
    ceiling: Float = Field(2.21, ge=1)
    """Greatest weight of an image; the least is 1."""


class RelativeConfig(StrictModel):
    """The reward for the prompt with one kind of words before it, minus that with another."""

    positive: Text | None = None
    """Control words of what to move towards, as in ``Realistic photo``; left out, as is ``negative``, it is off."""
    negative: Text | None = None
    """Control words of what to move away from."""
    k: Float = Field(0.0, ge=0)
    """Extra weight of the positive term."""


class RewardConfig(StrictModel):
    """One reward that is trained on."""

    reward: Text | None = None
    """What it is: a name that ``rltune rewards`` lists, or ``module:name`` of your own; the key itself if left out."""

    weight: Float = Field(1.0, ge=0)
    """Weight in the sum, after each reward is standardised on the base model; 0 only watches it."""
    loss: Literal["linear", "hinge", "target"] = "linear"
    """``linear`` raises the score r without end; ``hinge`` only up to ``target``, relu(target - r): a cap; ``target``
    brings it to ``target``, |target - r|."""
    target: Float | None = None
    """Where ``hinge`` and ``target`` aim, in the unit that the reward is reported in."""
    negate: Bool = False
    """Train, and report, minus the reward."""
    relative: RelativeConfig = RelativeConfig()
    """Score it relative to control words, so that what it likes about every image cancels."""
    trust: TrustConfig = TrustConfig()
    """Let images count more, in this reward's part of the loss, where it knows what it sees."""
    standardise: Bool = True
    """Weigh it in standard deviations of the base model; if not, in its own unit."""
    micro_batch: Int | None = Field(None, ge=1)
    """Images it scores at a time; left out, as many as memory holds."""
    options: Annotated[Options, AfterValidator(_at_home)] = Field({})
    """Options of this reward."""


class MixtureConfig(StrictModel):
    """How several rewards become one number."""

    method: Literal["sum", "chebyshev", "win_rate", "non_dominated", "gradient_balance"] = "sum"
    """``sum``: weighted. ``chebyshev``: what lags behind most. ``win_rate``: how often it would beat the base model.
    ``non_dominated``: the sum, over the images of a batch that none beats. ``gradient_balance``: the sum, weights being
    shares of the image gradient."""
    ideal: Float = 3.0
    """What every reward should come to under ``chebyshev``, in standard deviations of the base model."""
    rho: Float = Field(0.05, ge=0)
    """How much the others count under ``chebyshev``."""


class OptimConfig(StrictModel):
    """AdamW on the adapter."""

    lr: Float = Field(1e-3, ge=0, le=1)
    """Learning rate; 0 is a control that must change nothing."""
    steps: Int = Field(100, ge=1)
    """Rounds of training: ``batch`` new images each. One is one optimiser step, several for policy gradients with
    ``epochs``."""
    queries: Int | None = Field(None, ge=1)
    """Reward queries after which training ends, if ``steps`` has not ended it before: an equal budget for estimators
    that query more than once an image."""
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
    ema: Beta = 0.0
    """Decay a round of a moving average of the adapters, which is what is evaluated and exported; 0 is off."""


class EvaluateConfig(StrictModel):
    """What is measured on held-out prompts."""

    every: Int = Field(20, ge=1)
    """Optimiser steps between evaluations."""
    prompts: Int = Field(16, ge=1)
    """How many of the evaluation prompts are used, the first; repeats are left out."""
    images_per_prompt: Int = Field(2, ge=1)
    """Images per prompt, always from the same seeds."""
    judges: tuple[Text, ...] = ("diversity", "drift")
    """Measured but never trained on; a reward that is not in ``rewards`` may be one."""
    confirm: Literal["auto"] | Annotated[Int, Field(ge=0)] = "auto"
    """Fresh prompts, behind the ``prompts`` of ``prompts.eval``, that members of the front, or a checkpoint that was
    selected, are measured on again at the end, with other noise; ``auto`` is as many as ``prompts``, 0 is off. Where
    fewer than half as many as ``prompts`` are left, those of the search are drawn again."""
    select: Text = "last"
    """Which of a trial's checkpoints counts and is exported: ``last``, or the best by an objective, reward or judge,
    named, among those evaluated that keep every constraint; the last where none does."""


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

    sampler: Text = "surrogate"
    """``surrogate`` (Gaussian processes over knobs and weights together, a tenth of a second a trial), ``tpe``, ``gp``
    (Optuna's Gaussian process: seconds a trial), ``nsga2``, ``nsga3``, ``random``, ``quasi_random`` (Sobol); or
    ``grid``, every combination of choices and whole numbers in turn."""
    trials: Int = Field(16, ge=1)
    """Trials, the base model not counted; a grid ends with its last combination."""
    prune: Bool = False
    """Stop trials early that fall behind the others at the same training step (MO-ASHA), by all objectives at once."""
    grace: Int | None = Field(None, ge=1)
    """Training steps after which trials are first compared; a multiple of ``evaluate.every``. Left out: the first
    evaluation."""
    reduction: Int = Field(3, ge=2, le=10)
    """Of the trials compared, the best 1 / reduction go on, up to reduction times as many steps."""
    seed: Int = Field(0, ge=0, lt=2**32)
    """Seed of the search."""
    points: tuple[dict[str, Any], ...] = Field(
        (), json_schema_extra={"x-expects": "a list of mappings of searched settings to values"}
    )
    """Tried first, in this order: mappings such as ``{optim.lr: 1e-3, model.lora.rank: 4}`` of searched settings to
    values; what one leaves out is drawn."""
    warm_start: PathText | None = None
    """Folder of another run, whose trials the search starts out from; they are no trials of this one."""


class StopConfig(StrictModel):
    """When to end before the last step or trial; what is left out never ends anything."""

    broken_constraint: Int | None = Field(None, ge=1)
    """Stop a trial that breaks the same constraint at so many evaluations in a row."""
    diverged: Float | None = Field(1.0, ge=0)
    """Stop a trial that is worse than the base model in every objective, by more than so many of its standard
    deviations over prompts, or of what stands for one where its prompts do not differ (``units`` in front.json)."""
    hours: Float | None = Field(None, gt=0)
    """Once the sweep has run for so long, start no further trial, and stop those that run at their next evaluation.
    All its starts count, up to their last sign of life, and not the time between them."""
    gpu_hours: Float | None = Field(None, gt=0)
    """The same once trials have taken so many GPU-hours, those that were interrupted included."""
    stalled_trials: Int | None = Field(None, ge=1)
    """Start no further trial once so many have ended in a row without the hypervolume growing."""
    stalled_growth: Float = Field(0.01, ge=0)
    """Growth over those trials that does not count, as a share of the hypervolume."""


class ResourcesConfig(StrictModel):
    """What a trial runs on."""

    workers: Int = Field(1, ge=1)
    """Data-parallel workers per trial, which share every batch; the result does not depend on their number."""
    min_workers: Annotated[Int, Field(ge=1)] | None = None
    """Fewest workers a trial goes on with when nodes are lost, from its last checkpoint; ``workers`` is then the most,
    and it grows again when nodes return. Left out, their number is fixed."""
    cpus_per_worker: Int = Field(1, ge=1)
    """CPUs per worker, which are its threads."""
    gpus_per_worker: Literal["auto"] | Annotated[Float, Field(ge=0)] = "auto"
    """GPUs per worker; a fraction shares one, and its memory; ``auto`` is one if the cluster has any."""
    accelerator: Text | None = None
    """Type of accelerator that workers run on, as Ray names it (``H100``, ``A100-80G``); left out, any."""
    concurrent: Literal["auto"] | Annotated[Int, Field(ge=1)] = "auto"
    """Trials at a time; ``auto`` is as many as fit."""
    executor: Text = "train"
    """``train`` starts a Ray Train job per trial, over several nodes if need be; ``warm`` keeps workers with base model
    and rewards loaded, and gives them trial after trial: for many short ones. The numbers are the same."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the frozen networks; ``auto`` is bf16 on a GPU and fp32 on a CPU. Adapters stay in fp32."""
    prefix_precision: Literal["same", "bf16"] = "same"
    """Number format of the steps without gradient; bf16 is faster where the hardware has it, and its trajectories
    differ by the rounding. Not for policy gradients, which must score a step in the arithmetic that drew it."""
    compile: Bool = False
    """Compile the network with torch.compile: faster steps after a minute or more of compiling."""
    threads_per_worker: Literal["auto"] | Annotated[Int, Field(ge=1)] = "auto"
    """CPU threads per worker; ``auto`` shares the machine out."""
