"""What a safetensors header says of a LoRA: kohya's ``ss_`` keys, and ModelSpec 1.0.1. All values are strings.

Names and values as sd-scripts writes them (``library/sai_model_spec.py``, ``get_model_version_str_for_sd1_sd2``);
managers of LoRAs sort and filter by them. What is not known of a model is left out.
"""

from typing import Any

from rltune.diffusion.families.base import ModelFamily
from rltune.export.base import Adapter

ARCHITECTURES = {
    "StableDiffusionXLPipeline": "stable-diffusion-xl-v1-base",
    "StableDiffusionXLInpaintPipeline": "stable-diffusion-xl-v1-base",
    "StableDiffusion3Pipeline": "stable-diffusion-3",
    "FluxPipeline": "flux-1-dev",
}
VERSIONS = {"stable-diffusion-xl-v1-base": "sdxl_base_v1-0", "flux-1-dev": "flux1"}
"""Architecture -> ``ss_base_model_version``."""
STABLE_DIFFUSION = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
CLIP_L, CLIP_H = 768, 1024
"""Width of the text that Stable Diffusion 1.x and 2.x read."""
PREDICTION = {"epsilon": "epsilon", "v_prediction": "v"}


def header_of(model: ModelFamily, adapter: Adapter) -> dict[str, str]:
    """Return the header of a LoRA whose scale is folded into its weights, so that alpha is the rank."""
    title = adapter.about.get("title", "rltune LoRA")
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": str(adapter.rank),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
    }
    header |= {f"modelspec.{name}": text for name, text in {**adapter.about, "title": title}.items()}
    architecture, version = _kind(model)
    if architecture:
        header["modelspec.architecture"] = f"{architecture}/lora"
    if version:
        header["ss_base_model_version"] = version
    if type(model.pipeline).__name__ in STABLE_DIFFUSION and (said := PREDICTION.get(_prediction(model))):
        header["modelspec.prediction_type"] = said
    return header


def _kind(model: ModelFamily) -> tuple[str, str]:
    """Return architecture and ``ss_base_model_version``, empty where they have no name for the model."""
    name = type(model.pipeline).__name__
    if name not in STABLE_DIFFUSION:
        architecture = ARCHITECTURES.get(name, "")
        return architecture, VERSIONS.get(architecture, "")
    network: Any = model.network
    width, is_v = network.config.get("cross_attention_dim"), _prediction(model) == "v_prediction"
    if width == CLIP_L:
        return "stable-diffusion-v1", "sd_v1_v" if is_v else "sd_v1"
    if width == CLIP_H:
        return ("stable-diffusion-v2-768-v", "sd_v2_v") if is_v else ("stable-diffusion-v2-512", "sd_v2")
    return "", ""


def _prediction(model: ModelFamily) -> str:
    return str(model.pipeline.scheduler.config.get("prediction_type", ""))
