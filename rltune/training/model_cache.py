"""Base models, rewards and embedded prompts: loaded once, and kept between the runs of one process."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from rltune.config.experiment import RunConfig
from rltune.diffusion.embeddings import PromptEmbeddings
from rltune.diffusion.families.base import ModelFamily
from rltune.diffusion.loading import load_model
from rltune.diffusion.switches import detach
from rltune.rewards.base import Reward
from rltune.rewards.wrappers import Elsewhere
from rltune.training.rewards import build_rewards


class ModelCache:
    """Loads what a run needs, or hands out what an earlier run of this process has loaded.

    A run on a used cache gives the numbers of one on a new cache, bit for bit: models come without the adapters of the
    run before, and prompts are embedded in the same batches or taken as they were. One run at a time uses it.
    """

    def __init__(self) -> None:
        self._models: dict[Hashable, ModelFamily] = {}
        self._rewards: dict[Hashable, dict[str, Reward]] = {}
        self._embeddings: dict[Hashable, PromptEmbeddings] = {}

    def model(self, config: RunConfig, device: torch.device) -> ModelFamily:
        """Return the base model of an experiment, without adapters.

        Raises:
            UserError: The weights are not there.
        """
        key = self._model_key(config, device)
        if key not in self._models:
            self._clear(self._models, self._embeddings)
            self._models[key] = load_base_model(config, device)
        model = self._models[key]
        detach(model.network)
        return model

    def rewards(
        self, config: RunConfig, judges: tuple[str, ...], device: torch.device, *, is_apart: bool = False
    ) -> dict[str, Reward]:
        """Return the rewards of an experiment and the rewards among its judges, by name.

        Args:
            config: The experiment.
            judges: Names of rewards that are only measured.
            device: Where they run.
            is_apart: Whether that is another device than the images'.

        Raises:
            UserError: An option has a value that the reward does not take.
            RunError: Weights are not on this machine.
        """
        defining = {"reward", "options", "negate", "relative", "micro_batch"}
        sections = {name: section.model_dump_json(include=defining) for name, section in config.rewards.items()}
        key = (tuple(sections.items()), judges, device, is_apart)
        if key not in self._rewards:
            self._clear(self._rewards)
            rewards = build_rewards(config, judges, device)
            apart: dict[str, Reward] = {name: Elsewhere(reward, device) for name, reward in rewards.items()}
            self._rewards[key] = apart if is_apart else rewards
        return self._rewards[key]

    def embeddings(
        self, config: RunConfig, model: ModelFamily, prompts: Sequence[str], beside: Sequence[str] = ()
    ) -> PromptEmbeddings:
        """Return the embeddings of these prompts, each to be computed when it is asked for.

        Those ``beside`` them are embedded apart, so that what else is asked for changes none of the prompts' own.
        """
        key = (self._model_key(config, None), tuple(prompts), tuple(beside))
        if key not in self._embeddings:
            self._clear(self._embeddings)
            self._embeddings[key] = PromptEmbeddings(model, prompts)
            self._embeddings[key].announce(beside)
        return self._embeddings[key]

    @staticmethod
    def _model_key(config: RunConfig, device: torch.device | None) -> Hashable:
        model, resources = config.model, config.resources
        named = (model.base, model.revision, model.config, model.drop)
        return (*named, model.quantise, resources.precision, resources.decoder_precision, device)

    @staticmethod
    def _clear(*kinds: dict[Any, Any]) -> None:
        """Let go of what was loaded before something else of its kind is: two of each would need not fit."""
        for kind in kinds:
            kind.clear()


def load_base_model(config: RunConfig, device: torch.device, *, dtype: torch.dtype | None = None) -> ModelFamily:
    """Load the base model of an experiment without adapters, in its precision and its decoder's, or all in another.

    In another precision its weights are not quantised.

    Raises:
        UserError: The weights are not there.
    """
    model, own = config.model, _dtype(config.resources.precision, device)
    decoder = config.resources.decoder_precision
    dtypes = own if decoder == "same" else {"default": own, "vae": _dtype(decoder, device)}
    return load_model(
        model.base,
        revision=model.revision,
        config=model.config,
        drop=model.drop,
        dtype=dtype or dtypes,
        device=device,
        quantised=None if dtype is not None or model.quantise == "none" else model.quantise,
    )


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on an accelerator and float32 on a CPU, where a backward pass in bfloat16 is slower."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
