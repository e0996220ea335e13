"""The section ``model`` of an experiment: what is fine-tuned, and the adapter."""

from typing import Annotated, Literal

from pydantic import Field

from rltune.config.strict import Bool, Float, Int, PathText, StrictModel, Text


class LoraConfig(StrictModel):
    """The low-rank adapter that is trained; the base model stays as it is."""

    rank: Int = Field(4, ge=1, le=1024)
    """Rank of every adapter matrix: more can express more, and drifts further."""
    alpha: Literal["rank"] | Annotated[Float, Field(gt=0)] = "rank"
    """LoRA alpha; the update is scaled by alpha / rank. ``rank`` means alpha = rank, a scale of 1."""
    targets: Literal["attention", "all"] | Annotated[tuple[Text, ...], Field(min_length=1)] = "attention"
    """Layers that get an adapter: ``attention``, ``all``, or a list of module names."""
    rslora: Bool = False
    """Scale the update by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)."""
    start: PathText | None = None
    """A LoRA to start from, a file or a folder, in the layout of rltune, diffusers, kohya or PEFT; of the same rank,
    and of layers among ``targets``. Gains are still over the base model without it."""
    dora: Bool = False
    """Train the norm of every row of the adapted weights besides (DoRA); a step takes longer."""

    @property
    def alpha_value(self) -> float:
        """Alpha as a number."""
        return float(self.rank if self.alpha == "rank" else self.alpha)


class AdapterConfig(StrictModel):
    """What is optimised."""

    kind: Text = "lora"
    """``lora``: one LoRA, as the section ``model.lora`` has it. ``basis``: such a LoRA for each reward of positive
    weight, trained together so that any mix of them is good for that mix of the rewards. ``conditioning``: no weights,
    but one number a sampling step, which mixes a prompt's embedding with that of a styled prompt. ``prompt``: nothing
    is trained; the words that a template adds to every prompt are measured, and searched."""


class BasisConfig(StrictModel):
    """The mixes that LoRAs of a basis are trained at, one drawn for every image (``model.adapter.kind: basis``)."""

    concentration: Float = Field(0.6, ge=0.05, le=100)
    """Of the Dirichlet distribution that weights are drawn from: 1 is even on the simplex, less is nearer its edges."""
    corners: Float = Field(0.2, ge=0, le=1)
    """Share of images that are trained on one reward alone, each as often."""
    centre: Float = Field(0.1, ge=0, le=1)
    """Share of images that are trained on all rewards equally; with ``corners`` 1 at most."""
    least_strength: Float = Field(1.0, ge=0, le=1)
    """Below 1, the LoRAs of an image are scaled by a strength drawn evenly from here to 1, so that a weaker set is
    trained too."""
    points: Int = Field(5, ge=2, le=21)
    """Mixes along each edge of the simplex that a sweep measures at its end, of every basis on its front."""


class ConditioningConfig(StrictModel):
    """What prompts are mixed with (``model.adapter.kind: conditioning``)."""

    styled: Text = "{prompt}, in warm light"
    """The styled prompt, with ``{prompt}`` for the prompt itself. At every sampling step the network is told of a mix
    of both embeddings, (1 - lambda) of the prompt's and lambda of the styled one's; the lambdas are trained."""


class PromptConfig(StrictModel):
    """What words are added to prompts (``model.adapter.kind: prompt``)."""

    template: Text = "{prompt}"
    """What the network is told, with ``{prompt}`` for the prompt itself, and other names in braces for ``words``:
    ``"{prompt}, {light}, {style}"``. Rewards and judges are told of the prompt itself."""
    words: dict[Text, str] = Field({})
    """What stands for each name: ``light: {choice: [even light, dark corners, ""]}`` is searched. Where it is empty,
    the comma before it goes too."""


class ModelConfig(StrictModel):
    """What is fine-tuned."""

    base: PathText = "builtin"
    """``builtin``, a Hugging Face id, a local folder in diffusers format, or a checkpoint in one .safetensors file."""
    revision: Text | None = None
    """Branch, tag or commit of a Hugging Face id; the default branch if left out."""
    config: PathText | None = None
    """For a checkpoint in one file: folder or Hugging Face id of a pipeline of its kind, which has its settings, its
    tokenizers and what the file lacks; the published model's if left out."""
    drop: tuple[Text, ...] = ()
    """Text encoders to do without: ``[text_encoder_3]``, T5, of Stable Diffusion 3 and 3.5."""
    quantise: Literal["none", "nf4", "int8"] = "none"
    """Keep the frozen network's linear layers rounded while training: ``nf4`` in 4 bits (bitsandbytes), ``int8`` in 8
    (torchao, weights alone). Gains are over the base model so rounded; exports are made for, and proved on, the one
    that is not. Needs the extra ``quantise``."""
    adapter: AdapterConfig = AdapterConfig()
    """What is optimised."""
    lora: LoraConfig = LoraConfig()
    """The adapter that is trained."""
    basis: BasisConfig = BasisConfig()
    """The mixes that LoRAs of a basis are trained at."""
    conditioning: ConditioningConfig = ConditioningConfig()
    """What prompts are mixed with."""
    prompt: PromptConfig = PromptConfig()
    """What words are added to prompts."""
