"""The experiments of ``experiments/models`` and the tiny pipelines that stand for the models they name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rltune.config.load import load_experiment
from tests.family_calls import ANCESTRAL, TRAILING, flux_schnell, klein_distilled
from tests.tiny_families import PIPELINES, sdxl, stable_diffusion

FOLDER = Path(__file__).parents[1] / "experiments" / "models"


def sd_turbo() -> Any:
    return stable_diffusion(TRAILING)


def sdxl_turbo() -> Any:
    return sdxl(ANCESTRAL, force_zeros=False)


MODELS: dict[str, Callable[[], Any]] = {
    "sd_turbo": sd_turbo,
    "sdxl": PIPELINES["sdxl"],
    "sdxl_turbo": sdxl_turbo,
    "sd35_medium": PIPELINES["sd3"],
    "flux1_dev": PIPELINES["flux"],
    "flux1_schnell": flux_schnell,
    "flux2_klein": klein_distilled,
    "flux2_klein_base": PIPELINES["flux2_klein"],
    "flux2_dev": PIPELINES["flux2_dev"],
    "z_image_turbo": PIPELINES["z_image"],
    "qwen_image": PIPELINES["qwen_image"],
    "sana": PIPELINES["sana"],
    "sana_sprint": PIPELINES["sana_sprint"],
    "chroma": PIPELINES["chroma"],
    "lumina2": PIPELINES["lumina2"],
    "aura_flow": PIPELINES["aura_flow"],
}
"""File, without its ending -> what makes a pipeline of the model's class."""
SMALL = ("sampler.height=32", "sampler.width=32")


def quick(name: str) -> tuple[str, ...]:
    """What makes a sweep of a file one of seconds, without weights of rewards: two trials of two rounds.

    Steps are those of the file where it has no more than eight, for gradient through all of them; six otherwise.
    """
    steps = load_experiment(FOLDER / f"{name}.yaml", must_find_files=False).shared.sampler.steps
    return (
        *SMALL,
        f"sampler.steps={steps if steps is not None and steps <= 8 else 6}",
        "rewards={smoothness: {weight: 1.0}}",
        "objectives=[smoothness]",
        "evaluate={every: 2, prompts: 2, images_per_prompt: 2, judges: [diversity], confirm: 2}",
        "constraints={}",
        "model.lora.rank=2",
        "optim.steps=2",
        "optim.batch=2",
        "optim.micro_batch=2",
        "search.trials=2",
        "resources={concurrent: 1, executor: warm}",
    )
