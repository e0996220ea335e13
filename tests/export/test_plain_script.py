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

jobs, base, latents, prompts, steps, guidance = sys.argv[1:]


def draw(lora, base_steps):
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    if lora:
        pipeline.load_lora_weights(lora)

    def switch(pipeline, step, timestep, tensors):
        if lora and step + 1 == base_steps:
            pipeline.enable_lora()
        return tensors

    if lora and base_steps:
        pipeline.disable_lora()
    return pipeline(json.loads(prompts), latents=torch.from_numpy(np.load(latents)), num_inference_steps=int(steps),
                    guidance_scale=float(guidance), output_type="np", callback_on_step_end=switch).images


for lora, base_steps, output in json.loads(jobs):
    np.save(output, draw(lora, base_steps))
assert "rltune" not in sys.modules
"""


@pytest.mark.long
def test_plain_diffusers_gives_the_images_of_the_last_evaluation(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    base = make_config().model.base
    model = load_model(base)
    jobs: list[tuple[str, int, str]] = []
    seen = {}
    for base_steps in (0, 2):
        root = tmp_path / str(base_steps)
        config = make_config(
            model={"base": base, "lora": {"rank": 2, "alpha": 8.0}},
            sampler={"base_steps": base_steps},
            rewards={"brightness": {}},
            optim={"lr": 2e-2, "steps": 4},
            evaluate={"every": 4, "images_per_prompt": 1},
        )
        reporter = FolderReporter(root / "checkpoints")
        train_run(config, trial_dir=root / "trial", base_dir=root / "base", reporter=reporter)
        checkpoint = reporter.latest()
        assert checkpoint is not None
        (lora,) = Diffusers().write(model, Adapter(load_adapter(checkpoint), 2, 8.0, "attention"), root / "export")
        jobs += [(str(lora.parent), base_steps, str(root / "drawn.npy")), ("", base_steps, str(root / "untrained.npy"))]
        seen[root] = np.asarray(Image.open(root / "trial" / "samples" / "step-000004.png"), dtype=np.float64)

    shape = model.latent_shape(*model.size_px)
    latents = noise(EVAL_SEED, Stream.EVAL_LATENT, [(i,) for i in range(len(EVAL_PROMPTS))], shape)
    np.save(tmp_path / "latents.npy", latents.numpy())
    arguments = [json.dumps(jobs), base, str(tmp_path / "latents.npy"), json.dumps(EVAL_PROMPTS)]
    arguments += [str(config.sampler.steps), str(config.sampler.guidance)]
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True, timeout=300)

    height, width = model.size_px
    for root, picture in seen.items():
        expected = picture.reshape(len(EVAL_PROMPTS), height, width, 3)  # one column, a row an image
        drawn, untrained = (np.load(root / f"{name}.npy") * 255 for name in ("drawn", "untrained"))
        # the picture is rounded to bytes, half a level, and float32 sums differ in order
        assert np.abs(drawn - expected).max() < 0.6, root.name
        assert np.abs(untrained - expected).max() > 5, root.name
