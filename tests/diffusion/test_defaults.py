"""What a model is sampled with where an experiment does not say, by its files alone and as it was loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
)

from rltune.assets import BUILTIN_PIPELINE_DIR
from rltune.diffusion.defaults import read_defaults
from rltune.diffusion.families.base import FAMILIES, Defaults, Described
from rltune.diffusion.outline import load_outline
from rltune.errors import UserError
from tests import tiny_families, tiny_llm_families
from tests.tiny_families import SDXL_SCHEDULE


def kept(pipeline: Any, folder: Path) -> Path:
    """Keep the files of a pipeline that say what it is, without any weights."""
    pipeline.save_config(folder)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    name = "unet" if "unet" in pipeline.components else "transformer"
    getattr(pipeline, name).save_config(folder / name)
    return folder


def z_image_base() -> Any:
    pipeline = tiny_llm_families.z_image()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return pipeline


TRAILING = {**SDXL_SCHEDULE, "timestep_spacing": "trailing"}
CASES: dict[str, tuple[Callable[[], Any], str, Defaults]] = {
    "sdxl": (tiny_families.sdxl, "sdxl", Defaults(50, 5.0)),
    "sdxl-turbo": (
        lambda: tiny_families.sdxl(EulerAncestralDiscreteScheduler(**TRAILING)),
        "x",
        Defaults(4, 1.0, eta=1.0),
    ),
    "sdxl trained to zero terminal SNR": (
        lambda: tiny_families.sdxl(EulerDiscreteScheduler(**TRAILING, prediction_type="v_prediction")),
        "x",
        Defaults(50, 5.0),
    ),
    "sd3": (tiny_families.sd3, "stabilityai/stable-diffusion-3.5-large", Defaults(28, 7.0)),
    "sd3 turbo": (tiny_families.sd3, "stabilityai/stable-diffusion-3.5-large-turbo", Defaults(4, 1.0)),
    "sd3 in a folder of turbos": (tiny_families.sd3, "/models/turbo/sd35", Defaults(28, 7.0)),
    "flux dev": (tiny_families.flux, "x", Defaults(28, 1.0, embedded_guidance=3.5)),
    "flux schnell": (lambda: tiny_families.flux(is_dev=False), "x", Defaults(4, 1.0)),
    "flux2 klein base": (tiny_llm_families.flux2_klein, "x", Defaults(50, 4.0)),
    "flux2 klein": (lambda: tiny_llm_families.flux2_klein(is_distilled=True), "x", Defaults(4, 1.0)),
    "qwen-image": (tiny_llm_families.qwen_image, "x", Defaults(50, 4.0)),
    "flux2 dev": (tiny_llm_families.flux2_dev, "x", Defaults(50, 1.0, embedded_guidance=4.0)),
    "z-image-turbo": (tiny_llm_families.z_image, "x", Defaults(8, 1.0)),
    "z-image": (z_image_base, "x", Defaults(50, 6.0)),
    "sana": (tiny_llm_families.sana, "x", Defaults(20, 4.5)),
    "sana-sprint": (tiny_llm_families.sana_sprint, "x", Defaults(2, 1.0, eta=1.0, embedded_guidance=4.5)),
    "chroma": (tiny_families.chroma, "x", Defaults(35, 5.0)),
    "lumina2": (tiny_llm_families.lumina2, "x", Defaults(30, 4.0)),
    "aura-flow": (tiny_families.aura_flow, "x", Defaults(50, 3.5)),
}
"""The pipelines' own steps and guidance in diffusers 0.42; Z-Image's scale s is 1 + s here. Those of distilled models
are of their cards."""


@pytest.mark.parametrize("name", CASES)
def test_every_family_says_what_it_is_sampled_with(name: str, tmp_path: Path) -> None:
    make, base, expected = CASES[name]
    pipeline = make()
    assert read_defaults(kept(pipeline, tmp_path), base=base) == expected
    assert FAMILIES.get(type(pipeline).__name__)(pipeline).defaults(base) == expected


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (PNDMScheduler(**SDXL_SCHEDULE), Defaults(20, 5.0)),
        (DDIMScheduler(**TRAILING), Defaults(20, 5.0)),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), Defaults(20, 5.0)),
        (EulerDiscreteScheduler(**SDXL_SCHEDULE), Defaults(20, 5.0)),
        (EulerAncestralDiscreteScheduler(**SDXL_SCHEDULE), Defaults(20, 5.0, eta=1.0)),
        (EulerDiscreteScheduler(**TRAILING), Defaults(4, 1.0)),
        (LCMScheduler(**SDXL_SCHEDULE), Defaults(4, 1.0, eta=1.0)),
        (TCDScheduler(**SDXL_SCHEDULE), Defaults(4, 1.0, eta=0.3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_stable_diffusion_keeps_its_defaults_but_for_turbo(scheduler: Any, expected: Defaults) -> None:
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    family: Any = FAMILIES.get("StableDiffusionPipeline")
    assert family.defaults_of(Described("x", {}, config, {})) == expected


def test_the_built_in_models_defaults_are_what_they_were() -> None:
    assert read_defaults(BUILTIN_PIPELINE_DIR, base="builtin") == Defaults(20, 5.0)


def test_a_file_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "ZImagePipeline"}))
    with pytest.raises(UserError, match=r"^model.base: scheduler/scheduler_config.json of 'm' cannot be read"):
        read_defaults(tmp_path, base="m")


def test_a_model_without_weights_knows_what_its_index_says_of_it(tmp_path: Path) -> None:
    tiny_llm_families.flux2_klein(is_distilled=True).save_pretrained(tmp_path)
    assert load_outline(tmp_path, base="x").defaults("x") == Defaults(4, 1.0)
