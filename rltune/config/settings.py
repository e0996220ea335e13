"""The sections of a whole experiment, each right by itself; what must fit together is checked in ``experiment.py``."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from rltune.config.model_section import ModelConfig
from rltune.config.prompts_section import PromptsConfig
from rltune.config.sampling import SamplerConfig
from rltune.config.sections import (
    ConstraintConfig,
    EstimatorConfig,
    EvaluateConfig,
    MixtureConfig,
    OptimConfig,
    RegularizeConfig,
    ResourcesConfig,
    RewardConfig,
    SearchConfig,
    StopConfig,
    SweepConfig,
)
from rltune.config.strict import EmptyIfNone, Int, StrictModel, Text

NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
NAME_RULE = "1 to 100 letters, digits, '.', '_' or '-', a letter or digit first"


class Settings(StrictModel):
    """Every setting of an experiment, concrete."""

    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")] = Field(
        "experiment", json_schema_extra={"x-expects": NAME_RULE}
    )
    """Name of the run and of its folder; the file's name if left out."""
    task: Literal["text_to_image", "inpaint"] = "text_to_image"
    """What is drawn of a prompt: an image, or the part of an image that a mask leaves open (``inpaint``)."""
    model: ModelConfig = ModelConfig()
    """What is fine-tuned."""
    prompts: PromptsConfig = PromptsConfig()
    """Where prompts come from."""
    sampler: SamplerConfig = SamplerConfig()
    """How an image is drawn."""
    estimator: EstimatorConfig = EstimatorConfig()
    """How the reward's gradient is estimated."""
    rewards: Annotated[dict[str, RewardConfig], EmptyIfNone] = Field({})
    """What is trained on, by name; at least one."""
    mixture: MixtureConfig = MixtureConfig()
    """How the rewards become one number."""
    optim: OptimConfig = OptimConfig()
    """The optimiser, AdamW, and how long it runs."""
    regularize: RegularizeConfig = RegularizeConfig()
    """What keeps the model near the base model, or on flat ground, while it follows the reward; 0 is off."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured on held-out prompts."""
    objectives: tuple[Text, ...] = ()
    """What the Pareto front is over: rewards or judges; left out, every reward."""
    constraints: Annotated[dict[str, ConstraintConfig], EmptyIfNone] = Field({})
    """What a trial must keep to be feasible, by reward or judge."""
    search: SearchConfig = SearchConfig()
    """How the distributions are searched."""
    stop: StopConfig = StopConfig()
    """When to end a trial, or the whole sweep, early."""
    sweep: SweepConfig = SweepConfig()
    """What a sweep does besides at its end."""
    resources: ResourcesConfig = ResourcesConfig()
    """What a trial runs on."""
    track: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Trackers that also receive every trial's figures; ``pip install "rltune[track]"`` has them."""
    seed: Int = Field(0, ge=0, lt=2**32)
    """Seed of training: prompts, noise, K."""

    @property
    def objective_names(self) -> tuple[str, ...]:
        """The objectives; every reward if none are named."""
        return self.objectives or tuple(self.rewards)

    @property
    def num_rounds(self) -> int:
        """Greatest number of rounds a run can take: an image costs at least one query; 0 for words alone."""
        if self.model.adapter.kind == "prompt":
            return 0
        queries = self.optim.queries
        return self.optim.steps if queries is None else min(self.optim.steps, -(-queries // self.optim.batch))

    @property
    def first_rung(self) -> int:
        """Training step at which pruning first compares trials."""
        return self.search.grace or self.evaluate.every

    def kind_of(self, reward: str) -> str:
        """What a reward of this experiment is: a registered name, or ``module:function``."""
        return self.rewards[reward].reward or reward

    @property
    def trained_rewards(self) -> tuple[str, ...]:
        """The rewards of positive weight."""
        return tuple(name for name, reward in self.rewards.items() if reward.weight > 0)

    @property
    def lora_rank(self) -> int:
        """Rank of what is attached to a layer: of every LoRA that is trained, together."""
        num_loras = len(self.trained_rewards) if self.model.adapter.kind == "basis" else 1
        return num_loras * self.model.lora.rank

    @property
    def weights(self) -> Mapping[str, float]:
        """Reward name -> weight."""
        return {name: reward.weight for name, reward in self.rewards.items()}
