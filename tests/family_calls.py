"""How the pipelines of diffusers themselves are called for an image, and what that call is in rltune's words."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from rltune.diffusion.families.pipeline import pack
from tests import tiny_families, tiny_llm_families
from tests.tiny_families import PIPELINES, SDXL_SCHEDULE, made
from tests.tiny_llm_families import SANA_SCHEDULE

PROMPTS = ["a cat", "two red birds on a blue branch"]


@dataclass(frozen=True)
class Case:
    """A pipeline, how it is called for an image, and what that call is here."""

    make: Callable[[], Any]
    call: dict[str, Any]
    guidance: float = 1.0
    negative: str = ""
    eta: float = 0.0
    scheduler: Any = None
    """In place of the pipeline's own."""
    is_packed: bool = False
    """Whether the pipeline takes its noise in tokens."""
    steps: int = 3
    sizes: tuple[tuple[int, int], ...] = ((16, 32), (32, 32))


def sdxl_turbo() -> Any:
    return tiny_families.sdxl(force_zeros=False)


def flux_schnell() -> Any:
    return tiny_families.flux(is_dev=False)


def sd3_without_t5() -> Any:
    return tiny_families.sd3(has_t5=False)


def klein_distilled() -> Any:
    return tiny_llm_families.flux2_klein(is_distilled=True)


SD, SDXL, SD3, FLUX = (PIPELINES[name] for name in ("stable_diffusion", "sdxl", "sd3", "flux"))
NEGATIVE = {"negative_prompt": ["a dog", "a dog"]}
DDIM = DDIMScheduler(**SDXL_SCHEDULE, clip_sample=False, set_alpha_to_one=False)
TRAILING = EulerDiscreteScheduler(**SDXL_SCHEDULE, timestep_spacing="trailing")
ANCESTRAL = EulerAncestralDiscreteScheduler(**SDXL_SCHEDULE, timestep_spacing="trailing")
BETAS = {name: value for name, value in SDXL_SCHEDULE.items() if name.startswith("beta")}
FIRST_ORDER = DPMSolverMultistepScheduler(**BETAS, solver_order=1)
SDE = DPMSolverMultistepScheduler(**BETAS, solver_order=1, algorithm_type="sde-dpmsolver++")
UNIPC = UniPCMultistepScheduler(**BETAS, solver_order=1, disable_corrector=[0, 1, 2], final_sigmas_type="zero")
REDRAWN = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
SPRINT = {"use_resolution_binning": False}
SANA = {"guidance_scale": 4.5, **SPRINT}
WIDE = ((32, 64), (32, 32))  # SANA's pipeline takes multiples of 32
CASES = {
    "sd": Case(SD, {"guidance_scale": 5.0}, 5.0),
    "sd eta 1": Case(SD, {"guidance_scale": 5.0, "eta": 1.0, **NEGATIVE}, 5.0, "a dog", eta=1.0),
    "sd-turbo": Case(SD, {"guidance_scale": 0.0}, scheduler=TRAILING),
    "sdxl": Case(SDXL, {"guidance_scale": 5.0}, 5.0),
    "sdxl negative": Case(SDXL, {"guidance_scale": 5.0, **NEGATIVE}, 5.0, "a dog"),
    "sdxl no guidance": Case(SDXL, {"guidance_scale": 1.0}),
    "sdxl ddim": Case(SDXL, {"guidance_scale": 5.0}, 5.0, scheduler=DDIM),
    "sdxl ddim eta 1": Case(SDXL, {"guidance_scale": 5.0, "eta": 1.0}, 5.0, eta=1.0, scheduler=DDIM),
    "sdxl-turbo": Case(sdxl_turbo, {"guidance_scale": 0.0}, eta=1.0, scheduler=ANCESTRAL),
    "sdxl trailing": Case(sdxl_turbo, {"guidance_scale": 3.0}, 3.0, scheduler=TRAILING),
    "sdxl dpm++": Case(SDXL, {"guidance_scale": 5.0}, 5.0, scheduler=FIRST_ORDER),
    "sdxl sde-dpm++": Case(SDXL, {"guidance_scale": 5.0}, 5.0, eta=1.0, scheduler=SDE),
    "sdxl unipc": Case(SDXL, {"guidance_scale": 5.0}, 5.0, scheduler=UNIPC),
    "sdxl lcm": Case(SDXL, {"guidance_scale": 1.0}, eta=1.0, scheduler=LCMScheduler(**SDXL_SCHEDULE)),
    "sdxl tcd": Case(SDXL, {"guidance_scale": 1.0, "eta": 0.3}, eta=0.3, scheduler=TCDScheduler(**SDXL_SCHEDULE)),
    "sd3": Case(SD3, {"guidance_scale": 7.0}, 7.0),
    "sd3 negative": Case(SD3, {"guidance_scale": 7.0, **NEGATIVE}, 7.0, "a dog"),
    "sd3-turbo": Case(SD3, {"guidance_scale": 0.0}),
    "sd3 without t5": Case(sd3_without_t5, {"guidance_scale": 7.0}, 7.0),
    "sd3 eta 1": Case(SD3, {"guidance_scale": 7.0}, 7.0, eta=1.0, scheduler=REDRAWN),
    "sd3 lcm": Case(SD3, {"guidance_scale": 0.0}, eta=1.0, scheduler=FlowMatchLCMScheduler(shift=3.0)),
    "flux dev": Case(FLUX, {"guidance_scale": 3.5}, is_packed=True),
    "flux dev true guidance": Case(
        FLUX, {"guidance_scale": 3.5, "true_cfg_scale": 4.0, **NEGATIVE}, 4.0, "a dog", is_packed=True
    ),
    "flux schnell": Case(flux_schnell, {"guidance_scale": 0.0, "max_sequence_length": 512}, is_packed=True),
    "flux2 klein": Case(PIPELINES["flux2_klein"], {"guidance_scale": 4.0}, 4.0),
    "flux2 klein distilled": Case(klein_distilled, {"guidance_scale": 4.0}),
    "flux2 dev": Case(PIPELINES["flux2_dev"], {"guidance_scale": 4.0}),
    "qwen-image": Case(PIPELINES["qwen_image"], {"true_cfg_scale": 4.0, **NEGATIVE}, 4.0, "a dog", is_packed=True),
    "qwen-image no guidance": Case(PIPELINES["qwen_image"], {"true_cfg_scale": 1.0}, is_packed=True),
    "z-image-turbo": Case(PIPELINES["z_image"], {"guidance_scale": 0.0}),
    "z-image": Case(PIPELINES["z_image"], {"guidance_scale": 3.0, **NEGATIVE}, 4.0, "a dog"),
    "chroma": Case(PIPELINES["chroma"], {"guidance_scale": 3.0}, 3.0, is_packed=True),
    "chroma negative": Case(PIPELINES["chroma"], {"guidance_scale": 3.0, **NEGATIVE}, 3.0, "a dog", is_packed=True),
    "chroma no guidance": Case(PIPELINES["chroma"], {"guidance_scale": 1.0}, is_packed=True),
    "sana": Case(PIPELINES["sana"], SANA, 4.5, sizes=WIDE),
    "sana negative": Case(PIPELINES["sana"], {**SANA, **NEGATIVE}, 4.5, "a dog", sizes=WIDE),
    "sana no guidance": Case(PIPELINES["sana"], {"guidance_scale": 1.0, **SPRINT}, sizes=WIDE),
    "sana unipc": Case(
        PIPELINES["sana"],
        SANA,
        4.5,
        scheduler=UniPCMultistepScheduler(**SANA_SCHEDULE, solver_order=1, disable_corrector=[0, 1, 2]),
        sizes=WIDE,
    ),
    "sana-sprint": Case(PIPELINES["sana_sprint"], SPRINT, eta=1.0, steps=2, sizes=WIDE),
    "sana-sprint 1 step": Case(
        PIPELINES["sana_sprint"], {**SPRINT, "intermediate_timesteps": None}, eta=1.0, steps=1, sizes=WIDE
    ),
    "sana-sprint 4 steps": Case(
        PIPELINES["sana_sprint"], {**SPRINT, "intermediate_timesteps": None}, eta=1.0, steps=4, sizes=WIDE
    ),
    "lumina2": Case(PIPELINES["lumina2"], {"guidance_scale": 4.0}, 4.0),
    "lumina2 negative": Case(PIPELINES["lumina2"], {"guidance_scale": 4.0, **NEGATIVE}, 4.0, "a dog"),
    "lumina2 no guidance": Case(PIPELINES["lumina2"], {"guidance_scale": 1.0}),
    "aura-flow": Case(PIPELINES["aura_flow"], {"guidance_scale": 3.5}, 3.5),
    "aura-flow negative": Case(PIPELINES["aura_flow"], {"guidance_scale": 3.5, **NEGATIVE}, 3.5, "a dog"),
    "aura-flow no guidance": Case(PIPELINES["aura_flow"], {"guidance_scale": 1.0}),
}


AGAIN = frozenset(
    (
        "sdxl negative",
        "sdxl no guidance",
        "sdxl ddim",
        "sdxl trailing",
        "sdxl dpm++",
        "sdxl tcd",
        "sd3 negative",
        "sd3-turbo",
        "sd3 without t5",
        "sd3 lcm",
        "flux dev",
        "flux2 klein distilled",
        "qwen-image no guidance",
        "z-image-turbo",
        "chroma no guidance",
        "sana no guidance",
        "sana unipc",
        "sana-sprint 1 step",
        "lumina2 no guidance",
        "aura-flow no guidance",
    )
)
"""Cases that run code which others run too."""


def pipeline_of(case: Case) -> Any:
    pipeline = copy.copy(made(case.make))
    if case.scheduler is not None:
        pipeline.scheduler = case.scheduler
    return pipeline


@contextmanager
def drawing(scheduler: Any, noises: list[Tensor]) -> Iterator[None]:
    """Hand prepared noises to a scheduler that draws its own."""
    module = __import__(type(scheduler).__module__, fromlist=["x"])
    queue = list(noises)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda *_, **__: queue.pop(0))
        yield


def theirs(pipeline: Any, case: Case, size: tuple[int, int], x_BCHW: Tensor, noises: list[Tensor]) -> Tensor:
    latents = pack(x_BCHW) if case.is_packed else x_BCHW.clone()
    size_px = {"height": size[0], "width": size[1]}
    with drawing(pipeline.scheduler, noises):
        images: Tensor = pipeline(
            prompt=list(PROMPTS),
            num_inference_steps=case.steps,
            latents=latents,
            output_type="pt",
            **size_px,
            **copy.deepcopy(case.call),
        ).images
    return images
