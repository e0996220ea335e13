"""Measure whatever draws images (the base model, LoRAs, blends) on one set of prompts and noise, in this process.

P: prompts.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rltune.config.experiment import RunConfig
from rltune.config.sections import RewardConfig
from rltune.diffusion.adapter_files import load_adapter_file
from rltune.diffusion.sampler import Sampler
from rltune.diffusion.switches import detach, set_strength
from rltune.errors import UserError
from rltune.runs.metrics import Values, summarise
from rltune.training.adapters.base import adapter_of
from rltune.training.checkpoint import load_adapter
from rltune.training.evaluation import ImageSet, Samples, per_prompt, sample_and_score
from rltune.training.figures import Figure, figures_of
from rltune.training.model_cache import ModelCache
from rltune.training.sampling import settled_by
from rltune.training.setup import Run, build_run
from rltune.training.streams import Stream
from rltune.training.workers import Workers

NoiseOf = Literal["search", "fresh"]
"""Whose noise images are drawn from: that by which trials are chosen, or that by which the chosen are confirmed."""
Prepare = Callable[[Sampler], Sampler]
"""Puts adapters on a model that has none, and returns what draws with them."""


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    name: str
    prepare: Prepare
    strength: float = 1.0


@dataclass(frozen=True)
class Assessed:
    """What it measured."""

    name: str
    strength: float
    figures: tuple[Figure, ...]
    values: Mapping[str, Values]
    """Each reward's and judge's mean over the images of every prompt, ``(P,)``."""


@dataclass(frozen=True)
class Bench:
    """A run that only draws, and the images that everything on it is measured on."""

    run: Run
    images: ImageSet
    base: Samples
    """The base model's."""
    only: tuple[str, ...] = ()
    """Rewards and judges that are told of; all if left out."""

    @property
    def base_values(self) -> dict[str, Values]:
        """The base model's, by prompt."""
        return self._values(self.base)

    def assess(self, subjects: Iterable[Subject]) -> Iterator[Assessed]:
        """Yield what the base model measured, and then each subject in turn.

        Raises:
            UserError: A LoRA is not one of this base model.
            NonFiniteError: An image or a reward is not finite.
        """
        base_values = self.base_values
        base_metrics = summarise(base_values, base_values)
        num_prompts = len(self.images.prompts)
        yield Assessed("base", 0.0, figures_of(base_metrics, base_metrics, num_prompts), base_values)
        for subject in subjects:
            self.run.model.pipeline.unload_lora_weights()
            detach(self.run.model.network)
            samples = _draw(self.run, subject.prepare(self.run.sampler), self.images)
            values = self._values(samples)
            figures = figures_of(summarise(values, base_values), base_metrics, num_prompts)
            yield Assessed(subject.name, subject.strength, figures, values)

    def _values(self, samples: Samples) -> dict[str, Values]:
        config = self.run.config
        values = per_prompt(samples, self.base, self.images, config.evaluate.judges, config.objective_names)
        return {name: values[name] for name in self.only or values if name in values}


def make_bench(
    config: RunConfig, noise: NoiseOf, *, only: Sequence[str] = (), cache: ModelCache | None = None
) -> Bench:
    """Load model and rewards, and draw the base model on all held-out prompts of an experiment.

    Args:
        config: The experiment.
        noise: Whose noise images are drawn from.
        only: Rewards and judges that are told of; all if left out.
        cache: What was loaded before.

    Raises:
        UserError: Weights, prompts or a setting are not usable on this machine.
    """
    cache = cache or ModelCache()
    run = build_run(_settled(config, cache), cache)
    images = run.eval_images
    if noise == "fresh":
        images = replace(images, latent_stream=Stream.CONFIRM_LATENT, step_stream=Stream.CONFIRM_STEP_NOISE)
    return Bench(run, images, _draw(run, run.sampler, images), tuple(only))


def _settled(config: RunConfig, cache: ModelCache) -> RunConfig:
    """Return an experiment that only draws with the model's own sampler settings where it leaves them open.

    As an experiment that trains it is checked with a reward that trains, whatever is measured here.
    """
    training = {"rewards": {"brightness": RewardConfig()}, "objectives": (), "constraints": {}}
    own = settled_by(cache.model(config, Workers().device), config.model_copy(update=training))
    return config.model_copy(update={"sampler": own.sampler})


def _draw(run: Run, sampler: Sampler, images: ImageSet) -> Samples:
    return sample_and_score(sampler, images, run.rewards, run.workers, batch_size=run.eval_batch)


@contextmanager
def on_prompts(config: RunConfig, prompts: Sequence[Any]) -> Iterator[RunConfig]:
    """Hold an experiment out on these prompts, all of them, inside the block.

    Args:
        config: The experiment.
        prompts: As ``kept_form`` returns them: text, or rows that name pictures.
    """
    evaluate = config.evaluate.model_copy(update={"prompts": len(prompts)})

    def held(source: str | tuple[str, ...]) -> RunConfig:
        own = config.prompts.model_copy(update={"eval": source})
        return config.model_copy(update={"prompts": own, "evaluate": evaluate})

    if all(isinstance(prompt, str) for prompt in prompts):
        yield held(tuple(prompts))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "eval.json"
        file.write_text(json.dumps(list(prompts)), encoding="utf-8")
        yield held(str(file))


def of_file(file: Path, strength: float) -> Prepare:
    """Return what loads a LoRA file as ``load_adapter_file`` does, at a strength; 0 is the base model.

    A file that reaches a text encoder is refused, since prompts are embedded once for all that is compared.
    """

    def prepare(sampler: Sampler) -> Sampler:
        model = sampler.model
        if others := sorted(load_adapter_file(model, file) - {model.lora_prefix}):
            model.pipeline.unload_lora_weights()
            raise UserError(
                f"{file}: it changes the {', '.join(others)} too, and what is compared shares its prompts; give one "
                f"that was trained on the {model.lora_prefix} alone"
            )
        set_strength(model.network, strength)
        return sampler

    return prepare


def of_checkpoint(config: RunConfig, checkpoint: Path, strength: float) -> Prepare:
    """Return what attaches the adapters of a trial, at a strength."""

    def prepare(sampler: Sampler) -> Sampler:
        adapter_of(config).restore(sampler.model, load_adapter(checkpoint))
        set_strength(sampler.model.network, strength)
        return sampler

    return prepare
