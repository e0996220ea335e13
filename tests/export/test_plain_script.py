"""A script that has never heard of rltune draws the images that rltune's own evaluation saw."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rltune.config.experiment import RunConfig
from rltune.diffusion.loading import load_model
from rltune.export.base import Adapter
from rltune.export.diffusers import Diffusers
from rltune.training.checkpoint import load_adapter
from rltune.training.evaluation import EVAL_SEED
from rltune.training.loop import train_run
from rltune.training.reporter import FolderReporter
from rltune.training.streams import Stream, noise
from tests.tiny import EVAL_PROMPTS

SCRIPT = """
import json, sys
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

base, lora, latents, prompts, steps, base_steps, guidance, output = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
if lora:
    pipeline.load_lora_weights(lora)


def switch(pipeline, step, timestep, tensors):
    if lora and step + 1 == int(base_steps):
        pipeline.enable_lora()
    return tensors


if lora and int(base_steps):
    pipeline.disable_lora()
images = pipeline(json.loads(prompts), latents=torch.from_numpy(np.load(latents)), num_inference_steps=int(steps),
                  guidance_scale=float(guidance), output_type="np", callback_on_step_end=switch).images
np.save(output, images)
assert "rltune" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("base_steps", [0, 2])
def test_plain_diffusers_gives_the_images_of_the_last_evaluation(
    make_config: Callable[..., RunConfig], tmp_path: Path, base_steps: int
) -> None:
    base = make_config().model.base
    config = make_config(
        model={"base": base, "lora": {"rank": 2, "alpha": 8.0}},
        sampler={"base_steps": base_steps},
        rewards={"brightness": {}},
        optim={"lr": 2e-2, "steps": 4},
        evaluate={"every": 4, "images_per_prompt": 1},
    )
    reporter = FolderReporter(tmp_path / "checkpoints")
    train_run(config, trial_dir=tmp_path / "trial", base_dir=tmp_path / "base", reporter=reporter)
    checkpoint = reporter.latest()
    assert checkpoint is not None
    model = load_model(base)
    state = load_adapter(checkpoint)
    (lora,) = Diffusers().write(model, Adapter(state, 2, 8.0, "attention"), tmp_path / "export")
    shape = model.latent_shape(*model.size_px)
    latents = noise(EVAL_SEED, Stream.EVAL_LATENT, [(i,) for i in range(len(EVAL_PROMPTS))], shape)
    np.save(tmp_path / "latents.npy", latents.numpy())

    def draw(folder: str) -> np.ndarray:
        output = tmp_path / "images.npy"
        arguments = [base, folder, str(tmp_path / "latents.npy"), json.dumps(EVAL_PROMPTS)]
        arguments += [str(config.sampler.steps), str(base_steps), str(config.sampler.guidance), str(output)]
        subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True, timeout=300)
        return np.load(output) * 255

    seen = np.asarray(Image.open(tmp_path / "trial" / "samples" / "step-000004.png"), dtype=np.float64)
    height, width = model.size_px
    seen = seen.reshape(len(EVAL_PROMPTS), height, width, 3)  # one column, a row an image
    drawn, untrained = draw(str(lora.parent)), draw("")
    # the picture is rounded to bytes, half a level, and float32 sums differ in order
    assert np.abs(drawn - seen).max() < 0.6
    assert np.abs(untrained - seen).max() > 5
