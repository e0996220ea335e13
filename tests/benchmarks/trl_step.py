"""The optimiser step of TRL 0.12.2's ``AlignPropTrainer`` on given inputs: its gradient, and what it costs.

    OMP_NUM_THREADS=1 PYTHON_WITH_TRL tests/benchmarks/trl_step.py FOLDER

Runs where trl 0.12.2, diffusers 0.31, transformers 4.46 and peft 0.13 are installed, and imports nothing of rltune;
``against_trl.py`` prepares the folder and starts this. The folder holds

- ``pipeline/``: the subfolders ``unet``, ``vae`` and ``scheduler`` of a diffusers pipeline whose scheduler is DDIM;
- ``inputs.safetensors``: ``x_T`` (B, C, H, W), ``text`` (B, L, D), ``negative`` (1, L, D), and the adapters under
  ``lora.`` plus peft's key names;
- ``config.json``: ``steps`` (T), ``guidance``, ``eta``, ``noise_seed``, ``num_grad_steps`` (a list of K), ``rank``,
  ``dtype`` (float32 or float64) and ``repeats``.

For every K it writes ``gradient_K.safetensors`` (of -mean reward, under peft's key names) and ``images_K.safetensors``,
and one ``timings.json`` with the least CPU and wall seconds of a step, if ``repeats`` is not 0.

The step is ``AlignPropTrainer.step()`` itself, on a trainer built offline: sampling with checkpointed network calls,
decoding, reward, backward, clipping, AdamW. Given from outside are x_T, the adapters' values, and the prompt embeddings
in place of a text encoder, whose time is thus left out, as is the progress bar's. What the steps' noise is drawn from
is seeded, so that eta > 0 can be compared too.

In TRL, ``truncated_backprop_timestep`` counts sampling steps (not the schedule's timesteps): the network's output is
detached in every step before it. T - K therefore leaves gradient in exactly the last K.

B: images. C, H, W: latent channels, rows, columns. L, D: text tokens and width. P: prompts, the empty one last.
"""

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

TRL_RANK = 4
"""Fixed in TRL's ``get_trainable_layers``, as are alpha = 4 and the attention projections as targets."""


def main() -> None:
    """Take the steps that the folder asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    config = json.loads((folder / "config.json").read_text())
    if config["rank"] != TRL_RANK:
        raise SystemExit(f"TRL's adapters have rank {TRL_RANK}, got {config['rank']}")
    inputs = load_file(folder / "inputs.safetensors")
    bench = Bench(folder, config, inputs)
    timings = {}
    for k in config["num_grad_steps"]:
        gradient, images_B3HW = bench.gradient(k)
        save_file(gradient, folder / f"gradient_{k}.safetensors")
        save_file({"images": images_B3HW}, folder / f"images_{k}.safetensors")
        if config["repeats"]:
            cpu_s, wall_s = bench.time(config["repeats"])
            timings[str(k)] = {"cpu_s": cpu_s, "wall_s": wall_s}
    (folder / "timings.json").write_text(json.dumps(timings, indent=2) + "\n")


class GivenTokenizer:
    """Turns prompt ``"i"`` into the number i, and the empty prompt into -1."""

    model_max_length = 1

    def __call__(self, prompts: Sequence[str], **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([int(prompt or -1) for prompt in prompts]))


class GivenTextEncoder(nn.Module):
    """Looks prompt embeddings up instead of computing them."""

    def __init__(self, text_BLD: Tensor, negative_1LD: Tensor) -> None:
        super().__init__()
        self.register_buffer("table_PLD", torch.cat([text_BLD, negative_1LD]))

    def forward(self, ids_B: Tensor) -> tuple[Tensor]:
        return (self.table_PLD[ids_B],)


class GivenPipeline(DefaultDDPOStableDiffusionPipeline):
    """TRL's pipeline with the networks and schedule of a folder, prompts that are given, and sampling from given x_T.

    Its constructor does what TRL's does, without the text encoder and tokenizer: transformers 4.46 finds none of its
    weights in a text encoder that 5 wrote, and starts from random ones with no more than a warning.
    """

    def __init__(self, folder: Path, inputs: dict[str, Tensor]) -> None:
        self.sd_pipeline = StableDiffusionPipeline(
            unet=UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32),
            vae=AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32),
            scheduler=DDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
            text_encoder=None,
            tokenizer=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.sd_pipeline.unet.requires_grad_(False)
        self.sd_pipeline.vae.requires_grad_(False)
        self.use_lora = True
        self.x_BCHW = inputs["x_T"]
        self._text_encoder = GivenTextEncoder(inputs["text"], inputs["negative"])

    def rgb_with_grad(self, *args: Any, **kwargs: Any) -> Any:
        return super().rgb_with_grad(*args, latents=self.x_BCHW, **kwargs)

    @property
    def tokenizer(self) -> GivenTokenizer:
        return GivenTokenizer()

    @property
    def text_encoder(self) -> GivenTextEncoder:
        return self._text_encoder

    def to_float64(self) -> None:
        """Compute in float64, from the same float32 values; TRL's constructors know only float32 and less."""
        self.unet.double()
        self.vae.double()
        self.x_BCHW = self.x_BCHW.double()
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.double()
        self.scheduler.final_alpha_cumprod = self.scheduler.final_alpha_cumprod.double()


class Bench:
    """A trainer, and the adapters' values that its steps start from."""

    def __init__(self, folder: Path, config: dict[str, Any], inputs: dict[str, Tensor]) -> None:
        self._num_steps = config["steps"]
        self._noise_seed = config["noise_seed"]
        self._lora = {key.removeprefix("lora."): value for key, value in inputs.items() if key.startswith("lora.")}
        self._images_B3HW = torch.empty(0)
        self._gradient: dict[str, Tensor] = {}
        batch = len(inputs["x_T"])
        self._pipeline = GivenPipeline(folder / "pipeline", inputs)
        prompts = iter(range(10**9))
        trainer_config = AlignPropConfig(
            mixed_precision="no",
            accelerator_kwargs={"cpu": True},
            project_kwargs={"project_dir": str(folder)},
            sample_num_steps=config["steps"],
            sample_eta=config["eta"],
            sample_guidance_scale=config["guidance"],
            train_batch_size=batch,
            truncated_backprop_rand=False,
        )
        self._trainer = AlignPropTrainer(
            trainer_config, self._reward, lambda: (str(next(prompts) % batch), {}), self._pipeline
        )
        self._pipeline.set_progress_bar_config(disable=True)
        if config["dtype"] == "float64":
            self._pipeline.to_float64()
        # after the constructor, because accelerate wraps the optimiser that it made
        self._trainer.optimizer.optimizer.register_step_pre_hook(self._keep_gradient)

    def gradient(self, k: int) -> tuple[dict[str, Tensor], Tensor]:
        """Take one step with K = k from the given adapters; return their gradient and the images (B, 3, H, W)."""
        set_peft_model_state_dict(self._pipeline.unet, self._lora)
        held = get_peft_model_state_dict(self._pipeline.unet)
        assert held.keys() == self._lora.keys(), sorted(held.keys() ^ self._lora.keys())[:3]
        assert all(torch.equal(held[key].float(), self._lora[key]) for key in held)
        config = self._trainer.config
        config.truncated_backprop_timestep = self._num_steps - k
        # the gradient is read between clipping and update: an infinite norm leaves it as it is
        config.train_max_grad_norm, clip = float("inf"), config.train_max_grad_norm
        torch.manual_seed(self._noise_seed)
        self._trainer.step(epoch=0, global_step=0)
        config.train_max_grad_norm = clip
        return self._gradient, self._images_B3HW

    def time(self, repeats: int) -> tuple[float, float]:
        """Least CPU and wall seconds of further steps; ``gradient`` came before and has warmed up."""
        cpu_s, wall_s = [], []
        for i in range(repeats):
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            self._trainer.step(epoch=0, global_step=i)
            cpu_s.append(time.process_time() - cpu_start)
            wall_s.append(time.perf_counter() - wall_start)
        return min(cpu_s), min(wall_s)

    def _reward(self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Any) -> tuple[Tensor, dict[str, Any]]:
        self._images_B3HW = images_B3HW.detach()
        return total_variation_reward(images_B3HW), {}

    def _keep_gradient(self, *_: Any) -> None:
        self._gradient = {
            name.replace(".default.", "."): parameter.grad.clone()
            for name, parameter in self._pipeline.unet.named_parameters()
            if parameter.requires_grad
        }


def total_variation_reward(images_B3HW: Tensor) -> Tensor:
    """Return minus the mean absolute difference of neighbours, ``(B,)``; TRL has mapped the images to [0, 1]."""
    rows_B = images_B3HW.diff(dim=-2).abs().mean(dim=(1, 2, 3))
    return -(images_B3HW.diff(dim=-1).abs().mean(dim=(1, 2, 3)) + rows_B)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # TRL's advice on logging, and configs written by a newer diffusers
    main()
