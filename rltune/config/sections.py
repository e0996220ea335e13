"""The sections of an experiment, each value concrete. Bounds here; what spans sections is in ``clashes.py``."""

from collections.abc import Mapping
from os.path import expanduser
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from rltune.config.strict import Bool, Float, Int, Options, PathText, StrictModel, Text


def _at_home(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with ``~`` spelt out where one is a path that starts with it."""
    return {
        name: expanduser(value) if isinstance(value, str) and value.startswith("~/") else value
        for name, value in options.items()
    }


Beta = Annotated[Float, Field(ge=0, lt=1)]


class EstimatorConfig(StrictModel):
    """How the reward's gradient is estimated."""

    name: Text = "alignprop"
    """Name of the estimator."""
    k: Int | None = Field(None, ge=1, le=1000)
    """Truncation depth K: how many of the T steps carry gradient. The cost grows linearly in K. Left out, it is the
    estimator's own default."""
    draw: Literal["fixed", "uniform", "gaussian", "per_step"] | None = None
    """How AlignProp draws K, once a round for all its images: ``fixed`` takes k; ``uniform`` (the default) one of 1..k;
    ``gaussian`` a normal number with mean k and deviation std, drawn again until it lies in 1..T; ``per_step`` decides
    for every step by itself whether it carries gradient."""
    std: Float | None = Field(None, gt=0)
    """Standard deviation of K in steps; read only when ``draw`` is ``gaussian``."""
    checkpoint: Literal["auto", "always", "never", "serial"] = "auto"
    """What becomes of the activations of steps that carry gradient: ``always`` computes them again in the backward pass
    (less memory, slower), ``never`` keeps them, ``auto`` keeps as many as ``activation_gib`` allows, and ``serial``
    takes one step at a time, for estimators whose inputs are detached. The gradient is the same."""
    activation_gib: Literal["auto"] | Annotated[Float, Field(ge=0)] = "auto"
    """GiB that ``checkpoint: auto`` may fill in each worker; ``auto`` is 60 % of what is free, shared by the workers of
    a machine."""
    guidance_gradient: Literal["both", "text", "text_rescaled"] = "both"
    """Which branches of classifier-free guidance carry gradient: ``both``, as the formula has it; ``text``, the
    prompt's alone; ``text_rescaled``, the prompt's alone divided by the guidance scale. The latter two are other
    estimators, and cheaper."""
    options: Options = Field({})
    """Further options of this estimator; ``rltune estimators`` lists them."""


class RegularizeConfig(StrictModel):
    """What keeps the model near the base model, or on flat ground, while it follows the reward; 0 is off."""

    drift: Float = Field(0.0, ge=0)
    """Weight of the squared distance of the network's output from the base model's, over the steps that are trained."""
    attention: Float = Field(0.0, ge=0)
    """Weight of a loss on the maps of cross-attention in the trained steps: every word of the prompt that says what is
    in the picture is to be looked at. Stable Diffusion 1.x and 2.x, SDXL and the built-in model alone;
    ``sampler.attention.layers`` names the layers."""
    flatness_weights: Float = Field(0.0, ge=0, le=1)
    """RSA-FT: take the gradient after a step of this length uphill in the loss, in adapter weights. Doubles the
    cost."""
    flatness_image: Float = Field(0.0, ge=0, le=10)
    """RSA-FT: score each image after a step of this L2 length that lowers its reward. One more reward query an
    image."""


class TrustConfig(StrictModel):
    """A reward's part of an image's loss counts more where it knows what it sees: trust by the distance of its features
    from these. Policy gradients, which compare images by all rewards at once, weigh by the mean of the trusts."""

    reference: PathText | None = None
    """Images like those that the reward was trained on: a folder of them, a safetensors file with a tensor ``features``
    of shape (N, D), or ``builtin``, scenes of the built-in world. Left out, every image counts the same."""
    slope: Float = Field(0.7, ge=0)
    """How fast trust falls with the distance; an image like the references has distance 1."""
    offset: Float = 1.4
    """Logarithm of the weight at distance 0."""
    ceiling: Float = Field(2.21, ge=1)
    """Greatest weight of an image; the least is 1."""


class RelativeConfig(StrictModel):
    """The reward for the prompt with one kind of words before it, minus that with another."""

    positive: Text | None = None
    """Words of what to move towards, such as ``Realistic photo``. Leave out both these and ``negative`` to switch it
    off."""
    negative: Text | None = None
    """Words of what to move away from."""
    k: Float = Field(0.0, ge=0)
    """Extra weight of the positive term."""


class RewardConfig(StrictModel):
    """One reward that is trained on."""

    reward: Text | None = None
    """What it is: a name that ``rltune rewards`` lists, or ``module:name`` of your own; the key itself if left out."""

    weight: Float = Field(1.0, ge=0)
    """Weight in the sum, after each reward is standardised on the base model; 0 only watches it."""
    loss: Literal["linear", "hinge", "target"] = "linear"
    """``linear`` raises the score r without end. ``hinge`` raises it up to ``target`` and no further: relu(target - r).
    ``target`` brings it to ``target``: |target - r|."""
    target: Float | None = None
    """Where ``hinge`` and ``target`` aim, in the unit that the reward is reported in."""
    negate: Bool = False
    """Train, and report, minus the reward."""
    relative: RelativeConfig = RelativeConfig()
    """Score it relative to control words, so that what it likes about every image cancels."""
    trust: TrustConfig = TrustConfig()
    """Let images count more, in this reward's part of the loss, where it knows what it sees."""
    standardise: Bool = True
    """Weigh the reward in standard deviations of the base model; if false, in its own unit."""
    micro_batch: Int | None = Field(None, ge=1)
    """Images it scores at a time; left out, as many as memory holds."""
    options: Annotated[Options, AfterValidator(_at_home)] = Field({})
    """Options of this reward."""


class MixtureConfig(StrictModel):
    """How several rewards become one number."""

    method: Literal["sum", "chebyshev", "win_rate", "non_dominated", "gradient_balance", "min_norm"] = "sum"
    """What is raised. ``sum``: the weighted sum. ``chebyshev``: the reward that lags behind most. ``win_rate``: how
    often an image beats the base model's. ``non_dominated``: the sum, over those images of a batch that no other
    beats in every reward. ``gradient_balance``: the sum, with weights as shares of the image gradient. ``min_norm``:
    all at once, along the shortest mix of their image gradients, whatever their weights (MGDA)."""
    ideal: Float = 3.0
    """What every reward should come to under ``chebyshev``, in standard deviations of the base model."""
    rho: Float = Field(0.05, ge=0)
    """How much the others count under ``chebyshev``."""


class OptimConfig(StrictModel):
    """AdamW on the adapter."""

    lr: Float = Field(1e-3, ge=0, le=1)
    """Learning rate; 0 trains nothing, as a control."""
    steps: Int = Field(100, ge=1)
    """Rounds of training, each with ``batch`` new images. A round is one optimiser step, or several for policy
    gradients with ``epochs``."""
    queries: Int | None = Field(None, ge=1)
    """Number of reward queries after which training ends, if ``steps`` has not ended it before. It gives estimators
    that query more than once an image the same budget as others."""
    batch: Int = Field(8, ge=1)
    """Images per optimiser step, over all workers."""
    micro_batch: Int | None = Field(None, ge=1)
    """Images that a worker holds in memory at a time; gradients add up over the batch. Left out, a worker's whole
    share."""
    max_grad_norm: Float = Field(1.0, gt=0)
    """A gradient with a greater norm is scaled down to this one."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    weight_decay: Float = Field(1e-4, ge=0)
    """Decoupled weight decay."""
    eps: Float = Field(1e-8, gt=0)
    """Added to the denominator of Adam's update."""
    ema: Beta = 0.0
    """Decay per round of a moving average of the adapters, which is then evaluated and exported; 0 is off."""


JOINT_SHARES = ("domination", "collapse")
"""Judges that cost nothing, and are measured wherever an objective has a score for each image."""
DISTANCES = ("diversity", "drift")
"""Judges that look at images, and have no score for each."""


class EvaluateConfig(StrictModel):
    """What is measured on held-out prompts."""

    every: Int = Field(20, ge=1)
    """Rounds of training between evaluations."""
    prompts: Int = Field(16, ge=1)
    """How many of the evaluation prompts are used, from the first on; repeats are left out."""
    images_per_prompt: Int = Field(2, ge=1)
    """Images per prompt, always from the same seeds."""
    judges: tuple[Text, ...] = ("diversity", "drift")
    """What is measured but never trained on: ``diversity``, ``drift``, or any reward that is not in ``rewards``.
    ``domination`` and ``collapse`` are measured in any case: the shares of images that are better, and worse, than the
    base model's of the same noise in every objective at once."""
    confirm: Literal["auto"] | Annotated[Int, Field(ge=0)] = "auto"
    """How many fresh prompts the members of the front, or a selected checkpoint, are measured on again at the end, with
    other noise. They are those of ``prompts.eval`` behind the first ``prompts``. ``auto`` is as many as ``prompts``; 0
    is off. If fewer than half as many are left, those of the search are drawn again."""
    select: Text = "last"
    """Which of a trial's checkpoints counts and is exported: ``last``, or the best by the objective, reward or judge
    that is named here, among those that keep every constraint; the last if none does."""


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


class SweepConfig(StrictModel):
    """What a sweep does besides at its end, with the knee and the best LoRA of each objective; nothing is trained."""

    soup: Bool = False
    """Mix each two of these LoRAs at weights 1/4, 1/2 and 3/4 (exact sums of their updates), measure the mixtures on
    the fresh prompts and noise of ``evaluate.confirm``, and add those that nothing beats to the front, as soups."""
    strengths: Bool = False
    """Measure these LoRAs at strengths 0.25, 0.5, 0.75 and 1.25 in the same way; the report draws the curves."""


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
    rewards_on: Literal["same", "second_gpu"] = "same"
    """GPU that rewards run on: the denoiser's, or the worker's second, for models and rewards that do not fit on one
    together; ``gpus_per_worker`` is then 2 or more. The gradient is carried across."""
    accelerator: Text | None = None
    """Type of accelerator that workers run on, as Ray names it (``H100``, ``A100-80G``); left out, any."""
    concurrent: Literal["auto"] | Annotated[Int, Field(ge=1)] = "auto"
    """Trials at a time; ``auto`` is as many as fit."""
    nodes: Literal["present", "autoscale"] = "present"
    """Nodes that count before the start: those that are ``present``, or also those that the cluster's autoscaler brings
    once trials wait for them. With ``autoscale`` nothing is refused for want of room, and ``concurrent`` and
    ``gpus_per_worker`` must be written as numbers, since no node is there to say them."""
    executor: Text = "train"
    """``train`` starts a Ray Train job per trial, over several nodes if need be; ``warm`` keeps workers with base model
    and rewards loaded, and gives them trial after trial: for many short ones. The numbers are the same."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the frozen networks; ``auto`` is bf16 on a GPU and fp32 on a CPU. Adapters stay in fp32."""
    decoder_precision: Literal["same", "fp32", "bf16"] = "same"
    """Number format of the image decoder, where it is to be another than the network's: a decoder in ``fp32`` costs
    twice its memory, and an image less rounding."""
    prefix_precision: Literal["same", "bf16"] = "same"
    """Number format of the steps without gradient; bf16 is faster where the hardware has it, and its trajectories
    differ by the rounding. Not for policy gradients, which must score a step in the arithmetic that drew it."""
    checkpoint_blocks: Literal["auto"] | Bool = "auto"
    """Whether each block of the network stores its input only while training, and is computed again in the backward
    pass: much less memory for a third more time. ``auto`` does so where one step does not fit otherwise. The gradient
    is the same."""
    decoder_tiles: Literal["auto"] | Bool = "auto"
    """Whether images are decoded in overlapping tiles of about 512 px while training, one in memory at a time, which
    changes them a little at the seams. ``auto`` does so where both the image and those the model was made for are
    longer than 768 px, on every machine alike. Evaluation decodes whole."""
    compile: Bool = False
    """Compile the network's repeated blocks, where its class names them, or all of it, with torch.compile: faster steps
    after minutes of compiling. The code is kept on disk for the next trial, or run, on the machine."""
    threads_per_worker: Literal["auto"] | Annotated[Int, Field(ge=1)] = "auto"
    """CPU threads per worker; ``auto`` shares the machine out."""
