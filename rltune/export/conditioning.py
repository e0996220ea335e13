"""``conditioning.json``: numbers that mix prompts, and the script that applies them in diffusers."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from rltune.config.experiment import RunConfig
from rltune.diffusion.adapter_files import load_adapter_file
from rltune.diffusion.conditioning import MIX_FILE, PLACE, attached_mix
from rltune.diffusion.families.base import ModelFamily
from rltune.errors import RunError
from rltune.records import to_record
from rltune.training.adapters.base import MixValues

SCRIPT = """import json

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
BASE
prompt = "a red circle on a white background"
with open("FILE") as file:
    made = json.load(file)
pipeline = StableDiffusionPipeline.from_pretrained(FROM, safety_checker=None)
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)

is_guided = made["guidance"] > 1
styled = made["styled"].replace("{prompt}", prompt)
plain, negative = pipeline.encode_prompt(prompt, "cpu", 1, is_guided, made["negative"])
other, _ = pipeline.encode_prompt(styled, "cpu", 1, False)


def mixed(step):
    return (1 - made["lambdas"][step]) * plain + made["lambdas"][step] * other


def tell(pipeline, step, timestep, tensors):  # after each step, what the next is told; with guidance both halves
    if step + 1 < made["steps"]:
        text = mixed(step + 1)
        tensors["prompt_embeds"] = torch.cat([negative, text]) if is_guided else text
    return tensors


image = pipeline(
    prompt_embeds=mixed(0),
    negative_prompt_embeds=negative,
    num_inference_steps=made["steps"],
    guidance_scale=made["guidance"],
    eta=made["eta"],
    callback_on_step_end=tell,
    callback_on_step_end_tensor_inputs=["prompt_embeds"],
).images[0]
image.save("circle.png")"""
"""For Stable Diffusion on a CPU; FILE, BASE and FROM are put in."""
OR_ELSE = "the built-in model; else the folder or Hugging Face id of your base"


def script(base: str, file: str) -> str:
    """Return a script that draws with the numbers of a file, for a base model that is a Stable Diffusion pipeline."""
    line = f"from rltune.assets import BUILTIN_PIPELINE_DIR  # {OR_ELSE}\n" if base == "builtin" else ""
    name = "BUILTIN_PIPELINE_DIR" if base == "builtin" else repr(base)
    return SCRIPT.replace("BASE\n", f"{line}\n", 1).replace("FROM", name).replace("FILE", file)


@dataclass(frozen=True)
class Mixed:
    """Trained numbers that mix prompts. Those that are broken, or do nothing at all, cannot be made.

    Raises:
        RunError: All are exactly zero, or one is not finite.
    """

    values: MixValues
    config: RunConfig
    """What they were trained with, settled."""
    about: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lambda_T = self.values.state["lambda_T"]
        if not lambda_T.isfinite().all():
            raise RunError("the adapter's lambda_T is not finite; lower the learning rate")
        if not lambda_T.any():
            raise RunError("the adapter is exactly zero, so that it would be the base model; was it trained?")
        if self.values.template == PLACE:
            raise RunError("it adds no words to prompts, so that it would be the base model; pick another trial")

    @property
    def content(self) -> dict[str, Any]:
        """What the file says."""
        model, sampler = self.config.model, self.config.sampler
        timesteps = self.values.state["timesteps_T"].tolist()
        return to_record(
            {
                "kind": "conditioning",
                "base_model": model.base,
                "base_revision": model.revision,
                "styled": self.values.template,
                "timesteps": [int(t) if t == int(t) else t for t in timesteps],
                "lambdas": self.values.state["lambda_T"].tolist(),
                "steps": sampler.steps,
                "guidance": sampler.guidance,
                "embedded_guidance": sampler.embedded_guidance,
                "eta": sampler.eta,
                "negative": sampler.negative,
            }
        )


@dataclass(frozen=True)
class ConditioningFile:
    """The numbers with their timesteps and the template, and how the images were drawn that they were trained on."""

    name: ClassVar[str] = "conditioning"
    reader: ClassVar[str] = "rltune"

    def write(self, model: ModelFamily, adapter: Mixed, folder: Path) -> tuple[Path, ...]:
        """Write the file."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MIX_FILE).write_text(json.dumps(adapter.content, indent=1) + "\n", encoding="utf-8")
        return (folder / MIX_FILE,)

    def load(self, model: ModelFamily, folder: Path) -> Iterable[tuple[str, Tensor]]:
        """Attach what the file says; return the numbers and their timesteps, by name."""
        load_adapter_file(model, folder / MIX_FILE)
        mix = attached_mix(model.network)
        assert mix is not None
        return [(name, getattr(mix, name).detach().cpu()) for name in ("lambda_T", "timesteps_T")]

    def how_to_load(self, model: ModelFamily, folder: Path) -> str:
        """Return a command that draws with it."""
        return f"rltune sample {folder}"
